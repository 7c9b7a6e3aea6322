"""Turn a learner and unseen repositories into figures: does an adapter know its repository?

The same fixed rows are scored under the base model, the generic adapter, the repository's own, its
own of some commits ago, and other repositories' adapters. Repositories, not rows, are the units of
the confidence intervals: rows of one repository are alike.

R = repositories, I = rows of one repository, in all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from code2lora.hypernetwork.lora import Lora
from code2lora.training.data.dataset import RepositoryData, Target
from code2lora.training.evaluation.report import Evaluation, RepositoryScores, summarise
from code2lora.training.fitting.items import Item, ItemBuilder, collate
from code2lora.training.fitting.learner import Learner, told_states
from code2lora.training.fitting.objective import Frozen, row_nll

Leaked = Callable[[RepositoryData, Target], bool]
"""Tells whether a target was seen in training; see `data.leakage`."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is asked of each repository, and of whom."""

    seed: int = 1
    held_out_share: float = 0.3
    """Share of a snapshot's files that are left out of what is told."""
    recent_commits: int = 48
    """The newest commits are asked about; what is told ends before them."""
    replay_commits: int = 64
    """At least so many commits are told one by one, where the history is long enough."""
    in_repo: int = 32
    """Most repositories of the suite in-repo."""
    out_of_time_gap: int = 50
    """In the suite out-of-time, so many commits lie between what is told and what is asked."""
    file_items: int = 16
    """Rows from held-out files."""
    commit_items: int = 16
    """Rows from the newest commits."""
    assertion_items: int = 16
    """Rows from the assertions of the newest commits, where they were mined."""
    wrong: int = 0
    """Other repositories' adapters that each row is scored under; 0 takes all."""
    prompt_tokens: int = 2048
    """What every row of the comparison is given: context and prefix together."""
    context_share: float = 0.75
    """Of them, the most that retrieved text may take; the prefix is then so much shorter."""
    chunks: int = 3
    """Retrieved chunks of the row RAG."""
    chunk_tokens: int = 512
    max_new_tokens: int = 64
    """Longest text that a row may write."""
    rows_per_pass: int = 16
    repositories_per_pass: int = 8
    """As many adapters are in memory at once."""
    resamples: int = 2000
    """Of the bootstrap."""


@dataclass(frozen=True)
class Case:
    """One repository's fixed rows, and what its adapter is made from."""

    data: RepositoryData
    anchor: int
    told_up_to: int
    held_out: frozenset[str]
    items: tuple[Item, ...]
    kinds: tuple[str, ...]
    absent: tuple[int, ...]


def prepare(
    repositories: Sequence[RepositoryData],
    builder: ItemBuilder,
    config: EvaluateConfig,
    leaked: Leaked | None = None,
) -> list[Case]:
    """Return a case for each repository in which there is something to ask.

    leaked: tells which targets were seen in training and are not to be asked
    """
    cases = [_case(data, builder, config, leaked or _unseen) for data in repositories]
    return [case for case in cases if case.items]


