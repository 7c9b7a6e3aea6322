"""Turn the files of a repository into a few lines that describe it, as a person would.

    psf/requests
    <the first lines of its README, or of its package's documentation>
    Languages: py md
    Dependencies: urllib3 certifi pytest

Nothing is executed or parsed; names are found with regular expressions, in any language.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from pathlib import PurePosixPath

from code2lora.training.data.dataset import RepositoryData

_MAX_DEPENDENCIES = 40
_MAX_LANGUAGES = 6
_HEAD_CHARS = 20_000
"""What a file depends on, and what it is about, stands near its beginning."""

_IMPORT = re.compile(
    r"""^[ \t]*(?:from|import|use|using|require|\#[ ]?include)\b[ \t]*[("'<]*
    (@?[A-Za-z_][\w-]*)""",
    re.MULTILINE | re.VERBOSE,
)
_FROM_QUOTED = re.compile(r"""\b(?:from|require\()[ ]?["'](@?[A-Za-z_][\w-]*)""")
_DOCUMENTATION = re.compile(r"""\A(?:\s|\#[^\n]*\n)*[rRbBuU]{0,2}(\"\"\"|''')(.+?)\1""", re.DOTALL)
_SUMMARY = re.compile(r"""\bdescription\s*=\s*["']([^"'\n]{8,})["']""")


class Describer:
    """Describes repositories; what it found in a file is kept for the next description."""

    def __init__(self, *, lines: int) -> None:
        """lines: of the README, at most."""
        self._lines = lines
        self._imports: dict[tuple[str, int], frozenset[str]] = {}

    def describe(self, data: RepositoryData, anchor: int, held_out: Collection[str]) -> str:
        """Return the description of a snapshot's told files."""
        told = data.told_files(anchor, held_out)
        own = {part.split(".")[0].lower() for file in told for part in file.path.split("/")}
        suffixes = Counter(PurePosixPath(file.path).suffix[1:] for file in told)
        dependencies = Counter(
            name
            for file in told
            for name in self._imported(data, file.text)
            if name.lower() not in own
        )
        texts = {file.path: data.texts[file.text] for file in told}
        return "\n".join(
            [
                data.name,
                *_about(texts, self._lines),
                f"Languages: {' '.join(_most(suffixes, _MAX_LANGUAGES))}",
                f"Dependencies: {' '.join(_most(dependencies, _MAX_DEPENDENCIES))}",
            ]
        )

    def _imported(self, data: RepositoryData, row: int) -> frozenset[str]:
        key = (data.name, row)
        if key not in self._imports:
            head = data.texts[row][:_HEAD_CHARS]
            found = {*_IMPORT.findall(head), *_FROM_QUOTED.findall(head)}
            self._imports[key] = frozenset(found)
        return self._imports[key]


def _about(texts: dict[str, str], most: int) -> list[str]:
    """Return the first lines of the README nearest the root, else of a package's own words."""
    by_depth = sorted(texts, key=lambda path: (path.count("/"), path))
    for path in by_depth:
        if PurePosixPath(path).name.lower().startswith("readme"):
            return _lines_of(texts[path], most)
    for path in by_depth:
        if PurePosixPath(path).name in ("__init__.py", "setup.py"):
            head = texts[path][:_HEAD_CHARS]
            found = _DOCUMENTATION.search(head) or _SUMMARY.search(head)
            if found is not None:
                return _lines_of(found[found.lastindex or 1], most)
    return []


def _lines_of(text: str, most: int) -> list[str]:
    lines = [line.strip() for line in text[:_HEAD_CHARS].splitlines()]
    return [line for line in lines if line][:most]


def _most(counts: Counter[str], most: int) -> list[str]:
    order = sorted(counts, key=lambda name: (-counts[name], name))
    return [name for name in order if name][:most]
