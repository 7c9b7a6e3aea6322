"""Show the base decoder the code that a row needs, so that an adapter can learn to know it unseen.

Context distillation: the teacher is the base itself with told code in front of the row, the student
is the base with the adapter and without that code. What is shown is a stretch of a told file or of
a told commit's added lines, the one that shares the rarest identifiers with what is asked. Nothing
is shown that the student was not told.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from sys import intern

from code2lora.training.data.dataset import RepositoryData, Target
from code2lora.training.data.targets import blocks, identifiers
from code2lora.training.fitting.items import Item, ItemBuilder

_BLOCK_LINES = 48
_RECENT_COMMITS = 64
"""Commits before the state whose added lines are searched too."""


@dataclass(frozen=True)
class Told:
    """What a state was told."""

    data: RepositoryData
    anchor: int
    index: int
    """The last told commit."""
    held_out: frozenset[str]


@dataclass(frozen=True)
class _Stretch:
    """A piece of a file, from `start` on."""

    start: int
    names: frozenset[str]


class Teacher:
    """Finds what helps to write a row, and puts it in front."""

    def __init__(self, builder: ItemBuilder, *, n_tokens: int) -> None:
        """n_tokens: of the code that is shown, at most."""
        self._builder = builder
        self._n_tokens = n_tokens
        self._indices: dict[str, _Index] = {}

    def taught(self, told: Told, target: Target, item: Item) -> Item | None:
        """Return the row with the most useful told code in front; None where none is useful."""
        data = told.data
        index = self._indices.setdefault(data.name, _Index(data))
        text = data.texts[target.file][target.start : target.end]
        found = index.best(told, identifiers(target.target or text))
        return found and self._builder.with_context(item, *found, self._n_tokens)


class _Index:
    """The identifiers of one repository's files, found once."""

    def __init__(self, data: RepositoryData) -> None:
        self._data = data
        self._stretches: dict[int, list[_Stretch]] = {}
        self._weights: dict[str, float] = {}

    def best(self, told: Told, wanted: Collection[str]) -> tuple[str, str] | None:
        """Return (path, text) of the told stretch that shares the rarest of the wanted names."""
        weights = self._rarity()
        score, found = 0.0, None
        for path, text, stretch in self._candidates(told):
            shared = sum(weights.get(name, 0.0) for name in stretch.names.intersection(wanted))
            if shared > score:
                score, found = shared, (path, text[stretch.start :])
        return found

    def _candidates(self, told: Told) -> Iterator[tuple[str, str, _Stretch]]:
        data = told.data
        for file in data.told_files(told.anchor, told.held_out):
            for stretch in self._of_file(file.text):
                yield file.path, data.texts[file.text], stretch
        for index in range(max(told.anchor + 1, told.index - _RECENT_COMMITS), told.index + 1):
            for change in data.changes(index, told.held_out):
                added = data.added_text(change)
                for stretch in _stretches(added):
                    yield change.path, added, stretch

    def _of_file(self, row: int) -> list[_Stretch]:
        if row not in self._stretches:
            self._stretches[row] = _stretches(self._data.texts[row])
        return self._stretches[row]

    def _rarity(self) -> dict[str, float]:
        """Identifier -> how much it says: none of one that most files have."""
        if not self._weights:
            counts: Counter[str] = Counter()
            for row in range(len(self._data.texts)):
                counts.update(set().union(*(s.names for s in self._of_file(row))))
            n_files = len(self._data.texts)
            self._weights = {name: math.log((1 + n_files) / n) for name, n in counts.items()}
        return self._weights


def _stretches(text: str) -> list[_Stretch]:
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    # A name stands in many stretches of many files and is kept once.
    return [
        _Stretch(
            starts[first], frozenset(map(intern, identifiers(text[starts[first] : starts[last]])))
        )
        for first, last in blocks(text, max_lines=_BLOCK_LINES)
    ]
