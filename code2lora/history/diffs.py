"""Tree changes of one commit into its diff: renames found, files that do not count left out.

Sizes are looked up before contents, each blob is read at most once, and what is read and what is
written are both bounded by the rules, so that no commit costs more than a known amount.
"""

from __future__ import annotations

from collections.abc import Sequence

from code2lora.history.attributes import Attributes
from code2lora.history.model import FileChange, Skipped
from code2lora.history.objects import Entry, ObjectSource, TreeChange, link_reason, show_path
from code2lora.history.patches import file_change
from code2lora.history.renames import Delta, find_renames
from code2lora.history.rules import FileRules


def diff_files(
    source: ObjectSource, found: Sequence[TreeChange], rules: FileRules, attributes: Attributes
) -> tuple[tuple[FileChange, ...], tuple[Skipped, ...]]:
    """Return the changes of the files that count and the other changed files, in path order."""
    work = _Work(source, rules, attributes)
    work.look_up_sizes(found)
    changes: list[FileChange] = []
    skipped: list[Skipped] = []
    for delta in find_renames(found, work.readable_size, work.peek, work.counts):
        outcome = work.change(delta)
        if isinstance(outcome, str):
            skipped.append(Skipped(show_path(delta.path), outcome))
        else:
            changes.append(outcome)
    return tuple(changes), tuple(skipped)


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

    def look_up_sizes(self, found: Sequence[TreeChange]) -> None:
        sides = (side for change in found for side in (change.old, change.new))
        ids = list(dict.fromkeys(side.id for side in sides if side is not None and side.is_file))
        self._sizes = dict(zip(ids, self._source.sizes(ids), strict=True))

    def readable_size(self, id: str) -> int | None:
        size = self._sizes[id]
        return None if size is None or size > self._rules.max_file_bytes else size

    def counts(self, path: bytes) -> bool:
        shown = show_path(path)
        return self._rules.reason_to_skip(shown, None, self._attributes.of(shown)) is None

    def read(self, id: str) -> bytes | None:
        if id not in self._contents:
            self._contents[id] = self._source.read(id, "blob")
        return self._contents[id]

    def peek(self, id: str) -> bytes | None:
        """Return a content to compare it, or None when enough has been read for that."""
        size = self._sizes[id] or 0
        if id not in self._contents:
            if self._n_peeked_bytes + size > self._rules.max_read_bytes:
                return None
            self._n_peeked_bytes += size
        return self.read(id)

    def change(self, delta: Delta) -> FileChange | str:
        """Return the change, or why it is skipped."""
        sides = [side for side in (delta.old, delta.new) if side is not None]
        if not all(side.is_file for side in sides):
            return link_reason(sides[-1])
        path = show_path(delta.path)
        attributes = self._attributes.of(path)
        reason = self._rules.reason_to_skip(path, None, attributes) or self._size_reason(sides)
        if reason is not None:
            return reason
        contents = [self.read(side.id) for side in sides]
        texts = [content for content in contents if content is not None]
        if len(texts) < len(contents):
            return "missing object"
        for text in texts:
            reason = self._rules.reason_to_skip_content(text, attributes)
            if reason is not None:
                return reason
        old = b"" if delta.old is None else texts[0]
        new = b"" if delta.new is None else texts[-1]
        return self._within_budget(file_change(delta, old, new, self._rules.decode_errors))

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
