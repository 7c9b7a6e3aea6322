"""A repository's objects into commits, diffs and snapshots, the same whatever the backend.

An instance serves one thread at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from code2lora.errors import UserError
from code2lora.history.attributes import MAX_FILE_BYTES, Attributes, parse_attributes
from code2lora.history.diffs import diff_files, file_versions
from code2lora.history.model import ChangedFiles, Commit, Diff, Head, Snapshot
from code2lora.history.objects import (
    ObjectSource,
    RawCommit,
    common_dir_of,
    missing_object,
    parse_commit,
    show_path,
    tree_changes,
)
from code2lora.history.rules import FileRules
from code2lora.history.snapshots import snapshot_files

_FULL_ID = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_ROOT_ATTRIBUTES = re.compile(rb"100\d{3} \.gitattributes\0")


class GitHistory:
    """The history of one worktree, read through an object source."""

    def __init__(self, source: ObjectSource) -> None:
        self._source = source
        self._common_dir = common_dir_of(source.git_dir)

    @property
    def backend(self) -> str:
        """`pygit2` or `git`."""
        return self._source.backend

    @property
    def git_dir(self) -> Path:
        """This worktree's git directory."""
        return self._source.git_dir

    @property
    def common_dir(self) -> Path:
        """The git directory that all worktrees share."""
        return self._common_dir

    @property
    def worktree(self) -> Path | None:
        """The working tree's root; None in a bare repository."""
        return self._source.worktree

    def head(self) -> Head:
        """Return where HEAD points now."""
        return self._source.head()

    def resolve(self, revision: str) -> str:
        """Return the full commit hash that a revision names. Raises UserError if there is none."""
        usable = bool(revision.strip()) and not set(revision) & set("\0\n\r")
        found = self._source.resolve(revision) if usable else None
        if found is None:
            raise UserError(
                f"{revision!r} names no commit of {self.worktree or self.git_dir}",
                hint="`git log --oneline` lists commits; a shallow or partial clone lacks some",
            )
        return found

    def commit(self, commit: str) -> Commit:
        """Return one commit."""
        return self._load(commit, self._shallow()).commit

    def is_shallow_boundary(self, commit: str) -> bool:
        """Tell whether the commit has parents that this shallow clone lacks."""
        return commit in self._shallow() and bool(self._raw(commit).commit.parents)

    def first_parents(self, start: str, *, limit: int | None = None) -> Iterator[Commit]:
        """Yield `start` and its first-parent ancestors, newest first."""
        shallow = self._shallow()
        next_id: str | None = start
        n_yielded = 0
        while next_id is not None and n_yielded != limit:
            found = self._load(next_id, shallow).commit
            yield found
            next_id = found.parents[0] if found.parents else None
            n_yielded += 1

    def diff(self, commit: str, rules: FileRules) -> Diff:
        """Return what the commit changed against its first parent, renames detected.

        A shallow boundary has an empty diff: its parent is unknown.
        """
        if self.is_shallow_boundary(commit):
            return Diff(commit, None, (), ())
        return self.diff_between(self._first_parent(commit), commit, rules)

    def diff_between(self, base: str | None, commit: str, rules: FileRules) -> Diff:
        """Return what changed from one commit to another, whether or not they are related.

        base: None for the empty tree.
        """
        old_tree = None if base is None else self._raw(base).tree
        new_tree = self._raw(commit).tree
        found = tree_changes(self._source, old_tree, new_tree)
        attributes = self._attributes(new_tree, rules)
        changes, skipped = diff_files(self._source, found, rules, attributes)
        return Diff(commit, base, changes, skipped)

    def changed_files(
        self, commit: str, rules: FileRules, wanted: Callable[[str], bool]
    ) -> ChangedFiles:
        """Return the files with a wanted path that the commit changed against its first parent.

        Renames are looked for among wanted paths alone. A shallow boundary changes nothing: its
        parent is unknown.
        """
        if self.is_shallow_boundary(commit):
            return ChangedFiles(commit, (), ())
        parent, new_tree = self._first_parent(commit), self._raw(commit).tree
        old_tree = None if parent is None else self._raw(parent).tree
        changed = tree_changes(self._source, old_tree, new_tree)
        found = [change for change in changed if wanted(show_path(change.path))]
        attributes = self._attributes(new_tree, rules)
        files, skipped = file_versions(self._source, found, rules, attributes)
        return ChangedFiles(commit, files, skipped)

    def snapshot(self, commit: str, rules: FileRules) -> Snapshot:
        """Return the files that count at a commit, the empty ones left out."""
        tree = self._raw(commit).tree
        found = tree_changes(self._source, None, tree)
        attributes = self._attributes(tree, rules)
        files, skipped = snapshot_files(self._source, found, rules, attributes)
        return Snapshot(commit, files, skipped)

    def close(self) -> None:
        """Release file handles and helper processes."""
        self._source.close()

    def _raw(self, id: str) -> RawCommit:
        if not _FULL_ID.fullmatch(id):
            raise UserError(f"{id!r} is not a full commit hash", hint="`git rev-parse REVISION`")
        content = self._source.read(id, "commit")
        if content is None:
            raise missing_object(id, "commit")
        return parse_commit(id, content)

    def _first_parent(self, commit: str) -> str | None:
        parents = self._raw(commit).commit.parents
        return parents[0] if parents else None

    def _load(self, id: str, shallow: frozenset[str]) -> RawCommit:
        raw = self._raw(id)
        return replace(raw, commit=replace(raw.commit, parents=())) if id in shallow else raw

    def _shallow(self) -> frozenset[str]:
        """Return the commits whose parents were not cloned; read anew, as a fetch moves them."""
        try:
            return frozenset((self._common_dir / "shallow").read_text("ascii").split())
        except FileNotFoundError:
            return frozenset()

    def _attributes(self, tree: str, rules: FileRules) -> Attributes:
        if not rules.honour_attributes:
            return Attributes()
        root = self._source.read(tree, "tree") or b""
        match = _ROOT_ATTRIBUTES.search(root)
        if match is None:
            return Attributes()
        id = root[match.end() : match.end() + len(tree) // 2].hex()
        size = self._source.sizes([id])[0]
        if size is None or size > MAX_FILE_BYTES:
            return Attributes()
        return parse_attributes(self._source.read(id, "blob") or b"")
