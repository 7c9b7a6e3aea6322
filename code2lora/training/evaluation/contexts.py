"""Turn the files that a model was told into text to put above a prefix: what RAG and DRC read.

Two ways to choose it: chunks that share words with the prefix (`Chunks`, BM25), and definitions of
the names that the prefix imports or uses (`Definitions`). Both read only the told files, and both
are built once for a repository and asked once for every prompt. No file is executed; a file that
does not parse as Python is read with regular expressions.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from code2lora.training.data.targets import identifiers

CHUNK_TOKENS = 512
CHUNKS = 3
_QUERY_CHARS = 4000
"""Of a prefix, the last so many characters say what to look for."""
_SAMPLES, _SAMPLE_CHARS = 32, 2000
"""Of so many files, so much is tokenised to learn how long a token is."""
_LEAST_TOKENS = 16
"""Less room than this is left empty."""
_DEFINITION_LINES = 24
"""Longest definition that is quoted whole; of a longer one the beginning is."""

Encode = Callable[[str], list[int]]
"""A tokenizer's `text -> tokens`; contexts are measured in tokens, not in characters."""


class Context(Protocol):
    """Chooses text for a prompt out of one repository's told files."""

    def retrieve(self, prefix: str, *, path: str, max_tokens: int) -> str:
        """Return text of at most `max_tokens` tokens, empty where nothing was found.

        prefix: all text above what is asked   path: of the file that it stands in
        """


@dataclass(frozen=True)
class _Chunk:
    path: str
    text: str


class Chunks:
    """The chunks of the told files, ranked by BM25 over the words in their identifiers."""

    def __init__(
        self,
        files: Mapping[str, str],
        encode: Encode,
        *,
        chunk_tokens: int = CHUNK_TOKENS,
        k: int = CHUNKS,
    ) -> None:
        """files: path -> text, of what was told; each is cut at line ends into chunks.

        chunk_tokens: of a chunk, about; what is retrieved is counted exactly
        """
        self._encode = encode
        self._k = k
        chunk_chars = round(chunk_tokens * _chars_per_token(files, encode))
        self._chunks = [
            chunk for path in sorted(files) for chunk in _chunks(path, files[path], chunk_chars)
        ]
        self._index = _Bm25([words(chunk.text) for chunk in self._chunks])

    def retrieve(self, prefix: str, *, path: str, max_tokens: int) -> str:
        """Return the best k chunks that fit, the best of all last, next to the prefix.

        Each is headed by its path. Chunks of the file that is asked about are told ones too, as
        long as their text does not stand in the prefix anyway.
        """
        chosen: list[str] = []
        left = max_tokens
        for number in self._index.ranked(words(prefix[-_QUERY_CHARS:])):
            if len(chosen) == self._k or left < _LEAST_TOKENS:
                break
            chunk = self._chunks[number]
            if chunk.path == path and chunk.text.strip() in prefix:
                continue
            block = _block(chunk.path, chunk.text)
            n_tokens = len(self._encode(block))
            if n_tokens > left:
                block, n_tokens = _first_lines(block, left, self._encode)
            if block:
                chosen.append(block)
                left -= n_tokens
        return "".join(reversed(chosen))


class Definitions:
    """The functions, classes and constants that the told files define, by name."""

    def __init__(self, files: Mapping[str, str], encode: Encode) -> None:
        """files: path -> text, of what was told."""
        self._encode = encode
        self._by_name: dict[str, list[_Definition]] = {}
        for path in sorted(files):
            for name, text in definitions(path, files[path]):
                self._by_name.setdefault(name, []).append(_Definition(path, text))

    def retrieve(self, prefix: str, *, path: str, max_tokens: int) -> str:
        """Return the definitions of the prefix's names that fit, the nearest name's last.

        Imported names come before others, later uses before earlier ones. A name that more than
        three places define says too little, unless its import tells which module is meant.
        """
        blocks: list[str] = []
        left = max_tokens
        quoted: set[_Definition] = set()
        for name, module in _wanted(prefix, path):
            found = self._by_name.get(name, [])
            of_module = [each for each in found if module and _is_module(each.path, module)]
            if not of_module and len(found) > 3:
                continue
            for each in (of_module or found)[:1]:
                block = _block(each.path, each.text)
                n_tokens = len(self._encode(block))
                if each in quoted or each.text.strip() in prefix or n_tokens > left:
                    continue
                quoted.add(each)
                blocks.append(block)
                left -= n_tokens
        return "".join(reversed(blocks))


@dataclass(frozen=True)
class _Definition:
    path: str
    text: str


def words(text: str) -> list[str]:
    """Return the lower-case words of a text's identifiers: `parseURL_of` gives parse, url, of."""
    return [word.lower() for word in _WORD.findall(text)]


def definitions(path: str, text: str) -> list[tuple[str, str]]:
    """Return (name, text) of what a file defines at its top level and in its classes.

    Python is parsed; where that fails, and for other languages, lines that look like definitions
    are taken with the lines indented below them.
    """
    tree = parse(text) if path.endswith((".py", ".pyi")) else None
    lines = text.split("\n")
    if tree is None:
        return [(m[1], _below(lines, i)) for i, m in enumerate(map(_DEFINES.match, lines)) if m]
    return [(name, _cut(lines[start - 1 : end])) for name, start, end in _defined(tree.body)]


