"""Ask whether the adapters know their repositories: the scores from which `audit_report` judges.

The same fixed rows are scored under the base model, the generic adapter, the mean adapter of the
training repositories, the own adapter and every other repository's; between and beyond mean and
own. What the newest commits wrote is scored under adapters that were told all commits, fewer, or
the same ones in another order: of what was told, only the newest can profit from its place.

The mean adapter is the true mean of the training repositories' weight changes. It differs from the
generic adapter, which is the head's answer to a mean input, wherever the head is not linear. Where
no training repository is given, there is no mean adapter: the test against it is not made, and the
lambda curve starts from the generic one.

R = repositories, I = rows of one repository, G = width of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.static_family import StaticFamily
from code2lora.training.audit.adapters import MeanAdapter, mean_adapter, mix
from code2lora.training.audit.geometry import geometry, gram
from code2lora.training.audit.items import (
    AuditCase,
    AuditConfig,
    Row,
    last_told,
    order_of_another,
    random_order,
)
from code2lora.training.audit.report import Audit, CaseScores, Compared, judge
from code2lora.training.data.dataset import RepositoryData
from code2lora.training.fitting.items import collate
from code2lora.training.fitting.learner import Learner, told_states
from code2lora.training.fitting.objective import Frozen, row_nll

Floats = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


class Stopped(Exception):
    """The audit was asked to stop; nothing came of it."""


@dataclass(frozen=True)
class _Told:
    """States of one repository, each (G,)."""

    own: Tensor
    newest: Tensor
    behind: dict[int, Tensor]
    """Commits behind the newest -> state; only what `AuditCase.fresh` asks about."""
    reordered: dict[str, Tensor]
    """Name of an order -> the state after all commits in it."""


@torch.no_grad()
def audit(
    learner: Learner,
    base: Frozen,
    cases: Sequence[AuditCase],
    mean: MeanAdapter | None,
    config: AuditConfig,
    *,
    n_layers: int,
    shared: Lora | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> Audit:
    """Return what an audit of a learner finds on held-out repositories.

    mean: see `mean_of_training`; None leaves the test against it out
    n_layers: of the decoder
    shared: a LoRA that was trained on the same tasks, without a batch axis
    progress: called with (rows scored, rows in all)
    Raises ValueError when there are fewer than two cases, and Stopped when `stop()` is true.
    """
    if len(cases) < 2:
        raise ValueError(f"{len(cases)} repositories to audit, expected at least 2")
    told = [_told(learner, cases, i, config) for i in range(len(cases))]
    own = [_adapter(learner, each.own) for each in told]
    n_common = len(own) + 2 + (mean is not None) + (shared is not None)
    meter = _Meter(_n_rows(cases, told, n_common, config), progress, stop)
    scorer = _Scorer(base, config.rows_per_pass, meter)
    generic = learner.family.generic()
    start = mean.lora if mean else generic
    found = _scored(scorer, cases, own, generic, mean, shared)
    scores = []
    for i, (case, each) in enumerate(zip(cases, told, strict=True)):
        mine = found[i]
        line = _Line(scorer, case, start, mine.start, config.lambdas)
        other = (i + 1) % len(cases)
        scores.append(
            CaseScores(
                name=case.data.name,
                kinds=tuple(row.kind for row in case.rows),
                absent=np.array([row.absent for row in case.rows]),
                n_tokens=np.array([row.item.n_asked for row in case.rows]),
                own=mine.under[i],
                wrong=np.delete(mine.under, i, axis=0),
                base=mine.base,
                generic=mine.generic,
                mean=mine.mean,
                shared=mine.shared,
                along_own=line.towards(own[i], mine.under[i]),
                along_wrong=line.towards(own[other], mine.under[other]),
                **_newest(scorer, learner, case, each),
            )
        )
    names = [case.data.name for case in cases]
    return judge(scores, geometry(names, gram(own, n_layers=n_layers)), config)


@torch.no_grad()
def mean_of_training(
    learner: Learner, training: Sequence[RepositoryData], config: AuditConfig
) -> MeanAdapter | None:
    """Return the mean adapter of evenly spaced training repositories, or None without any."""
    n = min(len(training), config.mean_repositories)
    if not n:
        return None
    loras = []
    for data in (training[i * len(training) // n] for i in range(n)):
        anchor, last = last_told(data, config)
        loras.append(_adapter(learner, told_states(learner, data, anchor, last)[-1]))
    return mean_adapter(loras, max_rank=config.mean_rank)


def _told(learner: Learner, cases: Sequence[AuditCase], i: int, config: AuditConfig) -> _Told:
    case = cases[i]
    states = told_states(learner, case.data, case.anchor, case.newest, case.held_out)
    own, newest = states[case.told_up_to - case.anchor], states[-1]
    # States that are the same bits are not compared: a family that reads no commits has no
    # freshness and no order to be asked about.
    behind = {n: states[case.newest - n - case.anchor] for n in case.fresh if case.fresh[n]}
    reordered = {
        name: _reordered(learner, case, states, order)
        for name, order in _orders(cases, i, config).items()
    }
    return _Told(
        own=own,
        newest=newest,
        behind={n: state for n, state in behind.items() if not torch.equal(state, newest)},
        reordered={n: state for n, state in reordered.items() if not torch.equal(state, newest)},
    )


def _reordered(learner: Learner, case: AuditCase, states: Tensor, order: Sequence[int]) -> Tensor:
    """Return the state (G,) after all commits in another order, the same diffs bit for bit.

    states: from the anchor on, in their own order
    """
    if isinstance(learner.family, StaticFamily):
        return states[-1]
    diffs, hidden = [], case.held_out
    for index in range(case.anchor + 1, case.newest + 1):
        hidden = case.data.follow(index, hidden)
        diffs.append(learner.inputs.diff(case.data, index, hidden))
    features = learner.inputs.diff_features([diffs[place] for place in order])
    return learner.family.advance_states(states[:1], features[None])[0, -1]


def _orders(cases: Sequence[AuditCase], i: int, config: AuditConfig) -> dict[str, list[int]]:
    """Return the orders that a repository's commits are also told in."""
    mine, theirs = _sizes(cases[i]), _sizes(cases[(i + 1) % len(cases)])
    if len(mine) < 2 or not theirs:
        return {}
    seed = f"{config.seed}/{cases[i].data.name}"
    orders = {
        "another": order_of_another(mine, theirs, seed),
        "random": random_order(len(mine), seed),
    }
    return {name: order for name, order in orders.items() if order != list(range(len(mine)))}


