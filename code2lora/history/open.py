"""Open the history of the repository that holds a path, with the backend that can read it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from code2lora.errors import UserError
from code2lora.history.command import CommandSource
from code2lora.history.libgit import CannotOpen, LibgitSource
from code2lora.history.objects import ObjectSource
from code2lora.history.reader import GitHistory

Backend = Literal["pygit2", "git"]


def open_history(path: Path | str, *, backend: Backend | None = None) -> GitHistory:
    """Return the history of the repository that holds `path`; close it when done.

    path: a folder or file in a working tree, a git directory, or a bare repository
    backend: None takes pygit2, and the git command for what libgit2 does not open

    Raises UserError when there is no repository, or none that git reads: damaged, owned by
    someone else, or of a format that is newer than the installed git.
    """
    place = Path(path).absolute()
    if not place.exists():
        raise UserError(f"there is no {place}", hint="give the path of a git repository")
    if not place.is_dir():
        place = place.parent
    return GitHistory(_source(place, backend))


def _source(place: Path, backend: Backend | None) -> ObjectSource:
    if backend == "git":
        return CommandSource(place)
    try:
        return LibgitSource(place)
    except CannotOpen as error:
        if backend is None:
            # Whatever libgit2 objects to, git is the authority; and it says why in known words.
            return CommandSource(place)
        raise UserError(
            f"libgit2 cannot read the repository at {place}: {error}",
            hint="leave the choice of the backend to the program",
        ) from error
