"""Turn repositories into training windows: what is told, commit by commit, and what is asked when.

A window is a stretch of one repository's history. It begins at a snapshot, of which a random part
is told, or goes on where the repository's last window ended; some of the states along it are asked
for spans of later commits or of held-out files. Every choice is drawn from (seed, step, repository)
and the cursors, so a restored sampler goes on as if never stopped, and a process that needs only
some of a step's windows draws those and no others.

Of a repository's commits, only those that may be trained on are told or asked, so that it can be
asked for the rest in an evaluation. What is asked is not told: later commits come after everything
that was told, and a held-out file is left out of it. Inputs that cannot leave a file out tell whole
snapshots and whole diffs, so with them no file is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from code2lora.training.data.dataset import RepositoryData, Target
from code2lora.training.fitting.inputs import DiffInput, Inputs, SnapshotInput, opening
from code2lora.training.fitting.items import Item, ItemBuilder
from code2lora.training.fitting.teacher import Teacher, Told


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How windows are cut and what is asked along them."""

    repositories: int = 8
    """Windows of one step, each of another repository."""
    commits: int = 24
    """Commits of a window: how far gradients flow back. 0 for a family without recurrence."""
    states: int = 4
    """States along a window that are asked."""
    items_per_state: int = 1
    """Rows that each of them is asked for."""
    restart_share: float = 0.5
    """Share of windows that begin at a snapshot although the last one could go on."""
    from_first: bool = False
    """Windows that begin at a snapshot begin at the oldest, and not at any."""
    told_share: tuple[float, float] = (0.3, 0.9)
    """Least and greatest share of a snapshot's files that are told, where some can be left out."""
    file_item_share: float = 0.5
    """Share of rows from held-out files rather than from commits."""
    assertion_share: float = 0.5
    """Share of rows from commits that ask for an assertion, where there are both kinds."""
    nearest: int = 1
    """An asked assertion is of a commit at least this many after the state. 0 also asks for those
    of the commit that was told last, as the paper does: only for diffs that are told without
    their tests."""
    horizon: int = 48
    """A later commit is at most this many commits after the state."""
    far_gap: int = 10
    """Half of the rows from commits are at least this many commits after the state, if any are."""
    taught_share: float = 0.5
    """Share of rows that a teacher shows how to write, where distillation has a weight."""

    def __post_init__(self) -> None:
        """Raise ValueError when a window could not be drawn."""
        if self.commits < 0 or self.nearest not in (0, 1):
            raise ValueError(f"commits {self.commits} or nearest {self.nearest} is out of range")


@dataclass(frozen=True)
class Window:
    """One repository's part of a step."""

    place: int
    """Its number among the windows of the step."""
    repository: int
    snapshot: SnapshotInput | None
    """What is told of a snapshot; None goes on from the repository's last state."""
    diffs: tuple[DiffInput, ...]
    """What is told of each commit, one after the other."""
    items: tuple[Item, ...]
    targets: tuple[Target, ...]
    """For each item, what it asks for."""
    positions: tuple[int, ...]
    """For each item, after how many of the window's commits it is asked."""
    taught: tuple[Item | None, ...]
    """For each item, the same with what helps to write it in front; None where it is not taught."""
    opening: DiffInput | None = None
    """What is told with the snapshot where that opens a history (`inputs.opening`)."""


@dataclass
class _Cursor:
    """Where a repository's history has been told up to, and what of it is held out."""

    anchor: int
    index: int
    held_out: frozenset[str]