def _sizes(case: AuditCase) -> list[int]:
    """Return how many files each of the commits changes."""
    told = range(case.anchor + 1, case.newest + 1)
    return [len(case.data.changes(index, case.held_out)) for index in told]


@dataclass(frozen=True)
class _Scores:
    """NLL of one repository's rows under the adapters that all rows are scored under."""

    under: Floats
    """(R, I) under each repository's adapter."""
    base: Floats
    generic: Floats
    mean: Floats | None
    shared: Floats | None

    @property
    def start(self) -> Floats:
        """Where the lambda curve starts."""
        return self.generic if self.mean is None else self.mean


def _scored(
    scorer: _Scorer,
    cases: Sequence[AuditCase],
    own: Sequence[Lora],
    generic: Lora,
    mean: MeanAdapter | None,
    shared: Lora | None,
) -> list[_Scores]:
    """Return each repository's scores; rows of all repositories share passes."""
    every = [row for case in cases for row in case.rows]
    under = np.stack([scorer.nll(every, lora) for lora in own])
    of_base, of_generic = scorer.nll(every, None), scorer.nll(every, generic)
    of_mean = None if mean is None else scorer.nll(every, mean.lora)
    of_shared = None if shared is None else scorer.nll(every, shared)
    found, end = [], 0
    for case in cases:
        mine = slice(end, end := end + len(case.rows))
        found.append(
            _Scores(
                under=under[:, mine],
                base=of_base[mine],
                generic=of_generic[mine],
                mean=None if of_mean is None else of_mean[mine],
                shared=None if of_shared is None else of_shared[mine],
            )
        )
    return found


