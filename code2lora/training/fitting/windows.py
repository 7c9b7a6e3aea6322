"""Turn repositories into training windows: what is told, commit by commit, and what is asked when.

A window is a stretch of one repository's history. It begins at a snapshot, of which a random part
is told, or goes on where the repository's last window ended; some of the states along it are asked
for spans of later commits or of held-out files. Every choice is drawn from (seed, step) and the
cursors, so a restored sampler goes on as if never stopped.

V = size of the vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from code2lora.training.data.bags import FloatArray, Weights
from code2lora.training.data.dataset import RepositoryData, Target, TellableFile
from code2lora.training.fitting.items import Item, ItemBuilder


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How windows are cut and what is asked along them."""

    repositories: int = 8
    """Windows of one step, each of another repository."""
    commits: int = 24
    """Commits of a window: how far gradients flow back."""
    states: int = 4
    """States along a window that are asked."""
    items_per_state: int = 1
    """Rows that each of them is asked for."""
    restart_share: float = 0.5
    """Share of windows that begin at a snapshot although the last one could go on."""
    told_share: tuple[float, float] = (0.3, 0.9)
    """Least and greatest share of a snapshot's files that are told."""
    file_item_share: float = 0.5
    """Share of rows from held-out files rather than from later commits."""
    horizon: int = 48
    """A later commit is at most this many commits after the state."""
    far_gap: int = 10
    """Half of the rows from commits are at least this many commits after the state, if any are."""


@dataclass(frozen=True)
class Window:
    """One repository's part of a step."""

    repository: int
    snapshot: FloatArray | None
    """(V,) weights of the told files; None goes on from the repository's last state."""
    added: tuple[Weights, ...]
    """Weights of the added lines, commit after commit."""
    removed: tuple[Weights, ...]
    items: tuple[Item, ...]
    positions: tuple[int, ...]
    """For each item, after how many of the window's commits it is asked."""


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
        n_vocabulary: int,
        seed: int,
    ) -> None:
        """Raises ValueError when there are fewer repositories than a step takes."""
        if len(repositories) < config.repositories:
            raise ValueError(
                f"{len(repositories)} repositories, but a step takes {config.repositories}"
            )
        self._repositories = repositories
        self._builder = builder
        self._config = config
        self._n_vocabulary = n_vocabulary
        self._seed = seed
        self._cursors: dict[int, _Cursor] = {}

    def windows(self, step: int) -> list[Window]:
        """Return the windows of a step; steps are asked for in order."""
        rng = random.Random(f"{self._seed}/{step}")
        return [self._window(repository, rng) for repository in self._chosen(step)]

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

    def _chosen(self, step: int) -> list[int]:
        """Each epoch goes through a shuffled list; what does not fill a step waits for the next."""
        n = self._config.repositories
        epoch, place = divmod(step, len(self._repositories) // n)
        order = list(range(len(self._repositories)))
        random.Random(f"{self._seed}/epoch/{epoch}").shuffle(order)
        return order[place * n : (place + 1) * n]

    def _window(self, repository: int, rng: random.Random) -> Window:
        data = self._repositories[repository]
        cursor = self._cursors.get(repository)
        snapshot = None
        at_end = cursor is None or cursor.index + 1 >= data.n_commits
        if cursor is None or at_end or rng.random() < self._config.restart_share:
            cursor, files = self._restart(data, rng)
            snapshot = data.snapshot_weights(files, self._n_vocabulary)
        first = cursor.index
        last = min(first + self._config.commits, data.n_commits - 1)
        held_out, diffs = cursor.held_out, []
        for index in range(first + 1, last + 1):
            held_out = data.follow(index, held_out)
            diffs.append(data.diff_weights(index, held_out))
        items, positions = self._ask(data, cursor, last - first, rng, fresh=snapshot is not None)
        self._cursors[repository] = _Cursor(cursor.anchor, last, held_out)
        return Window(
            repository=repository,
            snapshot=snapshot,
            added=tuple(added for added, _ in diffs),
            removed=tuple(removed for _, removed in diffs),
            items=tuple(items),
            positions=tuple(positions),
        )

    def _restart(
        self, data: RepositoryData, rng: random.Random
    ) -> tuple[_Cursor, list[TellableFile]]:
        anchor = rng.choice(data.anchors)
        paths = [file.path for file in data.files(anchor)]
        rng.shuffle(paths)
        n_told = round(len(paths) * rng.uniform(*self._config.told_share))
        held_out = frozenset(paths[max(1, min(n_told, len(paths) - 1)) :])
        return _Cursor(anchor, anchor, held_out), data.told_files(anchor, held_out)

    def _ask(
        self, data: RepositoryData, cursor: _Cursor, n_commits: int, rng: random.Random, fresh: bool
    ) -> tuple[list[Item], list[int]]:
        """Draw the positions, then a row for each; one for which nothing is found is left out."""
        # The state at a snapshot is the first adapter that a new repository gets.
        fixed = [0] if fresh else []
        others = list(range(1, n_commits + 1))
        n_others = min(len(others), self._config.states - len(fixed))
        chosen = sorted([*fixed, *rng.sample(others, n_others)])
        items, positions = [], []
        for position in chosen:
            for _ in range(self._config.items_per_state):
                item = self._item(data, cursor, cursor.index + position, rng)
                if item is not None:
                    items.append(item)
                    positions.append(position)
        return items, positions

    def _item(
        self, data: RepositoryData, cursor: _Cursor, told_up_to: int, rng: random.Random
    ) -> Item | None:
        files = data.file_targets(cursor.anchor, cursor.held_out)
        commits = self._later(data, told_up_to, rng)
        from_file = rng.random() < self._config.file_item_share
        if files and (from_file or not commits):
            target = rng.choice(files)
            text = data.texts[target.file]
            return self._builder.chunk(text, target.path, target.start, rng)
        if commits:
            target = rng.choice(commits)
            text = data.texts[target.file]
            return self._builder.completion(text, target.path, target.start, target.end, rng)
        return None

    def _later(self, data: RepositoryData, told_up_to: int, rng: random.Random) -> list[Target]:
        last = told_up_to + self._config.horizon
        far = rng.random() < 0.5
        found = data.commit_targets(told_up_to + self._config.far_gap, last) if far else []
        return found or data.commit_targets(told_up_to + 1, last)
