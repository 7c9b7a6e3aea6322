"""Tree changes into a diff, or whole changed files: renames found, what does not count left out.

Sizes are looked up before contents, each blob is read at most once, and what is read and what is
written are both bounded by the rules, so that no commit costs more than a known amount.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from code2lora.history.attributes import Attributes
from code2lora.history.model import FileChange, FileVersions, Skipped, SourceFile
from code2lora.history.objects import Entry, ObjectSource, TreeChange, link_reason, show_path
from code2lora.history.patches import file_change
from code2lora.history.renames import Delta, find_renames
from code2lora.history.rules import FileRules

T = TypeVar("T", FileChange, FileVersions)


def diff_files(
    source: ObjectSource, found: Sequence[TreeChange], rules: FileRules, attributes: Attributes
) -> tuple[tuple[FileChange, ...], tuple[Skipped, ...]]:
    """Return the changes of the files that count and the other changed files, in path order."""
    work = _Work(source, rules, attributes)
    return _sorted_out(work.deltas(found), work.change)


def file_versions(
    source: ObjectSource, found: Sequence[TreeChange], rules: FileRules, attributes: Attributes
) -> tuple[tuple[FileVersions, ...], tuple[Skipped, ...]]:
    """Return both sides of the changed files that count and the other changed files."""
    work = _Work(source, rules, attributes)
    return _sorted_out(work.deltas(found), work.versions)


def _sorted_out(
    deltas: Iterable[Delta], read: Callable[[Delta], T | str]
) -> tuple[tuple[T, ...], tuple[Skipped, ...]]:
    """Return what is read of the changes, and those of which only a reason is told."""
    taken: list[T] = []
    skipped: list[Skipped] = []
    for delta in deltas:
        outcome = read(delta)
        if isinstance(outcome, str):
            skipped.append(Skipped(show_path(delta.path), outcome))
        else:
            taken.append(outcome)
    return tuple(taken), tuple(skipped)


class _Work:
    """The blobs of one diff and how much of the budgets is spent."""

    def __init__(self, source: ObjectSource, rules: FileRules, attributes: Attributes) -> None:
        self._source = source
        self._rules = rules
        self._attributes = attributes
        self._sizes: dict[str, int | None] = {}
        self._contents: dict[str, bytes | None] = {}
        self._n_peeked_bytes = 0
        self._n_read_bytes = 0
        self._n_patch_bytes = 0

    def deltas(self, found: Sequence[TreeChange]) -> list[Delta]:
        """Return the changes of files, renames known."""
        sides = (side for change in found for side in (change.old, change.new))
        ids = list(dict.fromkeys(side.id for side in sides if side is not None and side.is_file))
        self._sizes = dict(zip(ids, self._source.sizes(ids), strict=True))
        return find_renames(found, self._readable_size, self._peek, self._counts)

    def _readable_size(self, id: str) -> int | None:
        size = self._sizes[id]
        return None if size is None or size > self._rules.max_file_bytes else size

    def _counts(self, path: bytes) -> bool:
        shown = show_path(path)
        return self._rules.reason_to_skip(shown, None, self._attributes.of(shown)) is None

    def _read(self, id: str) -> bytes | None:
        if id not in self._contents:
            self._contents[id] = self._source.read(id, "blob")
        return self._contents[id]

    def _peek(self, id: str) -> bytes | None:
        """Return a content to compare it, or None when enough has been read for that."""
        size = self._sizes[id] or 0
        if id not in self._contents:
            if self._n_peeked_bytes + size > self._rules.max_read_bytes:
                return None
            self._n_peeked_bytes += size
        return self._read(id)

    def change(self, delta: Delta) -> FileChange | str:
        """Return the change, or why it is skipped."""
        contents = self._both(delta)
        if isinstance(contents, str):
            return contents
        return self._within_budget(file_change(delta, *contents, self._rules.decode_errors))

    def versions(self, delta: Delta) -> FileVersions | str:
        """Return both sides as text, or why they are skipped."""
        contents = self._both(delta)
        if isinstance(contents, str):
            return contents
        paths = (delta.path if delta.old_path is None else delta.old_path, delta.path)
        files = [
            None
            if side is None
            else SourceFile(
                show_path(path), side.id, content.decode("utf-8", self._rules.decode_errors)
            )
            for side, path, content in zip((delta.old, delta.new), paths, contents, strict=True)
        ]
        return FileVersions(*files)

    def _both(self, delta: Delta) -> tuple[bytes, bytes] | str:
        """Return the contents before and after, empty where there is no file, or why not."""
        sides = [side for side in (delta.old, delta.new) if side is not None]
        if not all(side.is_file for side in sides):
            return link_reason(sides[-1])
        path = show_path(delta.path)
        attributes = self._attributes.of(path)
        reason = self._rules.reason_to_skip(path, None, attributes) or self._size_reason(sides)
        if reason is not None:
            return reason
        contents = [self._read(side.id) for side in sides]
        texts = [content for content in contents if content is not None]
        if len(texts) < len(contents):
            return "missing object"
        for text in texts:
            reason = self._rules.reason_to_skip_content(text, attributes)
            if reason is not None:
                return reason
        return (b"" if delta.old is None else texts[0], b"" if delta.new is None else texts[-1])

    def _size_reason(self, sides: Sequence[Entry]) -> str | None:
        sizes = [self._sizes[side.id] for side in sides]
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes):
            return "missing object"
        if max(known) > self._rules.max_file_bytes:
            return "too large"
        if self._n_read_bytes + sum(known) > self._rules.max_read_bytes:
            return "too large"
        self._n_read_bytes += sum(known)
        return None

    def _within_budget(self, change: FileChange) -> FileChange | str:
        n_bytes = len(change.patch.encode())
        if self._n_patch_bytes + n_bytes > self._rules.max_patch_bytes:
            return "too large"
        self._n_patch_bytes += n_bytes
        return change
