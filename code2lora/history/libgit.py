"""Find a repository and read its objects in-process: packs and references through libgit2.

Nothing here ever touches the network. Loose objects are inflated by `loose`, because libgit2 1.9
never returns from a truncated one. It reads neither sha256 nor reftable repositories;
`open_history` turns to the git command for those.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pygit2
from pygit2.enums import ObjectType, ReferenceType

from code2lora.history.gitcommand import resolve_revision
from code2lora.history.loose import LooseObjects, object_folders
from code2lora.history.model import Head
from code2lora.history.objects import Kind, common_dir_of, damaged_object, unreadable_reference

_KINDS = {ObjectType.COMMIT: "commit", ObjectType.TREE: "tree", ObjectType.BLOB: "blob"}

# libgit2's failures on a damaged pack arrive as any of these.
_UNREADABLE = (pygit2.GitError, ValueError, OSError)


class CannotOpen(Exception):
    """libgit2 does not open this repository; the message says why, in its words."""


class LibgitSource:
    """Objects and references of one worktree."""

    backend = "pygit2"

    def __init__(self, path: Path) -> None:
        """Open the repository that holds `path`. Raises CannotOpen."""
        try:
            self._repository = pygit2.Repository(str(path))
            if self._repository.references.get("HEAD") is None:
                raise CannotOpen("there is no HEAD")
        except (pygit2.GitError, KeyError, ValueError) as error:
            raise CannotOpen(str(error)) from error
        self.git_dir = Path(self._repository.path).resolve()
        self.worktree = self._worktree()
        self._open_objects()

    def _worktree(self) -> Path | None:
        root = self._repository.workdir
        if root is None:
            return None
        # A git directory that was opened by itself: libgit2 takes any parent for the working tree.
        by_guess = Path(root).resolve() == self.git_dir.parent and self.git_dir.name != ".git"
        if by_guess and "core.worktree" not in self._repository.config:
            return None
        return Path(root).resolve()

    def _open_objects(self) -> None:
        folders = object_folders(common_dir_of(self.git_dir) / "objects")
        self._loose = LooseObjects(folders)
        self._packs = pygit2.Odb()
        for folder in folders:
            self._packs.add_backend(pygit2.OdbBackendPack(str(folder)), 1)

    def head(self) -> Head:
        """Return where HEAD points now."""
        name = "HEAD"
        try:
            while True:
                reference = self._repository.references.get(name)
                if reference is None or reference.type == ReferenceType.DIRECT:
                    break
                name = str(reference.target)
        except (pygit2.GitError, ValueError) as error:
            raise unreadable_reference(name, str(error)) from error
        branch = None if name == "HEAD" else name.removeprefix("refs/heads/")
        return Head(None if reference is None else str(reference.target), branch)

    def resolve(self, revision: str) -> str | None:
        """Return the id of the commit that a revision names, or None."""
        return resolve_revision(self.git_dir, revision)

    def read(self, id: str, kind: Kind) -> bytes | None:
        """Return an object's content, or None if the repository lacks it."""
        found = self._loose.read(id) or self._read_packed(id, kind)
        if found is None:
            return None
        if found[0] != kind:
            raise damaged_object(id, kind, f"it is a {found[0]}")
        return found[1]

    def _read_packed(self, id: str, kind: Kind) -> tuple[str, bytes] | None:
        try:
            return _read(self._packs, id)
        except KeyError:
            return None
        except _UNREADABLE:
            # A pack that was known and not yet open may have been replaced by `git gc`.
            self._open_objects()
        try:
            return _read(self._packs, id)
        except KeyError:
            return self._loose.read(id)
        except _UNREADABLE as error:
            detail = str(error).removeprefix(f"{id}: ")
            raise damaged_object(id, kind, detail) from error

    def sizes(self, ids: Sequence[str]) -> list[int | None]:
        """Return the sizes in bytes without reading the contents, None for what is lacking."""
        return [self._size(id) for id in ids]

    def _size(self, id: str) -> int | None:
        size = self._loose.size(id)
        if size is not None:
            return size
        try:
            return self._packs.read_header(id)[1]
        except KeyError:
            return None
        except _UNREADABLE:
            content = self.read(id, "blob")
            return None if content is None else len(content)

    def close(self) -> None:
        """Release file handles."""
        self._packs = pygit2.Odb()
        self._repository.free()


def _read(packs: pygit2.Odb, id: str) -> tuple[str, bytes]:
    type, content = packs.read(id)
    return _KINDS.get(type, "tag"), content
