"""Raw git objects into values: commits, and the entries in which two trees differ.

An `ObjectSource` only finds a repository and hands out bytes; everything that is made of those
bytes is made here and in the modules that use this one, so every backend gives the same results.
Ids are lower-case hex of 40 or 64 digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from code2lora.errors import UserError
from code2lora.history.model import Commit, Head

Kind = Literal["commit", "tree", "blob"]

MAX_TREE_ENTRIES = 2_000_000
"""Trees read plus files found in one walk; a few small objects can unfold to any number."""

_SUMMARY_BYTES = 1_000
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_COMMITTER_TIME = re.compile(rb"> ?(-?\d{1,18})(?: |$)")
_TREE_ENTRY = {
    40: re.compile(rb"([0-7]+) ([^\0]+)\0(.{20})", re.DOTALL),
    64: re.compile(rb"([0-7]+) ([^\0]+)\0(.{32})", re.DOTALL),
}


class ObjectSource(Protocol):
    """Where one worktree's objects and references come from."""

    @property
    def backend(self) -> str:
        """`pygit2` or `git`."""

    @property
    def git_dir(self) -> Path:
        """This worktree's git directory, symbolic links resolved."""

    @property
    def worktree(self) -> Path | None:
        """The working tree's root, symbolic links resolved; None in a bare repository."""

    def head(self) -> Head:
        """Return where HEAD points now."""

    def resolve(self, revision: str) -> str | None:
        """Return the id of the commit that a revision names, or None."""

    def read(self, id: str, kind: Kind) -> bytes | None:
        """Return an object's content, or None if the repository lacks it; never fetches.

        Raises UserError when it is damaged or of another kind.
        """

    def sizes(self, ids: Sequence[str]) -> list[int | None]:
        """Return the sizes in bytes without reading the contents, None for what is lacking."""

    def close(self) -> None:
        """Release file handles and helper processes."""


class Entry(NamedTuple):
    """One side of a file."""

    mode: int
    """100644, 100755, 120000 (symlink) or 160000 (submodule), all octal."""
    id: str

    @property
    def is_file(self) -> bool:
        """Tell a regular file from a symlink or a submodule."""
        return self.mode in (0o100644, 0o100755)


@dataclass(frozen=True, slots=True)
class TreeChange:
    """One path in which two trees differ; `old` or `new` is None where it is not a file."""

    path: bytes
    old: Entry | None
    new: Entry | None


@dataclass(frozen=True, slots=True)
class RawCommit:
    """A commit object: what the model shows of it, with its real parents, and its tree."""

    commit: Commit
    tree: str


def common_dir_of(git_dir: Path) -> Path:
    """Return the git directory that all worktrees share, from that of one of them."""
    try:
        named = (git_dir / "commondir").read_text("utf-8", "surrogateescape").rstrip("\n")
    except FileNotFoundError:
        return git_dir
    return (git_dir / named).resolve()


def show_path(path: bytes) -> str:
    """Return a path as text; bytes that are not UTF-8 become U+FFFD."""
    return path.decode("utf-8", "replace")


def link_reason(entry: Entry) -> str:
    """Return why an entry that is not a regular file is skipped."""
    return "submodule" if entry.mode == 0o160000 else "symlink"


def parse_commit(id: str, content: bytes) -> RawCommit:
    """Return what a commit object says. Raises UserError when it is malformed."""
    headers, _, message = content.partition(b"\n\n")
    parents: list[str] = []
    fields: dict[bytes, bytes] = {}
    for line in headers.split(b"\n"):
        key, _, value = line.partition(b" ")
        if key == b"parent":
            parents.append(value.decode("ascii", "replace"))
        else:
            fields.setdefault(key, value)
    tree = fields.get(b"tree", b"").decode("ascii", "replace")
    if len(tree) != len(id):
        raise UserError(f"commit {id} is malformed", hint="`git fsck` names what is broken")
    encoding = fields.get(b"encoding", b"utf-8")
    time = _COMMITTER_TIME.search(fields.get(b"committer", b""))
    commit = Commit(
        id=id,
        parents=tuple(parents),
        committed_at_s=int(time.group(1)) if time else 0,
        author=_plain(fields.get(b"author", b"").rpartition(b" <")[0], encoding),
        summary=_plain(message.lstrip(b"\n").partition(b"\n")[0], encoding),
    )
    return RawCommit(commit, tree)


