"""Turn the windows of one step into gradients: states, adapters, rows, losses, backward.

Several processes share a step: each takes some of its windows, and what is summed over all of them
is summed over the processes too, so the gradients are those of one process with all windows.

N = rows, A = adapters, G = width of a state.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as distributed
from torch import Tensor

from code2lora.training.fitting.items import Item, collate
from code2lora.training.fitting.learner import Learner
from code2lora.training.fitting.margin import hinge, partners, wrong_adapters
from code2lora.training.fitting.objective import Frozen, asked_hidden, row_losses, weighed
from code2lora.training.fitting.schedule import FitConfig
from code2lora.training.fitting.windows import Window
from code2lora.training.pretraining.ranks import n_ranks, rank


@dataclass(frozen=True)
class StepLosses:
    """What one step found, over all processes."""

    loss: float
    margin: float
    own_minus_wrong: float
    distillation: float
    n_rows: int


def places_of_rank(n_windows: int) -> list[int]:
    """Return the windows of a step that this process takes, by whole groups of partners."""
    return [place for group in partners(n_windows)[rank() :: n_ranks()] for place in group]


def learn(
    learner: Learner,
    base: Frozen,
    windows: Sequence[Window],
    carried: Mapping[int, Tensor],
    config: FitConfig,
    step: int,
) -> tuple[StepLosses, dict[int, Tensor]]:
    """Leave the gradients of a step in the learner's parameters.

    windows: those of this process; every process must call this
    carried: repository -> (G,), where windows without a snapshot go on
    returns the losses, and repository -> (G,), detached: where this process's windows ended
    """
    for parameter in learner.parameters():
        parameter.grad = None
    hidden = learner.states(windows, carried)
    ends = {w.repository: hidden[row, len(w.diffs)].detach() for row, w in enumerate(windows)}
    batch = _Rows.of(windows, config, step)
    objective, losses = _losses(learner, base, batch, hidden, config)
    if objective is not None:
        torch.autograd.backward(objective)
    _sum_gradients(learner)
    return losses, ends


@dataclass(frozen=True)
class _Rows:
    """A step's rows and where their adapters come from."""

    asked: list[tuple[int, int]]
    """(window, position) of each adapter."""
    group_of: Tensor
    """(A,)"""
    window_of: Tensor
    """(A,)"""
    items: list[Item]
    taught: list[Item | None]
    adapter_of: Tensor
    """(N,)"""
    compared: Tensor
    """Rows that are also scored under a wrong adapter."""

    @classmethod
    def of(cls, windows: Sequence[Window], config: FitConfig, step: int) -> _Rows:
        asked = sorted({(row, p) for row, w in enumerate(windows) for p in w.positions})
        adapter = {pair: number for number, pair in enumerate(asked)}
        n_windows = config.windows.repositories
        group = {p: number for number, g in enumerate(partners(n_windows)) for p in g}
        compared: list[int] = []
        n_rows = 0
        for window in windows:
            rng = random.Random(f"{config.seed}/margin/{step}/{window.repository}")
            wanted = config.margin_rows // n_windows
            wanted += window.place < config.margin_rows % n_windows
            chosen = rng.sample(range(len(window.items)), min(len(window.items), wanted))
            compared += [n_rows + i for i in sorted(chosen)]
            n_rows += len(window.items)
        return cls(
            asked=asked,
            group_of=_ids([group[windows[row].place] for row, _ in asked]),
            window_of=_ids([row for row, _ in asked]),
            items=[item for window in windows for item in window.items],
            taught=[item for window in windows for item in window.taught],
            adapter_of=_ids(
                [adapter[row, p] for row, window in enumerate(windows) for p in window.positions]
            ),
            compared=_ids(compared),
        )

    def wrong(self) -> tuple[Tensor, Tensor]:
        """Return the compared rows that have a wrong adapter, and that adapter."""
        wrong = wrong_adapters(self.group_of, self.window_of, self.adapter_of[self.compared])
        return self.compared[wrong >= 0], wrong[wrong >= 0]


def _losses(
    learner: Learner, base: Frozen, batch: _Rows, hidden: Tensor, config: FitConfig
) -> tuple[Tensor | None, StepLosses]:
    """Return the sum to go down, None where this process asks for nothing, and all figures."""
    n = len(batch.items)
    nothing = torch.zeros(0)
    nll = kl = n_tokens = own = wrong = nothing
    kl_tokens = nothing
    if n:
        compared, wrong_of = batch.wrong()
        tokens, labels = collate(batch.items)
        lora = learner.family.lora(torch.stack([hidden[pair] for pair in batch.asked]))
        every = torch.cat([torch.arange(n), compared])
        # The rows to compare ride along a second time, with their wrong adapters.
        found, kl, n_tokens = row_losses(
            base,
            tokens[every],
            labels[every],
            lora,
            torch.cat([batch.adapter_of, wrong_of]),
            [*_teachers(base, batch.taught), *[None] * len(compared)],
        )
        per_token = found / n_tokens
        nll, own, wrong = found[:n], per_token[compared], per_token[n:]
        is_taught = torch.tensor([item is not None for item in batch.taught])
        kl, n_tokens = kl[:n], n_tokens[:n]
        kl_tokens = n_tokens * is_taught
    margins = hinge(own, wrong, config.margin)
    gaps = (own - wrong).detach()
    target, weight = weighed(nll, n_tokens, config.length_power)
    sums = [nll, n_tokens, weight, margins, gaps, torch.ones(len(own))]
    sums += [kl, kl_tokens, torch.ones(n)]
    total = torch.stack([each.detach().double().sum() for each in sums])
    if n_ranks() > 1:
        distributed.all_reduce(total)
    of_nll, of_tokens, of_weight, *of_margins, of_kl, of_taught, n_rows = total.tolist()
    of_margin, of_gap, of_compared = of_margins
    counts = [max(1.0, count) for count in (of_tokens, of_compared, of_taught)]
    losses = StepLosses(
        loss=of_nll / counts[0],
        margin=of_margin / counts[1],
        own_minus_wrong=of_gap / counts[1],
        distillation=of_kl / counts[2],
        n_rows=int(n_rows),
    )
    if not n:
        return None, losses
    objective = config.target_weight * target.sum() / max(1.0, of_weight)
    objective = objective + config.margin_weight * margins.sum() / counts[1]
    return objective + config.distillation_weight * kl.sum() / counts[2], losses


def _teachers(base: Frozen, taught: Sequence[Item | None]) -> list[Tensor | None]:
    """Return for each row what the base would write it from, had it been shown the code."""
    rows = [i for i, item in enumerate(taught) if item is not None]
    found: list[Tensor | None] = [None] * len(taught)
    if rows:
        hidden = asked_hidden(base, *collate([item for item in taught if item is not None]))
        for row, vectors in zip(rows, hidden, strict=True):
            found[row] = vectors
    return found


def _sum_gradients(learner: Learner) -> None:
    """Give every parameter a gradient, and add up those of the processes."""
    for parameter in learner.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if n_ranks() > 1:
            distributed.all_reduce(parameter.grad)


def share_ends(
    ends: Mapping[int, Tensor], repositories: Sequence[int], device: torch.device
) -> dict[int, Tensor]:
    """Return repository -> (G,) of all processes' windows; `ends` are those of this one."""
    if n_ranks() == 1:
        return dict(ends)
    width = len(next(iter(ends.values())))
    table = torch.zeros(len(repositories), width, device=device)
    for row, repository in enumerate(repositories):
        if repository in ends:
            table[row] = ends[repository]
    distributed.all_reduce(table)
    return dict(zip(repositories, table, strict=True))


def _ids(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)
