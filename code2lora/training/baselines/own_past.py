"""Turn what is asked of a repository into what a LoRA of its own may be trained on before that.

Nothing after the last told commit is used, and nothing of a held-out file, under whatever name it
ever went. The newest part of the past is kept back, to see when training is to stop.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from code2lora.training.baselines.config import RepositoryLoraConfig
from code2lora.training.data.dataset import RepositoryData, Target, TellableFile
from code2lora.training.fitting.items import Item, ItemBuilder

_FEWEST_VALIDATION_TARGETS = 4
"""With fewer among the newest commits, whole files are kept back instead."""
_TRIES = 4
"""Draws for one row, as some spans make none."""


class Asked(Protocol):
    """What an evaluation asks of one repository: about everything after `told_up_to`."""

    @property
    def data(self) -> RepositoryData:
        """The repository."""

    @property
    def anchor(self) -> int:
        """The snapshot that its held-out files are files of."""

    @property
    def told_up_to(self) -> int:
        """The last commit that may be told."""

    @property
    def held_out(self) -> frozenset[str]:
        """Paths that are asked about and must not be told."""


@dataclass(frozen=True)
class Past:
    """One repository's material."""

    data: RepositoryData
    told_up_to: int
    hidden: frozenset[str]
    """Every name of a held-out file."""
    tasks: tuple[Target, ...]
    sources: tuple[TellableFile, ...]
    validation: tuple[Target, ...]


def pasts_of(asked: Iterable[Asked], config: RepositoryLoraConfig, *, seed: int) -> list[Past]:
    """Return the pasts in which there is something to train on, by name and last told commit.

    Cases of one repository that are told up to the same commit share a past; what any of them
    holds out is hidden.
    """
    together: dict[tuple[str, int], list[Asked]] = {}
    for each in asked:
        together.setdefault((each.data.name, each.told_up_to), []).append(each)
    pasts = [_past(together[key], config, seed) for key in sorted(together)]
    return [past for past in pasts if past.validation and (past.tasks or past.sources)]


def hidden_paths(data: RepositoryData, held_out: Iterable[str], last: int) -> frozenset[str]:
    """Return every name that the held-out files have, had or get up to a commit.

    Renames are followed both ways until nothing is added, so a name that two files had one after
    the other hides both: too much rather than too little.
    """
    pairs = [
        (change.old_path, change.path)
        for index in range(1, last + 1)
        for change in data.changes(index, frozenset())
        if change.old_path is not None
    ]
    hidden = set(held_out)
    grown = -1
    while grown != len(hidden):
        grown = len(hidden)
        for old, new in pairs:
            if old in hidden or new in hidden:
                hidden |= {old, new}
    return frozenset(hidden)


def draw_rows(
    past: Past, builder: ItemBuilder, config: RepositoryLoraConfig, rng: random.Random
) -> list[Item]:
    """Return the rows of one step: tasks of the past, and stretches of its sources."""
    rows = []
    for _ in range(config.rows_per_step):
        for _ in range(_TRIES):
            from_source = bool(past.sources) and rng.random() < config.source_share
            if from_source or not past.tasks:
                item = _source_row(past, builder, rng)
            else:
                item = task_row(past.data, rng.choice(past.tasks), builder, rng)
            if item is not None:
                rows.append(item)
                break
    return rows


def validation_rows(past: Past, builder: ItemBuilder, *, seed: int) -> list[Item]:
    """Return the fixed rows that tell when training is to stop."""
    rng = random.Random(f"{seed}/{past.data.name}/validation")
    rows = [task_row(past.data, target, builder, rng) for target in past.validation]
    return [row for row in rows if row is not None]


def task_row(
    data: RepositoryData, target: Target, builder: ItemBuilder, rng: random.Random
) -> Item | None:
    """Return a row that asks for a target; None where it makes none."""
    text = data.texts[target.file]
    if target.kind == "assertion":
        wanted = text[target.start : target.end] if target.target is None else target.target
        return builder.assertion(text, target.start, wanted)
    return builder.completion(text, target.path, target.start, target.end, rng)


