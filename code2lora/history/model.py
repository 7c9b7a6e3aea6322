"""What git tells us, as plain values: commits, diffs, snapshots. `commit` is always a full hash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from code2lora.history.rules import FileRules


@dataclass(frozen=True, slots=True)
class Head:
    """Where a worktree stands."""

    commit: str | None
    """None on an unborn branch."""
    branch: str | None
    """Short name; None when detached."""


@dataclass(frozen=True, slots=True)
class Commit:
    """What we need of a commit object."""

    id: str
    parents: tuple[str, ...]
    """Empty for a root commit and for the boundary of a shallow clone."""
    committed_at_s: int
    """Committer time, seconds since the epoch."""
    author: str
    summary: str
    """First line of the message."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that changed or exists but is not read, and why."""

    path: str
    reason: str
    """One of: binary, too large, generated, vendored, lock file, minified, not source, submodule,
    symlink, lfs pointer, missing object, test, empty (snapshots only)."""


@dataclass(frozen=True, slots=True)
class FileChange:
    """One file's change from the base of a diff to its commit."""

    path: str
    old_path: str | None
    """Set for a rename, else None."""
    status: str
    """A, M, D or R."""
    added: str
    """Added lines without their `+`, each ending in a newline."""
    removed: str
    """Removed lines without their `-`, each ending in a newline."""
    patch: str
    """The file's unified diff as `git diff --no-color -U3` prints it, header lines included."""


@dataclass(frozen=True, slots=True)
class Diff:
    """What a commit changed against a base: its first parent, or an earlier commit."""

    commit: str
    parent: str | None
    """The base; None for the empty tree, which is what a root commit is compared with."""
    changes: tuple[FileChange, ...]
    """In path order; only files that count."""
    skipped: tuple[Skipped, ...]

    @property
    def unified(self) -> str:
        """The whole patch text, file after file."""
        return "".join(change.patch for change in self.changes)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a snapshot."""

    path: str
    blob: str
    """The blob's object id."""
    text: str


@dataclass(frozen=True, slots=True)
class FileVersions:
    """One changed file on both sides of a commit; a rename keeps them together."""

    before: SourceFile | None
    """At the first parent; None for a file that was added."""
    after: SourceFile | None
    """None for a file that was removed."""


@dataclass(frozen=True, slots=True)
class ChangedFiles:
    """Whole files that a commit changed against its first parent."""

    commit: str
    files: tuple[FileVersions, ...]
    """In path order; only files that count, and are readable, on both sides."""
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files that count at one commit, in path order."""

    commit: str
    files: tuple[SourceFile, ...]
    skipped: tuple[Skipped, ...]


class History(Protocol):
    """Read access to one worktree of a repository; what every backend offers.

    Methods that take a commit raise UserError when its objects are missing (partial or damaged
    clone).
    """

    @property
    def git_dir(self) -> Path:
        """This worktree's git directory."""

    @property
    def common_dir(self) -> Path:
        """The git directory that all worktrees share."""

    @property
    def worktree(self) -> Path | None:
        """The working tree's root; None in a bare repository."""

    def head(self) -> Head:
        """Return where HEAD points now."""

    def resolve(self, revision: str) -> str:
        """Return the full commit hash that a revision names. Raises UserError if there is none."""

    def commit(self, commit: str) -> Commit:
        """Return one commit."""

    def is_shallow_boundary(self, commit: str) -> bool:
        """Tell whether the commit has parents that this shallow clone lacks."""

    def first_parents(self, start: str, *, limit: int | None = None) -> Iterator[Commit]:
        """Yield `start` and its first-parent ancestors, newest first."""

    def diff(self, commit: str, rules: FileRules) -> Diff:
        """Return what the commit changed against its first parent, renames detected.

        A shallow boundary has an empty diff: its parent is unknown.
        """

    def diff_between(self, base: str | None, commit: str, rules: FileRules) -> Diff:
        """Return what changed from one commit to another, whether or not they are related.

        base: None for the empty tree.
        """

    def changed_files(
        self, commit: str, rules: FileRules, wanted: Callable[[str], bool]
    ) -> ChangedFiles:
        """Return the files with a wanted path that the commit changed against its first parent.

        Renames are looked for among wanted paths alone. A shallow boundary changes nothing: its
        parent is unknown.
        """

    def snapshot(self, commit: str, rules: FileRules) -> Snapshot:
        """Return the files that count at a commit."""

    def close(self) -> None:
        """Release file handles and helper processes."""
