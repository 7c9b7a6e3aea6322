"""Copy a published adapter to a place of the user's choosing."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from code2lora.adapters.layout import FILES, TEMPORARY_PREFIX, read_metadata
from code2lora.errors import UserError

FORMATS = ("peft",)


def export(path: Path, destination: Path, format: str = "peft") -> Path:
    """Copy an adapter directory to `destination`, which must not exist yet, and return it.

    It appears whole or not at all. Raises UserError when the format is unknown, the adapter is
    not one of ours, or the destination exists or cannot be written.
    """
    if format not in FORMATS:
        raise UserError(f"the format is {format!r}, expected one of: {', '.join(FORMATS)}")
    read_metadata(path)
    if os.path.lexists(destination):
        raise UserError(f"{destination} exists already", hint="name a new directory")
    try:
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=destination.parent))
        try:
            for name in FILES:
                shutil.copyfile(path / name, temporary / name)
            os.rename(temporary, destination)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {destination}: {error.strerror}") from error
    return destination