def _plain(text: bytes, encoding: bytes) -> str:
    """Decode one line, without the control characters that a terminal would act on."""
    cut = text[:_SUMMARY_BYTES]
    try:
        decoded = cut.decode(encoding.decode("ascii"), "replace")
    except (LookupError, ValueError):
        decoded = cut.decode("utf-8", "replace")
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", decoded).strip()


def tree_changes(
    source: ObjectSource, old_tree: str | None, new_tree: str | None
) -> list[TreeChange]:
    """Return where two trees differ, in path order; None is the empty tree. No renames.

    A path that turns from a file into a symlink or a submodule is a removal and an addition.
    Raises UserError when a tree is missing.
    """
    changes: list[TreeChange] = []
    waiting = [(b"", old_tree, new_tree)]
    n_read = 0
    while waiting:
        folder, old_id, new_id = waiting.pop()
        n_read += 1
        if n_read + len(changes) > MAX_TREE_ENTRIES:
            raise UserError(f"a tree with more than {MAX_TREE_ENTRIES:,} entries is not read")
        old, new = _read_tree(source, old_id), _read_tree(source, new_id)
        gone = {name: (mode, id) for mode, name, id in old - new}
        come = {name: (mode, id) for mode, name, id in new - old}
        for name in gone.keys() | come.keys():
            before, after = gone.get(name), come.get(name)
            path = folder + name
            subtrees = _subtree(before), _subtree(after)
            if any(subtrees):
                waiting.append((path + b"/", *subtrees))
            changes.extend(_split(path, _entry(before), _entry(after)))
    changes.sort(key=lambda change: (change.path, change.old is None))
    return changes


_RawEntry = tuple[bytes, bytes]


def _read_tree(source: ObjectSource, id: str | None) -> set[tuple[bytes, bytes, bytes]]:
    if id is None:
        return set()
    content = source.read(id, "tree")
    if content is None:
        raise missing_object(id, "tree")
    return set(_TREE_ENTRY[len(id)].findall(content))


def _subtree(entry: _RawEntry | None) -> str | None:
    return entry[1].hex() if entry is not None and int(entry[0], 8) == 0o40000 else None


def _entry(entry: _RawEntry | None) -> Entry | None:
    if entry is None:
        return None
    mode = int(entry[0], 8)
    kind = mode & 0o170000
    if kind == 0o40000:
        return None
    if kind == 0o100000:
        mode = 0o100755 if mode & 0o100 else 0o100644
    elif kind != 0o120000:
        mode = 0o160000
    return Entry(mode, entry[1].hex())


def _split(path: bytes, old: Entry | None, new: Entry | None) -> Iterator[TreeChange]:
    if old == new:
        return
    if old is not None and new is not None and old.mode >> 12 != new.mode >> 12:
        yield TreeChange(path, old, None)
        yield TreeChange(path, None, new)
    else:
        yield TreeChange(path, old, new)


def missing_object(id: str, kind: Kind) -> UserError:
    """Return the error for an object that the repository should have and lacks."""
    return UserError(
        f"{kind} {id} is missing from the repository (a partial or damaged clone)",
        hint="`git fetch --refetch --no-filter` gets what is missing, `git fsck` names it",
    )


def damaged_object(id: str, kind: Kind, detail: str) -> UserError:
    """Return the error for an object that cannot be read as what it should be."""
    return UserError(
        f"{kind} {id} cannot be read: {detail}", hint="`git fsck` names what is broken"
    )


def unreadable_reference(name: str, detail: str) -> UserError:
    """Return the error for a reference that is neither an id nor another reference."""
    return UserError(
        f"reference {name} cannot be read: {detail}", hint="`git fsck` names what is broken"
    )