def parse(text: str) -> ast.Module | None:
    """Return a Python text's syntax tree, or None where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # strange escapes in somebody's strings
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


class _Bm25:
    """BM25 with its usual constants; documents are ranked by score, then by their order."""

    _K1, _B = 1.5, 0.75

    def __init__(self, documents: list[list[str]]) -> None:
        lengths = np.array([len(each) for each in documents], dtype=np.float64)
        places: dict[str, list[tuple[int, int]]] = {}
        for number, document in enumerate(documents):
            for word, n in Counter(document).items():
                places.setdefault(word, []).append((number, n))
        self._n = len(documents)
        norm = 1 - self._B + self._B * lengths / max(lengths.mean(), 1e-9) if self._n else lengths
        self._weights: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]] = {}
        for word, pairs in places.items():
            rows, counts = np.array(pairs, dtype=np.int64).T
            idf = math.log(1 + (self._n - len(rows) + 0.5) / (len(rows) + 0.5))
            score = idf * counts * (self._K1 + 1) / (counts + self._K1 * norm[rows])
            self._weights[word] = rows, score

    def ranked(self, query: list[str]) -> list[int]:
        """Return the documents that share a word with the query, the best first."""
        scores = np.zeros(self._n)
        for word in sorted(set(query)):  # sums in one order, so equal scores stay equal
            if word in self._weights:
                rows, score = self._weights[word]
                scores[rows] += score
        order = np.argsort(-scores, kind="stable")
        return [int(number) for number in order if scores[number] > 0]


_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d{2,}")
_DEFINES = re.compile(
    r"^\s*(?:(?:export|default|public|private|protected|static|async|final|abstract|pub|inline)\s+)*"
    r"(?:def|class|function|func|fn|struct|interface|trait|enum|type|module|const)\s+"
    r"([A-Za-z_]\w{2,})"
)
_FROM = re.compile(r"^[ \t]*from[ \t]+([.\w]+)[ \t]+import[ \t]+(\([^)]*\)?|[^\n]*)", re.M)


def _chunks(path: str, text: str, chunk_chars: int) -> Iterator[_Chunk]:
    """Yield a text's chunks of whole lines, each of at most `chunk_chars` characters."""
    lines: list[str] = []
    n_chars = 0
    for line in text.splitlines(keepends=True):
        if lines and n_chars + len(line) > chunk_chars:
            yield _Chunk(path, "".join(lines))
            lines, n_chars = [], 0
        if len(line) <= chunk_chars:  # a longer line is data, not code
            lines.append(line)
            n_chars += len(line)
    if "".join(lines).strip():
        yield _Chunk(path, "".join(lines))


def _chars_per_token(files: Mapping[str, str], encode: Encode) -> float:
    """Return about how many characters a token of these files has.

    Tokenising all of them only to cut them would cost more than everything else here.
    """
    paths = sorted(files)
    sample = [files[path][:_SAMPLE_CHARS] for path in paths[:: 1 + len(paths) // _SAMPLES]]
    n_tokens = sum(len(encode(text)) for text in sample)
    return sum(map(len, sample)) / n_tokens if n_tokens else 1.0


def _block(path: str, text: str) -> str:
    return f"# {path}\n{text.rstrip()}\n\n"


def _first_lines(block: str, max_tokens: int, encode: Encode) -> tuple[str, int]:
    """Return as many of a block's lines as fit, and their tokens; nothing if that is too little."""
    kept, n_tokens = [], 0
    for line in block.splitlines(keepends=True):
        n_line = len(encode(line))
        if n_tokens + n_line > max_tokens:
            break
        kept.append(line)
        n_tokens += n_line
    return ("".join(kept), n_tokens) if len(kept) > 2 else ("", 0)


def _defined(body: list[ast.stmt]) -> Iterator[tuple[str, int, int]]:
    """Yield (name, first line, last line) of the definitions in a module's or a class's body."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            yield node.name, first, node.end_lineno or node.lineno
            if isinstance(node, ast.ClassDef):
                yield from _defined(node.body)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    yield target.id, node.lineno, node.end_lineno or node.lineno


def _below(lines: list[str], first: int) -> str:
    """Return a line with those below it that are indented deeper, or blank, or close it."""
    indent = len(lines[first]) - len(lines[first].lstrip())
    last = first + 1
    while last < len(lines):
        line = lines[last]
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            last += line.strip() in ("}", "};", "end")
            break
        last += 1
    return _cut(lines[first:last])


def _cut(lines: list[str]) -> str:
    return "\n".join(lines[:_DEFINITION_LINES]).rstrip()


def _wanted(prefix: str, path: str) -> Iterator[tuple[str, str]]:
    """Yield (name, module or empty) of what a prefix refers to, the most useful first."""
    modules: dict[str, str] = {}
    for match in _FROM.finditer(prefix) if path.endswith((".py", ".pyi")) else ():
        for part in match[2].split("#")[0].strip("()").split(","):
            name = part.strip().split(" as ")[0].strip()
            if name.isidentifier():
                modules[name] = match[1]
    recent = prefix[-_QUERY_CHARS:]
    names = sorted(identifiers(recent), key=lambda name: (-recent.rfind(name), name))
    yield from ((name, modules[name]) for name in names if name in modules)
    yield from ((name, "") for name in names if name not in modules)


def _is_module(path: str, module: str) -> bool:
    """Tell whether a file can be what an import calls `module`, absolute or relative."""
    parts = [part for part in module.split(".") if part]
    place = path.removesuffix(".py").removesuffix("/__init__").split("/")
    return bool(parts) and place[-len(parts) :] == parts
