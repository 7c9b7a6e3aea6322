"""Rebuild the files that a model was told: the snapshot at an anchor and every patch after it.

Retrieval reads these, so that it knows exactly what an adapter of the same commit was made from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from code2lora.training.data.dataset import Change, RepositoryData
from code2lora.training.data.shards import Rows

_HUNK = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+\d+(?:,\d+)? @@")


def told_texts(
    data: RepositoryData, changes: Rows, anchor: int, last: int, held_out: frozenset[str]
) -> dict[str, str]:
    """Return path -> text of the told files as they are at a commit.

    changes: the shard's table `changes`   anchor: the snapshot that telling begins with
    held_out: paths of the snapshot that are not told, under whatever name they get later
    A file that a patch does not fit is left out from there on, until a snapshot has it again.
    """
    nearest = max((each for each in data.anchors if anchor <= each <= last), default=None)
    if nearest is None:
        return {}
    for index in range(anchor + 1, nearest + 1):
        held_out = data.follow(index, held_out)
    found = {file.path: data.texts[file.text] for file in data.told_files(nearest, held_out)}
    if data.opens_at(nearest):
        # The first diff may tell files that are in no snapshot, by rules of its own.
        _apply(found, changes, data.changes(nearest, data.hidden_paths(nearest, held_out)))
    for index in range(nearest + 1, last + 1):
        held_out = data.follow(index, held_out)
        _apply(found, changes, data.changes(index, held_out))
    return found


def _apply(found: dict[str, str], changes: Rows, told: Sequence[Change]) -> None:
    for change in told:
        before = found.pop(change.old_path or change.path, None)
        if changes["status"][change.row] == "A":
            before = ""
        elif changes["status"][change.row] == "D":
            before = None
        if before is not None:
            after = apply_patch(before, changes["patch"][change.row])
            if after is not None:
                found[change.path] = after


def apply_patch(text: str, patch: str) -> str | None:
    """Return a text after a unified diff of one file, or None where the diff does not fit it."""
    old = text.split("\n")
    new: list[str] = []
    at = 0  # lines of the old text that are behind us
    ends_bare: dict[str, bool] = {}
    last_sign = ""
    for line in _hunk_lines(patch):
        hunk = _HUNK.match(line)
        if hunk:
            first = int(hunk[1]) - (hunk[2] != "0")
            new += old[at:first]
            at = first
        elif line.startswith("\\"):
            ends_bare.update(dict.fromkeys("+-" if last_sign == " " else last_sign, True))
        else:
            last_sign = line[:1]
            if last_sign != "+":
                if at >= len(old) or old[at] != line[1:]:
                    return None
                at += 1
            if last_sign != "-":
                new.append(line[1:])
    # What is left is an empty last line, unless one side ends without a newline.
    new += old[at:]
    if ends_bare.get("-") and not ends_bare.get("+"):
        new.append("")
    if ends_bare.get("+") and new and new[-1] == "" and not ends_bare.get("-"):
        new.pop()
    return "\n".join(new)


def _hunk_lines(patch: str) -> list[str]:
    """Return the lines of a patch from its first hunk on."""
    lines = patch.split("\n")
    first = next((i for i, line in enumerate(lines) if _HUNK.match(line)), len(lines))
    return [line for line in lines[first:] if line]
