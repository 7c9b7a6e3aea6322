"""Turn source text into spans that are hard to write without knowing the repository.

A span is a stretch of whole lines of one file. What makes it worth asking for is counted here:
identifiers that the rest of the repository uses and that the text just above the span does not
show. Nothing is executed or imported; identifiers are found with a regular expression, so any
language will do.
"""

from __future__ import annotations

import builtins
import hashlib
import keyword
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{3,}")
_HUNK = re.compile(r"^@@ -\d+(?:,\d+)? \+(\d+)(?:,\d+)? @@")
_COMMON = frozenset(keyword.kwlist) | frozenset(dir(builtins)) | {"self", "args", "kwargs"}


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Which spans are worth a completion."""

    max_lines: int = 24
    """A longer stretch is cut into several spans."""
    min_chars: int = 24
    """Non-space characters; shorter spans say little."""
    max_chars: int = 1600
    """Longer spans are dropped: they would not fit beside their prefix."""
    prefix_chars: int = 800
    """How far above a span an identifier counts as visible."""
    per_change: int = 4
    """Most spans of one file in one commit."""
    per_commit: int = 12
    """Most spans of one commit."""
    per_file: int = 6
    """Most spans of one file of a snapshot."""
    assertions_per_step: int = 1000
    """Most assertions of one step."""
    present_share: float = 0.25
    """Share of spans, at most, that need no identifier from elsewhere; they are the control."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of one file's text, in characters."""

    start: int
    end: int
    absent: int
    """Identifiers of the span that other files use and the text above it does not show."""


def identifiers(text: str) -> set[str]:
    """Return the names in a text that could belong to a repository: no keywords, no built-ins."""
    return set(_IDENTIFIER.findall(text)) - _COMMON


class KnownNames:
    """The names that lines of a repository have used so far, and whether in one file alone."""

    def __init__(self) -> None:
        self._file_of: dict[str, str | None] = {}

    def add(self, path: str, text: str) -> None:
        """Learn the names in some lines of a file."""
        for name in identifiers(text):
            if self._file_of.setdefault(name, path) != path:
                self._file_of[name] = None

    def n_absent(self, target: str, above: str, path: str) -> int:
        """Return how many names a target of a file needs that the text above it does not show.

        Only those count that another file has used.
        """
        unseen = identifiers(target) - identifiers(above)
        return sum(self._file_of.get(name, path) != path for name in unseen)


def added_runs(patch: str) -> list[tuple[int, int]]:
    """Return the stretches of added lines of one file's unified diff.

    Each is (first, last + 1), line numbers of the new file counted from zero. A line that says
    that there is no newline at the end does not end a stretch.
    """
    runs: list[tuple[int, int]] = []
    line_no, first = -1, -1
    for line in patch.split("\n"):
        hunk = _HUNK.match(line)
        if hunk:
            runs += [(first, line_no)] if first >= 0 else []
            # An empty new side is written +0,0; it adds nothing, so any number will do.
            line_no, first = int(hunk[1]) - 1, -1
        elif line_no < 0 or line.startswith("\\"):
            continue
        elif line.startswith("+"):
            first = line_no if first < 0 else first
            line_no += 1
        else:
            runs += [(first, line_no)] if first >= 0 else []
            first = -1
            line_no += not line.startswith("-")
    return [*runs, (first, line_no)] if first >= 0 else runs


def spans_of_lines(
    text: str,
    runs: Sequence[tuple[int, int]],
    counts: Mapping[str, int],
    counted: Collection[str],
    config: TargetConfig,
) -> list[Span]:
    """Return the runs as spans of the text, long ones cut, poor ones dropped.

    counts: identifier -> in how many files of the repository it occurs
    counted: the identifiers that this file itself contributed to `counts`
    """
    starts = _line_starts(text)
    spans = []
    for first, last in _cut(runs, len(starts) - 1, config.max_lines):
        start, end = starts[first], starts[last]
        body = text[start:end]
        if len(body) > config.max_chars or len("".join(body.split())) < config.min_chars:
            continue
        visible = identifiers(text[max(0, start - config.prefix_chars) : start])
        unseen = identifiers(body) - visible
        needed = {name for name in unseen if counts.get(name, 0) > (name in counted)}
        spans.append(Span(start, end, len(needed)))
    return spans


def blocks(text: str, *, max_lines: int) -> list[tuple[int, int]]:
    """Return a file's lines as runs of at most `max_lines`, ending at blank lines where it can."""
    lines = text.split("\n")
    lines = lines if lines[-1] else lines[:-1]
    runs, first = [], 0
    while first < len(lines):
        last = min(first + max_lines, len(lines))
        if last < len(lines):
            blanks = [i for i in range(first + max_lines // 2, last) if not lines[i].strip()]
            last = blanks[-1] + 1 if blanks else last
        runs.append((first, last))
        first = last
    return runs


def choose(spans: Sequence[Span], *, most: int, present_share: float, key: str) -> list[Span]:
    """Return at most `most` spans, those that need the repository before the others.

    The order within each kind is that of a hash of `key` and the position, so that the choice is
    fixed and favours no part of a file.
    """
    order = sorted(spans, key=lambda span: digest(f"{key}:{span.start}"))
    absent = [span for span in order if span.absent]
    present = [span for span in order if not span.absent]
    n_present = min(len(present), round(most * present_share))
    return [*absent[: most - n_present], *present[:n_present]]


def digest(key: str) -> bytes:
    """Return the bytes by which a fixed and even choice is ordered."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _line_starts(text: str) -> list[int]:
    """Character offsets of the lines, as git counts them, with the text's length at the end."""
    starts = [0]
    for line in text.split("\n")[:-1]:
        starts.append(starts[-1] + len(line) + 1)
    return starts if starts[-1] == len(text) else [*starts, len(text)]


def _cut(
    runs: Sequence[tuple[int, int]], n_lines: int, max_lines: int
) -> Iterator[tuple[int, int]]:
    for first, last in runs:
        last = min(last, n_lines)
        for start in range(first, last, max_lines):
            yield start, min(start + max_lines, last)
