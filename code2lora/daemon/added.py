"""Find what a commit wrote: stretches of added lines, each with the text that stands above it.

Reads   git: the commit's diff, and its version of the files that are asked about.

What a stretch is follows the spans that hypernetworks are trained on (`training.data.targets`), but
none is preferred to another: a score is to be that of all that was written. Torch-free.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from code2lora.history.model import History
from code2lora.history.rules import FileRules

MAX_ROWS = 12
"""Stretches of one commit; of more, those whose digests come first."""

_MAX_LINES = 24
_MIN_CHARS = 24
"""Non-space characters; a shorter stretch says little."""
_MAX_CHARS = 1600
_ABOVE_CHARS = 2400
_HUNK = re.compile(r"@@ -\d+(?:,\d+)? \+(\d+)(?:,\d+)? @@")


@dataclass(frozen=True, slots=True)
class AddedRow:
    """A stretch of lines that a commit added to one file."""

    path: str
    line: int
    """Of the file at the commit, from zero."""
    above: str
    """What stands before it there, its beginning left out where it is long."""
    text: str


def added_rows(history: History, commit: str, rules: FileRules) -> list[AddedRow]:
    """Return the stretches that a commit added, in the order of the files; at most MAX_ROWS.

    Raises UserError when objects are missing.
    """
    changes = history.diff(commit, rules).changes
    found = [
        (change.path, line, text)
        for change in changes
        for line, text in _stretches(added_runs(change.patch))
    ]
    chosen = _choose(found)
    paths = {path for path, _, _ in chosen}
    changed = history.changed_files(commit, rules, paths.__contains__) if paths else None
    files = {f.after.path: f.after.text for f in (changed.files if changed else ()) if f.after}
    rows = [_row(path, line, text, files.get(path)) for path, line, text in chosen]
    return [row for row in rows if row is not None]


def rows_digest(rows: Iterable[AddedRow]) -> str:
    """Return the hex sha256 of what is asked; what stands around it does not count.

    So a patch that was rebased is known again.
    """
    digest = hashlib.sha256()
    for row in rows:
        for part in (row.path, row.text):
            content = part.encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def added_runs(patch: str) -> list[tuple[int, list[str]]]:
    """Return the runs of added lines of one file's unified diff.

    Each is its first line's number in the new file, from zero, and the lines without line ends.
    """
    runs: list[tuple[int, list[str]]] = []
    number, run = -1, None
    for line in patch.split("\n"):
        hunk = _HUNK.match(line)
        if hunk:
            number, run = int(hunk[1]) - 1, None
        elif number < 0 or line.startswith("\\"):
            continue  # the header, or the remark that a file does not end in a newline
        elif line.startswith("+"):
            if run is None:
                run = (number, list[str]())
                runs.append(run)
            run[1].append(line[1:])
            number += 1
        else:
            run = None
            number += not line.startswith("-")
    return runs


def _stretches(runs: Sequence[tuple[int, list[str]]]) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of the runs, long ones cut, poor ones left out."""
    for first, lines in runs:
        for start in range(0, len(lines), _MAX_LINES):
            text = "".join(f"{line}\n" for line in lines[start : start + _MAX_LINES])
            if len("".join(text.split())) >= _MIN_CHARS:
                yield first + start, text


def _choose(found: Sequence[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    """Return a fixed and even choice of at most MAX_ROWS, in the order given."""
    if len(found) <= MAX_ROWS:
        return list(found)
    order = sorted(range(len(found)), key=lambda i: _order(*found[i]))
    return [found[i] for i in sorted(order[:MAX_ROWS])]


def _order(path: str, line: int, text: str) -> bytes:
    return hashlib.sha256(f"{path}:{line}:{text}".encode("utf-8", "surrogatepass")).digest()


def _row(path: str, line: int, text: str, file: str | None) -> AddedRow | None:
    """Return the row where the file at the commit has it; None where the two do not agree."""
    if file is None:
        return None
    start = _offset(file, line)
    if start is None or not (file[start:] + "\n").startswith(text):
        return None
    above = file[max(0, start - _ABOVE_CHARS) : start]
    return AddedRow(path, line, above, text[:_MAX_CHARS])


def _offset(file: str, line: int) -> int | None:
    """Return where a line begins; None where there are not so many."""
    at = 0
    for _ in range(line):
        at = file.find("\n", at) + 1
        if at == 0:
            return None
    return at