def _past(asked: Sequence[Asked], config: RepositoryLoraConfig, seed: int) -> Past:
    data, last = asked[0].data, asked[0].told_up_to
    held_out = frozenset[str]().union(*(each.held_out for each in asked))
    hidden = hidden_paths(data, held_out, data.n_commits - 1)
    texts = _hidden_texts(data, hidden)
    rng = random.Random(f"{seed}/{data.name}/past")
    commits = _allowed(data.commit_targets(0, last), hidden, texts)
    validation_from = _validation_from(commits, config.validation_share, last)
    validation = [target for target in commits if target.index >= validation_from]
    few = len(validation) < _FEWEST_VALIDATION_TARGETS
    if few:
        validation_from = last + 1
    tasks = [target for target in commits if target.index < validation_from]
    sources, file_tasks = _snapshot(data, validation_from, hidden, texts)
    if few:
        # Nothing of a file that is kept back is trained on, neither as source nor as a task.
        kept = _kept_back([target.path for target in file_tasks], config.validation_share)
        validation = [target for target in file_tasks if target.path in kept]
        sources = [file for file in sources if file.path not in kept]
        tasks = [target for target in tasks if target.path not in kept]
        file_tasks = [target for target in file_tasks if target.path not in kept]
    chosen = rng.sample(validation, min(len(validation), config.validation_rows))
    return Past(
        data=data,
        told_up_to=last,
        hidden=hidden,
        tasks=(*tasks, *file_tasks),
        sources=tuple(sources),
        validation=tuple(chosen),
    )


def _snapshot(
    data: RepositoryData, before: int, hidden: frozenset[str], texts: frozenset[int]
) -> tuple[list[TellableFile], list[Target]]:
    """Return the newest snapshot's files before a commit, and the tasks that stand in them."""
    anchors = [anchor for anchor in data.anchors if anchor < before]
    if not anchors:
        return [], []
    told = data.told_files(anchors[-1], hidden)
    sources = [file for file in told if file.text not in texts and data.texts[file.text].strip()]
    paths = {file.path for file in sources}
    return sources, _allowed(data.file_targets(anchors[-1], paths), hidden, texts)


def _hidden_texts(data: RepositoryData, hidden: frozenset[str]) -> frozenset[int]:
    """Return the texts that hidden files have in any snapshot: a copy is hidden with them."""
    return frozenset(
        file.text for anchor in data.anchors for file in data.files(anchor) if file.path in hidden
    )


def _allowed(
    targets: Iterable[Target], hidden: frozenset[str], texts: frozenset[int]
) -> list[Target]:
    return [t for t in targets if t.path not in hidden and t.file not in texts]


def _validation_from(targets: Sequence[Target], share: float, last: int) -> int:
    """Return the commit from which on targets, in commit order, are kept back."""
    if not targets:
        return last + 1
    return targets[min(len(targets) - 1, math.floor(len(targets) * (1 - share)))].index


def _kept_back(paths: Iterable[str], share: float) -> set[str]:
    """Return a share of the files, one at least, chosen by the hashes of their paths."""
    order = sorted(
        set(paths), key=lambda path: hashlib.sha256(path.encode("utf-8", "surrogatepass")).digest()
    )
    return set(order[: max(1, math.floor(len(order) * share))])


def _source_row(past: Past, builder: ItemBuilder, rng: random.Random) -> Item | None:
    texts = past.data.texts
    weights = [texts.n_chars(file.text) for file in past.sources]
    file = rng.choices(past.sources, weights)[0]
    text = texts[file.text]
    # The line that a random character stands in: long files and long lines come up more often.
    start = text.rfind("\n", 0, rng.randrange(len(text))) + 1
    return builder.chunk(text, file.path, start, rng)
