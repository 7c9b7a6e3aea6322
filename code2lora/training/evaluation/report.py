"""Turn scores of fixed rows into figures with confidence intervals; arithmetic alone, no models.

All figures are nats per token: within a repository over all tokens, then the mean over
repositories, each counting once. Intervals are 95 % percentiles of a bootstrap over repositories.

R = repositories, I = rows of one repository, W = wrong adapters that its rows are scored under.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RepositoryScores:
    """Summed NLL, in nats, of one repository's rows under several adapters."""

    name: str
    kinds: tuple[str, ...]
    """`file`, `commit` or `assertion`, one a row."""
    absent: tuple[int, ...]
    """Identifiers that a row needs and its prefix does not show."""
    n_tokens: npt.NDArray[np.int64]
    """(I,)"""
    base: Floats
    """(I,) without an adapter"""
    generic: Floats
    """(I,) under the mean repository's adapter"""
    own: Floats
    """(I,)"""
    stale: Floats
    """(I,) under the repository's own adapter from before the last replayed commits"""
    wrong: Floats
    """(W, I) under other repositories' adapters"""


@dataclass(frozen=True)
class Interval:
    """A mean over repositories and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Stratum:
    """The figures of one kind of rows. Negative differences mean that the own adapter is better."""

    n_repositories: int
    n_items: int
    n_tokens: int
    base: float
    generic: float
    own: float
    wrong: float
    own_minus_base: Interval
    own_minus_generic: Interval
    own_minus_wrong: Interval
    own_minus_stale: Interval
    generic_minus_base: Interval


@dataclass(frozen=True)
class RepositoryFigures:
    """One repository, over all of its rows."""

    name: str
    n_items: int
    base: float
    generic: float
    own: float
    wrong: float
    rank: int
    """Of the own adapter among all that were tried, 1 is best."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    strata: dict[str, Stratum]
    """`all`, and those of the others that have rows."""
    n_adapters: int
    """Adapters that each repository's own is ranked among, itself included."""
    win_rate: float
    """Share of (repository, wrong adapter) pairs in which the own adapter is better; chance 0.5."""
    best_share: float
    """Share of repositories whose own adapter is the best."""
    mean_rank: float
    """Mean rank of the own adapter; chance is (n_adapters + 1) / 2."""
    repositories: tuple[RepositoryFigures, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)

    def headline(self) -> dict[str, float]:
        """Return the figures for a checkpoint's metrics and a model card."""
        every = self.strata["all"]
        return {
            "n_repositories": float(every.n_repositories),
            "n_items": float(every.n_items),
            "nll_base": every.base,
            "nll_generic": every.generic,
            "nll_own": every.own,
            "nll_wrong": every.wrong,
            "own_minus_base": every.own_minus_base.mean,
            "own_minus_generic": every.own_minus_generic.mean,
            "own_minus_wrong": every.own_minus_wrong.mean,
            "win_rate": self.win_rate,
            "mean_rank": self.mean_rank,
            "chance_rank": (self.n_adapters + 1) / 2,
        }


def summarise(scores: Sequence[RepositoryScores], *, resamples: int, seed: int) -> Evaluation:
    """Return the figures of some repositories' scores; the same seed gives the same intervals."""
    choices: dict[str, Callable[[RepositoryScores], Mask]] = {
        "all": lambda s: np.ones(len(s.kinds), dtype=bool),
        "absent": lambda s: np.array(s.absent) > 0,
        "present": lambda s: np.array(s.absent) == 0,
        "file": lambda s: np.array(s.kinds) == "file",
        "commit": lambda s: np.array(s.kinds) == "commit",
        "assertion": lambda s: np.array(s.kinds) == "assertion",
    }
    strata = {}
    for name, choose in choices.items():
        chosen = [(score, choose(score)) for score in scores]
        chosen = [(score, mask) for score, mask in chosen if mask.any()]
        if chosen:
            strata[name] = _stratum(chosen, np.random.default_rng(seed), resamples)
    figures = tuple(_figures(score) for score in scores)
    wins = [(s.own.sum() < s.wrong.sum(1)).mean() for s in scores]
    return Evaluation(
        strata=strata,
        n_adapters=1 + len(scores[0].wrong),
        win_rate=float(np.mean(wins)),
        best_share=float(np.mean([each.rank == 1 for each in figures])),
        mean_rank=float(np.mean([each.rank for each in figures])),
        repositories=figures,
    )


def _stratum(
    chosen: Sequence[tuple[RepositoryScores, Mask]], rng: np.random.Generator, resamples: int
) -> Stratum:
    tokens = np.array([score.n_tokens[mask].sum() for score, mask in chosen])

    def per_token(values: Callable[[RepositoryScores], Floats]) -> Floats:
        sums: Floats = np.array([values(score)[mask].sum() for score, mask in chosen])
        means: Floats = sums / tokens
        return means

    base, generic = per_token(lambda s: s.base), per_token(lambda s: s.generic)
    own, stale = per_token(lambda s: s.own), per_token(lambda s: s.stale)
    wrong = per_token(lambda s: s.wrong.mean(0))
    # The same resampled repositories for every difference.
    draws = rng.integers(0, len(chosen), (resamples, len(chosen)))
    return Stratum(
        n_repositories=len(chosen),
        n_items=int(sum(mask.sum() for _, mask in chosen)),
        n_tokens=int(tokens.sum()),
        base=float(base.mean()),
        generic=float(generic.mean()),
        own=float(own.mean()),
        wrong=float(wrong.mean()),
        own_minus_base=_interval(own - base, draws),
        own_minus_generic=_interval(own - generic, draws),
        own_minus_wrong=_interval(own - wrong, draws),
        own_minus_stale=_interval(own - stale, draws),
        generic_minus_base=_interval(generic - base, draws),
    )


def _interval(values: Floats, draws: npt.NDArray[np.int64]) -> Interval:
    means = values[draws].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high))


def _figures(score: RepositoryScores) -> RepositoryFigures:
    tokens = score.n_tokens.sum()
    return RepositoryFigures(
        name=score.name,
        n_items=len(score.kinds),
        base=float(score.base.sum() / tokens),
        generic=float(score.generic.sum() / tokens),
        own=float(score.own.sum() / tokens),
        wrong=float(score.wrong.mean(0).sum() / tokens),
        rank=1 + int((score.wrong.sum(1) < score.own.sum()).sum()),
    )
