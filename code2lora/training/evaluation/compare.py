"""Turn the answers of several rows into figures with intervals; arithmetic alone, no models.

Every figure is a mean over repositories, each counting once, with the 95 % percentiles of a
bootstrap over repositories. Differences are paired: they are taken within a repository, over those
that both rows answered. NLL is in nats per token; the other metrics go from 0 to 1.

R = repositories, I = questions of one repository.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from code2lora.training.evaluation.answers import Answer, reference
from code2lora.training.evaluation.metrics import METRICS, PROTOCOLS, Written, score
from code2lora.training.evaluation.prompts import Prompts
from code2lora.training.evaluation.report import Interval
from code2lora.training.evaluation.suites import SuiteCase

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

NLL = "nll"


def column(protocol: str, metric: str) -> str:
    """Return the name of a metric under a protocol; ours has the plain name."""
    return metric if protocol == "ours" else f"{protocol}_{metric}"


COLUMNS = (NLL, *(column(protocol, metric) for protocol in PROTOCOLS for metric in METRICS))
"""Names of all figures of a row."""

STRATA = ("all", "absent", "present", "assertion", "commit", "file")

DECAY_EDGES = (1, 3, 9, 17, 33, 65, 129)
"""Where the bins of distances begin, in commits; the last is open."""


@dataclass(frozen=True)
class Scored:
    """One row's answers to one repository, as numbers."""

    name: str
    kinds: Sequence[str]
    absent: npt.NDArray[np.int64]
    distances: npt.NDArray[np.int64]
    n_tokens: npt.NDArray[np.int64]
    values: Mapping[str, Floats]
    """Column -> (I,); of NLL the sum over an item's tokens."""

    def mask(self, stratum: str) -> Mask:
        """Return (I,): which questions belong to a stratum."""
        if stratum == "all":
            return np.ones(len(self.kinds), dtype=bool)
        if stratum in ("absent", "present"):
            found: Mask = (self.absent > 0) == (stratum == "absent")
            return found
        return np.array([kind == stratum for kind in self.kinds])

    def mean(self, name: str, mask: Mask) -> float:
        """Return a column over some questions: per token for NLL, per question for the others."""
        total = self.values[name][mask].sum()
        return float(total / (self.n_tokens[mask].sum() if name == NLL else mask.sum()))


@dataclass(frozen=True)
class Figures:
    """One row in one stratum."""

    n_repositories: int
    n_items: int
    columns: dict[str, Interval]
    over_items: dict[str, float]
    """The same without repositories: each question (of NLL, each token) counts once."""
    minus: dict[str, dict[str, Interval]]
    """Reference row -> column -> this row minus that one, over the repositories of both."""


@dataclass(frozen=True)
class DecayBin:
    """How much better than the pretrained row one is, at some distance from what was told."""

    first: int
    last: int | None
    """Distances in commits, both included; None is open."""
    n_repositories: int
    n_items: int
    gain: Interval
    """Nats per token of the pretrained row minus this row's."""


def scored(case: SuiteCase, answers: Sequence[Answer], prompts: Prompts, most: int) -> Scored:
    """Return a row's answers to a case as numbers.

    most: `max_new_tokens` of the answers, up to which the references go
    """
    written: dict[str, list[float]] = {name: [] for name in COLUMNS if name != NLL}
    for question, answer in zip(case.questions, answers, strict=True):
        wanted = reference(question, prompts, most)
        python = question.path.endswith((".py", ".pyi"))
        for protocol in PROTOCOLS:
            found = _score(answer.prediction, wanted, protocol, python)
            for metric in METRICS:
                written[column(protocol, metric)].append(getattr(found, metric))
    return Scored(
        name=case.name,
        kinds=[question.kind for question in case.questions],
        absent=np.array([question.absent for question in case.questions]),
        distances=np.array([question.distance for question in case.questions]),
        n_tokens=np.array([answer.n_tokens for answer in answers]),
        values={
            NLL: np.array([answer.nll for answer in answers]),
            **{name: np.array(values) for name, values in written.items()},
        },
    )