@torch.no_grad()
def evaluate(
    learner: Learner,
    base: Frozen,
    cases: Sequence[Case],
    config: EvaluateConfig,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Return the figures of a learner on prepared cases.

    progress: called with (repositories done, repositories in all)
    Raises ValueError when there are fewer than two cases: then there is no wrong adapter.
    """
    if len(cases) < 2:
        raise ValueError(f"{len(cases)} repositories to evaluate, expected at least 2")
    stale, own = _states(learner, cases)
    own_adapters, stale_adapters = learner.family.lora(own), learner.family.lora(stale)
    generic = learner.family.generic()
    scores = []
    for i, case in enumerate(cases):
        rows = _Rows(base, case.items, config.rows_per_pass)
        others = [(i + step) % len(cases) for step in range(1, len(cases))]
        others = others[: config.wrong or None]
        scores.append(
            RepositoryScores(
                name=case.data.name,
                kinds=case.kinds,
                absent=case.absent,
                n_tokens=np.array([item.n_asked for item in case.items]),
                base=rows.nll(None),
                generic=rows.nll(generic),
                own=rows.nll(_pick(own_adapters, i)),
                stale=rows.nll(_pick(stale_adapters, i)),
                wrong=np.stack([rows.nll(_pick(own_adapters, other)) for other in others]),
            )
        )
        if progress is not None:
            progress(i + 1, len(cases))
    return summarise(scores, resamples=config.resamples, seed=config.seed)


class _Rows:
    """One repository's rows, sorted by length into passes."""

    def __init__(self, base: Frozen, items: Sequence[Item], rows_per_pass: int) -> None:
        self._base = base
        order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
        self._passes = [
            (order[start : start + rows_per_pass]) for start in range(0, len(order), rows_per_pass)
        ]
        self._tensors = [collate([items[i] for i in rows]) for rows in self._passes]
        self._n_items = len(items)

    def nll(self, lora: Lora | None) -> npt.NDArray[np.float64]:
        """Return (I,): each row's summed NLL in nats under one adapter."""
        found = np.zeros(self._n_items)
        for rows, (tokens, labels) in zip(self._passes, self._tensors, strict=True):
            found[rows] = row_nll(self._base, tokens, labels, lora, None)[0].double().numpy()
        return found


def held_out_files(data: RepositoryData, anchor: int, config: EvaluateConfig) -> frozenset[str]:
    """Return the paths of a snapshot that are not told; the seed and the repository fix them."""
    rng = random.Random(f"{config.seed}/{data.name}")
    paths = [file.path for file in data.files(anchor)]
    return frozenset(rng.sample(paths, round(len(paths) * config.held_out_share)))


def written_text(data: RepositoryData, target: Target) -> tuple[str, int]:
    """Return a target's file with what is to be written at its start, and where that ends."""
    text = data.texts[target.file]
    if target.target is None:
        return text, target.end
    text = text[: target.start] + target.target + text[target.end :]
    return text, target.start + len(target.target)


def _unseen(data: RepositoryData, target: Target) -> bool:
    return False


def _case(
    data: RepositoryData, builder: ItemBuilder, config: EvaluateConfig, leaked: Leaked
) -> Case:
    told_up_to = max(0, data.n_commits - 1 - config.recent_commits)
    earlier = [a for a in data.anchors if a <= max(0, told_up_to - config.replay_commits)]
    anchor = earlier[-1] if earlier else data.anchors[0]
    held_out = held_out_files(data, anchor, config)
    rng = random.Random(f"{config.seed}/{data.name}/items")
    newest = data.commit_targets(told_up_to + 1, data.n_commits)
    found: list[tuple[str, Item, int]] = []
    for kind, targets, most in (
        ("file", data.file_targets(anchor, held_out), config.file_items),
        ("commit", newest, config.commit_items),
        ("assertion", newest, config.assertion_items),
    ):
        mine = [each for each in targets if each.kind == kind and not leaked(data, each)]
        n_before = len(found)
        for target in rng.sample(mine, len(mine)):
            if len(found) - n_before == most:
                break
            text, end = written_text(data, target)
            item = builder.completion(text, target.path, target.start, end, rng)
            if item is not None:
                found.append((kind, item, target.absent))
    return Case(
        data=data,
        anchor=anchor,
        told_up_to=told_up_to,
        held_out=held_out,
        items=tuple(item for _, item, _ in found),
        kinds=tuple(kind for kind, _, _ in found),
        absent=tuple(absent for _, _, absent in found),
    )


def _states(learner: Learner, cases: Sequence[Case]) -> tuple[Tensor, Tensor]:
    """Return the states at the anchors and at the last told commits, each (R, G)."""
    anchors, last = [], []
    for case in cases:
        states = told_states(learner, case.data, case.anchor, case.told_up_to, case.held_out)
        anchors.append(states[0])
        last.append(states[-1])
    return torch.stack(anchors), torch.stack(last)


def _pick(lora: Lora, index: int) -> Lora:
    return Lora(
        a={target: tensor[index] for target, tensor in lora.a.items()},
        b={target: tensor[index] for target, tensor in lora.b.items()},
        rank=lora.rank,
        alpha=lora.alpha,
    )