class WindowSampler:
    """Draws the windows of each step."""

    def __init__(
        self,
        repositories: Sequence[RepositoryData],
        builder: ItemBuilder,
        config: WindowConfig,
        *,
        inputs: Inputs,
        seed: int,
        teacher: Teacher | None = None,
    ) -> None:
        """Raises ValueError when there are fewer repositories than a step takes."""
        if len(repositories) < config.repositories:
            raise ValueError(
                f"{len(repositories)} repositories, but a step takes {config.repositories}"
            )
        self._repositories = repositories
        self._builder = builder
        self._config = config
        self._inputs = inputs
        self._seed = seed
        self._teacher = teacher
        self._cursors: dict[int, _Cursor] = {}

    def windows(self, step: int, places: Collection[int] | None = None) -> list[Window]:
        """Return the windows of a step, or those of some of its places; steps come in order."""
        found = []
        for place, repository in enumerate(self.chosen(step)):
            rng = random.Random(f"{self._seed}/{step}/{repository}")
            draw = _Draw(self, repository, rng)
            if places is None or place in places:
                found.append(draw.window(place))
            self._cursors[repository] = draw.end
        return found

    def chosen(self, step: int) -> list[int]:
        """Return the repository of each place of a step.

        Each epoch goes through a shuffled list; what does not fill a step waits for the next.
        """
        n = self._config.repositories
        epoch, place = divmod(step, len(self._repositories) // n)
        order = list(range(len(self._repositories)))
        random.Random(f"{self._seed}/epoch/{epoch}").shuffle(order)
        return order[place * n : (place + 1) * n]

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on from here, as JSON values."""
        return {
            str(repository): [cursor.anchor, cursor.index, sorted(cursor.held_out)]
            for repository, cursor in self._cursors.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken, over the same repositories."""
        self._cursors = {
            int(repository): _Cursor(anchor, index, frozenset(held_out))
            for repository, (anchor, index, held_out) in state.items()
        }


class _Draw:
    """One window while it is drawn: where it begins, where it ends, and then what is asked."""

    def __init__(self, sampler: WindowSampler, repository: int, rng: random.Random) -> None:
        self._config, self._inputs = sampler._config, sampler._inputs
        self._builder, self._teacher = sampler._builder, sampler._teacher
        self._repository, self._rng = repository, rng
        # What is taught is drawn apart: the same is asked with a teacher and without.
        self._teaching = random.Random(rng.getrandbits(64))
        self._data = sampler._repositories[repository]
        cursor = sampler._cursors.get(repository)
        at_end = cursor is None or cursor.index + 1 >= self._data.n_train
        self._fresh = (
            at_end or not self._config.commits or rng.random() < self._config.restart_share
        )
        self.begin = self._restart() if cursor is None or self._fresh else cursor
        self._last = min(self.begin.index + self._config.commits, self._data.n_train - 1)
        self._held_out = [self.begin.held_out]
        """After each of the window's commits."""
        for index in range(self.begin.index + 1, self._last + 1):
            self._held_out.append(self._data.follow(index, self._held_out[-1]))
        self.end = _Cursor(self.begin.anchor, self._last, self._held_out[-1])

    def window(self, place: int) -> Window:
        data, first, held_out = self._data, self.begin.index, self._held_out
        snapshot = opened = None
        if self._fresh:
            told = (data, self.begin.anchor, self.begin.held_out)
            snapshot, opened = self._inputs.snapshot(*told), opening(self._inputs, *told)
        diffs = [self._inputs.diff(data, first + k, held_out[k]) for k in range(1, len(held_out))]
        asked = self._ask()
        return Window(
            place=place,
            repository=self._repository,
            snapshot=snapshot,
            diffs=tuple(diffs),
            items=tuple(item for _, _, item, _ in asked),
            targets=tuple(target for _, target, _, _ in asked),
            positions=tuple(position for position, _, _, _ in asked),
            taught=tuple(taught for _, _, _, taught in asked),
            opening=opened,
        )

    def _restart(self) -> _Cursor:
        anchors = [anchor for anchor in self._data.anchors if anchor < self._data.n_train]
        if self._config.commits and not self._inputs.holds_out:
            # Behind the last commit that may be trained on, only held-out files could be asked for.
            anchors = [anchor for anchor in anchors if anchor + 1 < self._data.n_train] or anchors
        anchor = anchors[0] if self._config.from_first else self._rng.choice(anchors)
        if not self._inputs.holds_out:
            return _Cursor(anchor, anchor, frozenset())
        paths = [file.path for file in self._data.files(anchor)]
        self._rng.shuffle(paths)
        n_told = round(len(paths) * self._rng.uniform(*self._config.told_share))
        return _Cursor(anchor, anchor, frozenset(paths[max(1, min(n_told, len(paths) - 1)) :]))

    def _ask(self) -> list[tuple[int, Target, Item, Item | None]]:
        """Draw the positions, then rows for each; one for which nothing is found is left out."""
        # The state at a snapshot is the first adapter that a new repository gets.
        fixed = [0] if self._fresh else []
        others = list(range(1, len(self._held_out)))
        n_others = min(len(others), self._config.states - len(fixed))
        found = []
        for position in sorted([*fixed, *self._rng.sample(others, n_others)]):
            for _ in range(self._config.items_per_state):
                target = self.target(position)
                item = None if target is None else self._item(target)
                if target is not None and item is not None:
                    taught = self._taught(target, item, position)
                    found.append((position, target, item, taught))
        return found

    def target(self, position: int) -> Target | None:
        """Draw what is asked of the state after so many of the window's commits."""
        files: list[Target] = []
        if self._inputs.holds_out:
            files = self._data.file_targets(self.begin.anchor, self.begin.held_out)
        commits = self._commit_targets(position)
        from_file = self._rng.random() < self._config.file_item_share
        if files and (from_file or not commits):
            return self._rng.choice(files)
        return self._rng.choice(commits) if commits else None

    def _commit_targets(self, position: int) -> list[Target]:
        told_up_to = self.begin.index + position
        # What a snapshot tells includes its tests; only a diff can be told without them.
        nearest = 1 if position == 0 else self._config.nearest
        last = min(told_up_to + self._config.horizon, self._data.n_train - 1)
        far = self._rng.random() < 0.5
        found: list[Target] = []
        if far:
            found = self._data.commit_targets(told_up_to + self._config.far_gap, last)
        if not found:
            found = [
                target
                for target in self._data.commit_targets(told_up_to + nearest, last)
                if target.index > told_up_to or target.kind == "assertion"
            ]
        assertions = [target for target in found if target.kind == "assertion"]
        if not assertions or len(assertions) == len(found):
            return found
        if self._rng.random() < self._config.assertion_share:
            return assertions
        return [target for target in found if target.kind != "assertion"]

    def _item(self, target: Target) -> Item | None:
        text = self._data.texts[target.file]
        if target.kind == "file":
            return self._builder.chunk(text, target.path, target.start, self._rng)
        if target.kind == "assertion":
            wanted = text[target.start : target.end] if target.target is None else target.target
            return self._builder.assertion(text, target.start, wanted)
        return self._builder.completion(text, target.path, target.start, target.end, self._rng)

    def _taught(self, target: Target, item: Item, position: int) -> Item | None:
        if self._teacher is None or self._teaching.random() >= self._config.taught_share:
            return None
        told = Told(
            self._data,
            self.begin.anchor,
            self.begin.index + position,
            self._held_out[position],
        )
        return self._teacher.taught(told, target, item)
