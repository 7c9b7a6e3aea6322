"""Python test files into their assertions, each with the stretch of it that a model may be asked.

The families are those of the paper's data: `assert`, the unittest methods, `pytest.raises`,
`pytest.approx` and calls of `assert_*` helpers. Nothing is imported or executed; a file is only
parsed, and one that does not parse has no assertions.

Most versions of a file repeat most of the version before. So a file is taken apart at its
functions and methods, and a part that was seen before is not parsed again. A part counts only if it
parses by itself as whole statements; then all parts together are what the whole file parses to.
"""

from __future__ import annotations

import ast
import posixpath
import re
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from code2lora.history import filenames
from code2lora.history.assertion_nodes import Assertion, find_in_nodes

MAX_CACHED_CHARS = 64_000_000
"""Text of remembered parts; when there is more, all are forgotten."""

__all__ = [
    "NO_FILE",
    "Assertion",
    "AssertionFinder",
    "ParsedFile",
    "find_assertions",
    "is_test_path",
    "new_assertions",
    "new_in_commit",
]

_DEFINITION = re.compile(r"^(?:@|def |class |async def )", re.MULTILINE)
_MEMBER = re.compile(r"^    (?:@|def |async def )", re.MULTILINE)
_CLASS_LINE = "class _:\n"
_MEMBER_INDENT = "    "
_BYTE_ORDER_MARK = "\ufeff"

_NOT_SOURCE = (SyntaxError, ValueError, RecursionError, MemoryError)
"""What the parser raises for a text that is no Python, or more of it than it takes."""

Part = tuple[int, tuple[Assertion, ...]]
"""Where a part of a file begins, and its assertions, counted from there."""


@dataclass(frozen=True, slots=True)
class ParsedFile:
    """The assertions of one file, part by part; the parts of two versions are often shared."""

    parts: tuple[Part, ...]

    def assertions(self) -> list[Assertion]:
        """Return all assertions in the order of the file."""
        return [each.moved(offset) for offset, found in self.parts for each in found]


NO_FILE = ParsedFile(())
"""What there is of a file before it is added and after it is removed."""


class AssertionFinder:
    """Finds assertions, and remembers the parts of files that it has parsed."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, str, bool], tuple[Part, ...] | None] = {}
        self._n_chars = 0

    def parse(self, text: str) -> ParsedFile:
        """Return the assertions of a file; none when it does not parse."""
        first = len(_BYTE_ORDER_MARK) if text.startswith(_BYTE_ORDER_MARK) else 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the parser thinks of invalid escapes
            parts = self._file(text, first)
        return NO_FILE if parts is None else ParsedFile(parts)

    def _file(self, text: str, first: int) -> tuple[Part, ...] | None:
        starts = [first, *(s for s in _starts(_DEFINITION, text) if s > first), len(text)]
        parts: list[Part] = []
        i, step = 0, 1
        while i < len(starts) - 1:
            last = min(i + step, len(starts) - 1)
            found = self._remembered(text[starts[i] : starts[last]])
            if found is not None:
                parts += [(starts[i] + offset, inner) for offset, inner in found]
                i, step = last, 1
            elif last == len(starts) - 1:
                return None
            else:
                # The cut went through a string or a bracket: take in more, twice as much each time.
                step *= 2
        return tuple(parts)

    def _remembered(
        self, text: str, owner: str = "", *, ends_class: bool = False
    ) -> tuple[Part, ...] | None:
        key = (text, owner, ends_class)
        if key not in self._parts:
            if self._n_chars > MAX_CACHED_CHARS:
                self._parts.clear()
                self._n_chars = 0
            self._n_chars += len(text)
            self._parts[key] = _member(text, owner, ends_class) if owner else self._definition(text)
        return self._parts[key]

    def _definition(self, text: str) -> tuple[Part, ...] | None:
        """Return the parts of some whole statements, or None if they are none."""
        starts = [*_starts(_MEMBER, text), len(text)]
        if len(starts) > 2:
            header = text[: starts[0]] + f"{_MEMBER_INDENT}pass\n"
            tree = _parse(header)
            if tree is not None and _ends_in_class(tree):
                parts = self._members(tree, header, text, starts)
                if parts is not None:
                    return parts
        tree = _parse(text)
        return None if tree is None else _part(find_in_nodes(text, tree.body, ""))

    def _members(
        self, tree: ast.Module, header: str, text: str, starts: Sequence[int]
    ) -> tuple[Part, ...] | None:
        """Return the parts of a class, cut at its methods; None if a cut went through something."""
        owner = tree.body[-1]
        assert isinstance(owner, ast.ClassDef)
        parts = [*_part(find_in_nodes(header, tree.body, ""))]
        for start, end in pairwise(starts):
            found = self._remembered(text[start:end], owner.name, ends_class=end == len(text))
            if found is None:
                return None
            parts += [(start + offset, inner) for offset, inner in found]
        return tuple(parts)


def find_assertions(text: str) -> list[Assertion]:
    """Return the assertions of a Python file in its order; none when it does not parse."""
    return AssertionFinder().parse(text).assertions()


def is_test_path(path: str) -> bool:
    """Tell whether the paper's recipe takes a path for a Python test file."""
    folders = path.split("/")[:-1]
    return (
        posixpath.splitext(path)[1].lower() == ".py"
        and "test" in path.lower()
        and not any(folder in _SKIPPED_FOLDERS for folder in folders)
    )