def compare(
    rows: Mapping[str, Sequence[Scored]], references: Sequence[str], *, resamples: int, seed: int
) -> dict[str, dict[str, Figures]]:
    """Return stratum -> row -> figures; strata and rows without a question are left out.

    references: rows that the others' differences are taken to, where they were measured
    """
    bootstrap = _Bootstrap(resamples, seed)
    found: dict[str, dict[str, Figures]] = {}
    for stratum in STRATA:
        figures = {}
        for name, cases in rows.items():
            chosen = _chosen(cases, stratum)
            if chosen:
                others = {r: _chosen(rows[r], stratum) for r in references if r in rows}
                others.pop(name, None)
                figures[name] = _figures(chosen, others, bootstrap)
        if figures:
            found[stratum] = figures
    return found


def decay(
    row: Sequence[Scored], pretrained: Sequence[Scored], *, resamples: int, seed: int
) -> list[DecayBin]:
    """Return a row's gain over the pretrained one for each bin of distances that has questions."""
    bootstrap = _Bootstrap(resamples, seed)
    base = {each.name: each for each in pretrained}
    bins = []
    for first, last in zip(DECAY_EDGES, [*(e - 1 for e in DECAY_EDGES[1:]), None], strict=True):
        gains, n_items = [], 0
        for each in row:
            mask = (each.distances >= first) & (each.distances <= (last or np.inf))
            if each.name in base and mask.any():
                gains.append(base[each.name].mean(NLL, mask) - each.mean(NLL, mask))
                n_items += int(mask.sum())
        if gains:
            interval = bootstrap(np.array(gains))
            bins.append(DecayBin(first, last, len(gains), n_items, interval))
    return bins


_Chosen = dict[str, tuple[Scored, Mask]]


def _chosen(cases: Sequence[Scored], stratum: str) -> _Chosen:
    masks = {case.name: (case, case.mask(stratum)) for case in cases}
    return {name: (case, mask) for name, (case, mask) in masks.items() if mask.any()}


def _figures(chosen: _Chosen, others: Mapping[str, _Chosen], bootstrap: _Bootstrap) -> Figures:
    n_tokens = sum(int(case.n_tokens[mask].sum()) for case, mask in chosen.values())
    n_items = sum(int(mask.sum()) for _, mask in chosen.values())
    columns, over_items = {}, {}
    for name in COLUMNS:
        columns[name] = bootstrap(np.array([c.mean(name, mask) for c, mask in chosen.values()]))
        total = sum(float(case.values[name][mask].sum()) for case, mask in chosen.values())
        over_items[name] = total / (n_tokens if name == NLL else n_items)
    minus = {}
    for reference_row, theirs in others.items():
        both = [name for name in chosen if name in theirs]
        if both:
            minus[reference_row] = {
                name: bootstrap(_differences(name, chosen, theirs, both)) for name in COLUMNS
            }
    return Figures(len(chosen), n_items, columns, over_items, minus)


def _differences(name: str, ours: _Chosen, theirs: _Chosen, both: Sequence[str]) -> Floats:
    def mean(side: _Chosen, repository: str) -> float:
        case, mask = side[repository]
        return case.mean(name, mask)

    return np.array([mean(ours, each) - mean(theirs, each) for each in both])


class _Bootstrap:
    """Intervals of means over repositories; the same resampled repositories for equal numbers."""

    def __init__(self, resamples: int, seed: int) -> None:
        self._resamples = resamples
        self._seed = seed
        self._draws: dict[int, npt.NDArray[np.int64]] = {}

    def __call__(self, values: Floats) -> Interval:
        n = len(values)
        if n not in self._draws:
            rng = np.random.default_rng(self._seed)
            self._draws[n] = rng.integers(0, n, (self._resamples, n))
        low, high = np.percentile(values[self._draws[n]].mean(1), [2.5, 97.5])
        return Interval(mean=float(values.mean()), low=float(low), high=float(high))


_score: Callable[[str, str, str, bool], Written] = lru_cache(maxsize=100_000)(
    lambda prediction, wanted, protocol, python: score(prediction, wanted, protocol, python=python)
)