@dataclass(frozen=True)
class _Line:
    """Scores a repository's rows along lines of adapters that start at the same one."""

    scorer: _Scorer
    case: AuditCase
    start: Lora
    start_nll: Floats
    lambdas: tuple[float, ...]

    def towards(self, lora: Lora, lora_nll: Floats) -> Floats:
        """Return (n_lambdas, I); both ends have been scored already."""
        known = {0.0: self.start_nll, 1.0: lora_nll}
        return np.stack(
            [
                known[x]
                if x in known
                else self.scorer.nll(self.case.rows, mix(self.start, lora, x))
                for x in self.lambdas
            ]
        )


def _newest(scorer: _Scorer, learner: Learner, case: AuditCase, told: _Told) -> dict[str, Any]:
    """Return the fields of `CaseScores` that ask for what the newest commits wrote."""
    newest = _adapter(learner, told.newest)

    def against(rows: Sequence[Row], new: Floats, state: Tensor) -> Compared:
        other = scorer.nll(rows, _adapter(learner, state))
        return new, other, sum(row.item.n_asked for row in rows)

    under = {n: scorer.nll(rows, newest) for n, rows in _asked_fresh(case, told).items()}
    rows = [row for n in under for row in case.fresh[n]]
    every = np.concatenate(list(under.values())) if under else np.zeros(0)
    return {
        "fresh": {n: against(case.fresh[n], under[n], old) for n, old in told.behind.items()},
        "reordered": {
            name: against(rows, every, state) for name, state in told.reordered.items() if rows
        },
    }


def _asked_fresh(case: AuditCase, told: _Told) -> dict[int, tuple[Row, ...]]:
    """Return the rows of the newest commits that some state is asked for."""
    return {
        n: rows for n, rows in case.fresh.items() if rows and (told.reordered or n in told.behind)
    }


def _adapter(learner: Learner, state: Tensor) -> Lora:
    """Return the adapter of a state (G,), without a batch axis."""
    lora = learner.family.lora(state[None])
    return Lora(
        a={target: tensor[0] for target, tensor in lora.a.items()},
        b={target: tensor[0] for target, tensor in lora.b.items()},
        rank=lora.rank,
        alpha=lora.alpha,
    )


def _n_rows(
    cases: Sequence[AuditCase], told: Sequence[_Told], n_common: int, config: AuditConfig
) -> int:
    """Return how many rows are scored. n_common: adapters that all rows are scored under."""
    n_between = len([x for x in config.lambdas if x not in (0.0, 1.0)])
    n_rows = 0
    for case, each in zip(cases, told, strict=True):
        n_rows += len(case.rows) * (n_common + 2 * n_between)
        newest = {n: len(rows) for n, rows in _asked_fresh(case, each).items()}
        n_rows += sum(newest.values()) * (1 + len(each.reordered))
        n_rows += sum(newest[behind] for behind in each.behind)
    return n_rows


@dataclass
class _Meter:
    n_rows: int
    progress: Progress | None
    stop: Callable[[], bool] | None
    n_done: int = 0

    def add(self, n: int) -> None:
        """Count scored rows. Raises Stopped when it is asked for."""
        self.n_done += n
        if self.progress is not None:
            self.progress(self.n_done, self.n_rows)
        if self.stop is not None and self.stop():
            raise Stopped


class _Scorer:
    """Scores rows under one adapter, in passes of rows of like length."""

    def __init__(self, base: Frozen, rows_per_pass: int, meter: _Meter) -> None:
        self._base = base
        self._rows_per_pass = rows_per_pass
        self._meter = meter

    def nll(self, rows: Sequence[Row], lora: Lora | None) -> Floats:
        """Return (len(rows),): each row's summed NLL in nats."""
        found = np.zeros(len(rows))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].item.ids))
        for start in range(0, len(order), self._rows_per_pass):
            part = order[start : start + self._rows_per_pass]
            tokens, labels = collate([rows[i].item for i in part])
            nll, _ = row_nll(self._base, tokens, labels, lora, None)
            found[part] = nll.double().cpu().numpy()
            self._meter.add(len(part))
        return found