_SKIPPED_FOLDERS = filenames.PAPER_VENDORED_FOLDERS | filenames.PAPER_GENERATED_FOLDERS


def new_assertions(
    before: Sequence[Assertion], after: Sequence[Assertion]
) -> list[tuple[Assertion, str]]:
    """Return what a new version of a file asserts that the old one did not, in its order.

    Each comes with `modified`, where an assertion of the same function and kind went, or `added`.
    One that was only moved, indented or wrapped otherwise is not new.
    """
    return _labelled(*_unmoved(*_difference(before, after)))


def new_in_commit(
    files: Sequence[tuple[ParsedFile, ParsedFile]],
) -> list[list[tuple[Assertion, str]]]:
    """Return `new_assertions` of every file of a commit, given as (before, after).

    One that went from any of these files to another is not new either.
    """
    differences = [_unmoved(*_difference(*_unshared(*versions))) for versions in files]
    elsewhere = Counter(_text(each) for gone, _ in differences for each in gone)
    return [_labelled(gone, _beyond(come, elsewhere, _text)) for gone, come in differences]


def _unshared(before: ParsedFile, after: ParsedFile) -> tuple[list[Assertion], list[Assertion]]:
    """Return the assertions of both, without those of the parts that both have."""
    shared = {id(found) for _, found in before.parts} & {id(found) for _, found in after.parts}
    # A part that one of them repeats is left to be counted.
    for parts in (before.parts, after.parts):
        times = Counter(id(found) for _, found in parts)
        shared -= {part for part, n in times.items() if n > 1}
    old, new = (
        [each.moved(offset) for offset, found in parts if id(found) not in shared for each in found]
        for parts in (before.parts, after.parts)
    )
    return old, new


_Key = Callable[[Assertion], Hashable]


def _identity(assertion: Assertion) -> Hashable:
    return assertion.identity


def _text(assertion: Assertion) -> Hashable:
    return assertion.text


def _difference(
    before: Sequence[Assertion], after: Sequence[Assertion], key: _Key = _identity
) -> tuple[list[Assertion], list[Assertion]]:
    """Return what only the old and what only the new version has, as often as it does."""
    gone = _beyond(before, Counter(map(key, after)), key)
    return gone, _beyond(after, Counter(map(key, before)), key)


def _unmoved(
    gone: Sequence[Assertion], come: Sequence[Assertion]
) -> tuple[list[Assertion], list[Assertion]]:
    """Leave out what went from one function of a file to another."""
    return _difference(gone, come, _text)


def _beyond(
    assertions: Sequence[Assertion], known: Counter[Hashable], key: _Key
) -> list[Assertion]:
    """Return those that are not among the known, and take those that are away from these."""
    kept = []
    for each in assertions:
        if known[key(each)] > 0:
            known[key(each)] -= 1
        else:
            kept.append(each)
    return kept


def _labelled(gone: Sequence[Assertion], come: Sequence[Assertion]) -> list[tuple[Assertion, str]]:
    replaced = Counter((each.function, each.type) for each in gone)
    labelled = []
    for each in come:
        key = (each.function, each.type)
        labelled.append((each, "modified" if replaced[key] > 0 else "added"))
        replaced[key] -= 1
    return labelled


def _starts(pattern: re.Pattern[str], text: str) -> Iterator[int]:
    """Yield where definitions begin, at their first decorator where they have some."""
    decorated = False
    for match in pattern.finditer(text):
        if not decorated:
            yield match.start()
        decorated = match[0].endswith("@")


def _parse(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except _NOT_SOURCE:
        return None


def _ends_in_class(tree: ast.Module) -> bool:
    """Tell whether the `pass` at the end of a text is a statement of a class on its own level."""
    last = tree.body[-1]
    return isinstance(last, ast.ClassDef) and isinstance(last.body[-1], ast.Pass)


def _member(text: str, owner: str, ends_class: bool) -> tuple[Part, ...] | None:
    """Return the parts of some whole statements of a class, or None if they are none."""
    source = _CLASS_LINE + text
    tree = _parse(source)
    if tree is None:
        return None
    wrapper, *behind = tree.body
    assert isinstance(wrapper, ast.ClassDef)
    if behind and not ends_class:
        return None
    found = find_in_nodes(source, wrapper.body, owner) + find_in_nodes(source, behind, "")
    return _part([each.moved(-len(_CLASS_LINE)) for each in found])


def _part(found: Sequence[Assertion]) -> tuple[Part, ...]:
    return ((0, tuple(found)),) if found else ()
