"""Turn removals and additions into renames, by the measure that git itself uses.

First files with the same content, then files whose name is unique on both sides, then all pairs,
best first. The last two read contents, so they look only at additions that count and stop at a
bounded number of pairs.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from code2lora.history.objects import Entry, TreeChange

MIN_SIMILARITY = 0.5
"""Share of the larger file's bytes that both must have in common."""
MIN_SIMILARITY_BY_NAME = 0.75
"""The same for two files that share a name nothing else has."""
MAX_PAIRS = 10_000
"""With more pairs than this the last step is left out."""
MAX_COMPARED_BYTES = 16_000_000
"""Likewise with more content than this; taken apart it fills many times its size."""

_SPAN = re.compile(rb"[^\n]{0,63}\n|[^\n]{1,64}")

ReadBlob = Callable[[str], bytes | None]


@dataclass(frozen=True, slots=True)
class Delta:
    """One file's change, renames known."""

    path: bytes
    old_path: bytes | None
    old: Entry | None
    new: Entry | None
    similarity: float | None = None
    """Set for a rename; 1 when the content is the same."""

    @property
    def status(self) -> str:
        """A, D, M or R."""
        if self.old is None:
            return "A"
        if self.new is None:
            return "D"
        return "M" if self.old_path is None else "R"


@dataclass(slots=True)
class _Pairing:
    """What is still unpaired, in path order, and what has been paired."""

    sources: dict[bytes, Entry]
    targets: dict[bytes, Entry]
    pairs: list[Delta]

    def pair(self, source: bytes, target: bytes, similarity: float) -> None:
        old, new = self.sources.pop(source), self.targets.pop(target)
        self.pairs.append(Delta(target, source, old, new, similarity))


def find_renames(
    changes: Sequence[TreeChange],
    sizes: Callable[[str], int | None],
    read: ReadBlob,
    counts: Callable[[bytes], bool],
) -> list[Delta]:
    """Return the changes in path order, with renames in place of their two halves.

    sizes, read: of a blob by id; None when it must not or cannot be read
    counts: whether an added file is worth comparing by content
    """
    kept = [change for change in changes if not _can_pair(change)]
    pairing = _Pairing(
        {c.path: c.old for c in changes if _can_pair(c) and c.old is not None},
        {c.path: c.new for c in changes if _can_pair(c) and c.new is not None},
        [],
    )
    if pairing.sources and pairing.targets:
        _pair_identical(pairing)
        measure = _Measure(sizes, read)
        wanted = [path for path in pairing.targets if counts(path)]
        _pair_by_name(pairing, wanted, measure)
        _pair_by_content(pairing, [path for path in wanted if path in pairing.targets], measure)
    deltas = [Delta(change.path, None, change.old, change.new) for change in kept]
    deltas += [Delta(path, None, entry, None) for path, entry in pairing.sources.items()]
    deltas += [Delta(path, None, None, entry) for path, entry in pairing.targets.items()]
    return sorted(deltas + pairing.pairs, key=lambda delta: (delta.path, delta.old is None))


def _can_pair(change: TreeChange) -> bool:
    if change.old is not None and change.new is not None:
        return False
    entry = change.old or change.new
    return entry is not None and entry.is_file


def _pair_identical(pairing: _Pairing) -> None:
    by_id: dict[str, list[bytes]] = defaultdict(list)
    for path, entry in pairing.sources.items():
        by_id[entry.id].append(path)
    for target, entry in list(pairing.targets.items()):
        candidates = by_id.get(entry.id)
        if candidates:
            name = posixpath.basename(target)
            same_name = (path for path in candidates if posixpath.basename(path) == name)
            source = next(same_name, candidates[0])
            candidates.remove(source)
            pairing.pair(source, target, 1.0)


def _pair_by_name(pairing: _Pairing, wanted: Sequence[bytes], measure: _Measure) -> None:
    sources, targets = _unique_names(pairing.sources), _unique_names(pairing.targets)
    for target in wanted:
        name = posixpath.basename(target)
        if name in sources and name in targets:
            source = sources[name]
            score = measure(pairing.sources[source], pairing.targets[target])
            measure.forget()
            if score >= MIN_SIMILARITY_BY_NAME:
                pairing.pair(source, target, score)


def _unique_names(paths: Iterable[bytes]) -> dict[bytes, bytes]:
    names: dict[bytes, list[bytes]] = defaultdict(list)
    for path in paths:
        names[posixpath.basename(path)].append(path)
    return {name: found[0] for name, found in names.items() if len(found) == 1}


def _pair_by_content(pairing: _Pairing, wanted: Sequence[bytes], measure: _Measure) -> None:
    if len(wanted) * len(pairing.sources) > MAX_PAIRS:
        return
    sides = [*pairing.sources.values(), *(pairing.targets[target] for target in wanted)]
    if sum(measure.size(side) for side in sides) > MAX_COMPARED_BYTES:
        return
    scored = []
    for target in wanted:
        for source, entry in pairing.sources.items():
            score = measure(entry, pairing.targets[target])
            if score >= MIN_SIMILARITY:
                other_name = posixpath.basename(source) != posixpath.basename(target)
                scored.append((-score, other_name, target, source))
    for negative_score, _, target, source in sorted(scored):
        if source in pairing.sources and target in pairing.targets:
            pairing.pair(source, target, -negative_score)


class _Measure:
    """How alike two blobs are: the share of the larger one's bytes that both contain."""

    def __init__(self, sizes: Callable[[str], int | None], read: ReadBlob) -> None:
        self._sizes = sizes
        self._read = read
        self._spans: dict[str, dict[bytes, int]] = {}

    def size(self, side: Entry) -> int:
        """Return the size in bytes; 0 for what is not compared."""
        return self._sizes(side.id) or 0

    def forget(self) -> None:
        """Give back the memory of what was compared."""
        self._spans.clear()

    def __call__(self, old: Entry, new: Entry) -> float:
        old_size, new_size = self.size(old), self.size(new)
        smaller, larger = sorted((old_size, new_size))
        if smaller == 0 or smaller < MIN_SIMILARITY * larger:
            return 0.0
        a, b = self._count(old.id), self._count(new.id)
        if len(b) < len(a):
            a, b = b, a
        common = sum(min(size, b[span]) for span, size in a.items() if span in b)
        return common / larger

    def _count(self, id: str) -> dict[bytes, int]:
        """Return the bytes that each distinct piece of up to a line makes up in all."""
        if id not in self._spans:
            content = (self._read(id) or b"").replace(b"\r\n", b"\n")
            counts = Counter(_SPAN.findall(content))
            self._spans[id] = {span: len(span) * n for span, n in counts.items()}
        return self._spans[id]
