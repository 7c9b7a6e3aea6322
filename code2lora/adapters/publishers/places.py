"""Push into a directory: a new entry for each generation, and the oldest ones go.

Entries are named NAME-GENERATION-COMMIT-DIGEST. What is named otherwise is never touched. They are
as readable as the directory that they are put into.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from code2lora.adapters.export import export
from code2lora.adapters.layout import TEMPORARY_PREFIX
from code2lora.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A published adapter that is to be pushed."""

    path: Path
    """Its directory."""
    number: int
    commit: str
    sha256: str
    """Of the weights."""
    base_dir: Path
    """The base model that it is for."""

    def entry(self, name: str) -> str:
        """Return what a copy of it is called."""
        return f"{name}-{self.number:08d}-{self.commit[:12]}-{self.sha256[:12]}"


def place(generation: Generation, folder: Path, name: str, format: str) -> Path:
    """Copy a generation into a directory and return the copy, which is whole or not there.

    The directory is made, but not what is above it. Raises UserError when it cannot be written.
    """
    copy = folder / (generation.entry(name) + (".gguf" if format == "gguf" else ""))
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        mode = folder.stat().st_mode
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error
    if os.path.lexists(copy):
        return copy
    export(generation.path, copy, format, base_dir=generation.base_dir)
    _open_up(copy, mode)
    return copy


def prune_copies(folder: Path, name: str, *, keep: int, current: Path) -> list[Path]:
    """Delete the oldest copies beyond `keep`, never the current one, and return them."""
    pattern = re.compile(re.escape(name) + r"-\d{8,}-[0-9a-f]{12}-[0-9a-f]{12}(\.gguf)?")
    copies = [
        path
        for path in folder.iterdir()
        if pattern.fullmatch(path.name) and path != current and not path.is_symlink()
    ]
    copies.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    old = copies[max(keep - 1, 0) :]
    for path in old:
        _remove(path)
    return old


def _remove(path: Path) -> None:
    """Remove a copy so that nobody sees half of it."""
    aside = path.with_name(TEMPORARY_PREFIX + secrets.token_hex(8))
    os.rename(path, aside)
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)


def _open_up(copy: Path, mode: int) -> None:
    """Let those who can read the directory read the copy."""
    if copy.is_dir():
        for file in copy.iterdir():
            file.chmod(mode & 0o644 | 0o600)
        copy.chmod(mode & 0o755 | 0o700)
    else:
        copy.chmod(mode & 0o644 | 0o600)
