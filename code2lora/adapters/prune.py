"""Look after adapter directories that are there: tell whole ones, delete old ones. No torch."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from code2lora.adapters.layout import TEMPORARY_PREFIX, WEIGHTS_FILE
from code2lora.errors import UserError

_NAME = re.compile(r"[0-9a-f]{12}-[0-9a-f]{12}")


def prune(paths: Iterable[Path], root: Path) -> list[Path]:
    """Delete published adapters and return those that were there.

    Each is renamed first, so that it vanishes whole. Paths come from a database that others may
    have written: one that is not an adapter directory right below `root`, or that leads through
    a symlink, raises UserError before anything is deleted.
    """
    chosen = list(paths)
    for path in chosen:
        _check(path, root)
    removed = []
    for path in chosen:
        aside = path.parent / (TEMPORARY_PREFIX + secrets.token_hex(8))
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"cannot remove {path}: {error.strerror}") from error
        shutil.rmtree(aside, ignore_errors=True)  # the sweep takes what is left
        removed.append(path)
    return removed


def sweep_temporary(root: Path) -> list[Path]:
    """Remove what killed publishers and pruners left behind, and return it.

    Only for the one process that publishes, before it does: a publisher at work has one too.
    """
    found = [path for path in root.glob(f"*/{TEMPORARY_PREFIX}*") if not path.is_symlink()]
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return found


def is_whole(path: Path, n_bytes: int) -> bool:
    """Tell whether an adapter directory is there with all its weights."""
    try:
        return (path / WEIGHTS_FILE).stat().st_size == n_bytes
    except OSError:
        return False


def is_intact(path: Path, sha256: str) -> bool:
    """Tell whether an adapter directory is there with exactly the weights it was published with."""
    try:
        with (path / WEIGHTS_FILE).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == sha256
    except OSError:
        return False


def _check(path: Path, root: Path) -> None:
    inside = (
        path.is_absolute()
        and ".." not in path.parts
        and _NAME.fullmatch(path.name)
        and path.parent.parent == root
    )
    if not inside:
        raise UserError(f"{path} is not an adapter directory of {root}, so it is not removed")
    if path.is_symlink() or path.parent.is_symlink():
        raise UserError(f"{path} leads through a symlink, so it is not removed")
