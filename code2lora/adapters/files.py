"""Put a new file or directory in its place whole, or not at all.

What is under way has a `.tmp-*` name beside its destination; it is renamed once it is on the disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from code2lora.adapters.layout import TEMPORARY_PREFIX
from code2lora.errors import UserError


@contextmanager
def placed_file(destination: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield the path under which to write a file, and rename it to `destination` in the end.

    The file is 0600. force: replace a file that is there.
    Raises UserError when there is something already that may not be replaced, or it cannot be
    written.
    """
    if os.path.lexists(destination) and not (force and destination.is_file()):
        raise _taken(destination, "a new file", force=destination.is_file())
    with _readable_errors(destination):
        descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=destination.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, destination)
            sync(destination.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def placed_directory(
    destination: Path, *, force: bool = False, replaceable: Collection[str] = ()
) -> Iterator[Path]:
    """Yield the directory in which to write, and rename it to `destination` in the end.

    It is 0700. force: replace a directory that is there, if it holds nothing but files that are
    named in `replaceable`.
    Raises UserError when there is something already that may not be replaced, or it cannot be
    written.
    """
    if os.path.lexists(destination):
        ours = _holds_only(destination, replaceable)
        if not (force and ours):
            raise _taken(destination, "a new directory", force=ours)
    with _readable_errors(destination):
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=destination.parent))
        try:
            yield temporary
            for file in temporary.iterdir():
                sync(file)
            sync(temporary)
            _replace_directory(temporary, destination)
            sync(destination.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(_aside(temporary), ignore_errors=True)


def new_file(path: Path) -> BinaryIO:
    """Open a file that is not there yet, for the user's eyes alone."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_directory(temporary: Path, destination: Path) -> None:
    if not os.path.lexists(destination):
        os.rename(temporary, destination)
        return
    os.rename(destination, _aside(temporary))
    try:
        os.rename(temporary, destination)
    except OSError:
        os.rename(_aside(temporary), destination)
        raise


def _aside(temporary: Path) -> Path:
    return temporary.with_name(f"{temporary.name}.old")


def _holds_only(path: Path, names: Collection[str]) -> bool:
    """Tell whether a directory is one that an earlier export wrote."""
    if path.is_symlink() or not path.is_dir():
        return False
    with os.scandir(path) as entries:
        return all(e.name in names and e.is_file(follow_symlinks=False) for e in entries)


def _taken(destination: Path, what: str, *, force: bool) -> UserError:
    return UserError(
        f"{destination} exists already",
        hint=f"name {what}" + (", or add `--force`" if force else ""),
    )


@contextmanager
def _readable_errors(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {destination}: {error.strerror or error}") from error
