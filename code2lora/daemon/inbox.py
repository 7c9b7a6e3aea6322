"""Turn the lines that hooks appended into pokes.

Reads and writes `<state dir>/inbox`. Hooks append to the file `pokes`; draining renames it away
first, so a line is appended either to the file being read or to the next one. A line that a kill
left in a renamed file is read at the next start: pokes are hints, so reading one twice is harmless.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

POKES = "pokes"
_DRAINED = "drained-"
_LATE_WRITER_S = 0.02


@dataclass(frozen=True, slots=True)
class Poke:
    """A hint that something happened in a repository."""

    event: str
    """A git hook's name, or a word of our own such as `refresh`."""
    directory: Path
    """Where git ran the hook: the top of the worktree, or a bare repository."""
    git_dir: Path | None = None
    """GIT_DIR as the hook saw it, made absolute; unset in an ordinary main worktree."""


def poke(inbox: Path, event: str, directory: Path) -> None:
    """Append one line, as a hook would. Raises OSError when the inbox cannot be written."""
    line = f"{event}\t{directory}\t\n".encode()
    descriptor = os.open(inbox / POKES, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def drain(inbox: Path) -> list[Poke]:
    """Take every waiting poke out of the inbox, oldest first, equal ones once."""
    waiting = inbox / POKES
    if waiting.exists():
        os.replace(waiting, inbox / f"{_DRAINED}{time.time_ns()}")
        # A hook that opened the file before the rename writes within its next system call.
        time.sleep(_LATE_WRITER_S)
    found: dict[Poke, None] = {}
    for path in sorted(inbox.glob(f"{_DRAINED}*")):
        try:
            content = path.read_bytes()
            path.unlink()
        except OSError as error:  # such as one that another user's hook has made
            log.warning("%s cannot be read: %s", path, error.strerror)
            continue
        for line in content.decode("utf-8", "surrogateescape").splitlines():
            parsed = _parse(line)
            if parsed is not None:
                found[parsed] = None
    return list(found)


def _parse(line: str) -> Poke | None:
    """Return the poke in a line; None for what a torn or foreign write left."""
    fields = line.split("\t")
    if len(fields) != 3 or "\0" in line or not os.path.isabs(fields[1]):
        return None
    event, directory, git_dir = fields
    absolute = Path(directory, git_dir) if git_dir else None
    return Poke(event=event, directory=Path(directory), git_dir=absolute)
