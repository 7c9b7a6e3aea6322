"""Turn an audit's scores into tests with intervals and a verdict; arithmetic alone, no models.

A figure is nats a token: within a repository over all tokens of a stratum, then the mean over
repositories, each counting once. Intervals are 95 % percentiles of a bootstrap over repositories.
Differences are own minus other, so the own adapter is better where they are negative, and a test
passes where its whole interval is.

R = repositories, I = rows of one repository, W = other repositories.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from code2lora.hypernetwork.config import AuditRecord, AuditTest
from code2lora.training.audit.geometry import Geometry
from code2lora.training.audit.items import AuditConfig

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Compared = tuple[Floats, Floats, int]
"""NLL of some rows under two adapters, and the tokens of all these rows."""

REQUIRED = ("own_minus_mean", "own_minus_wrong", "own_minus_generic", "own_minus_base")
"""Tests without which nothing is called passed."""
OTHERS = ("mean", "wrong", "generic", "base", "shared")
"""Adapters, or none at all, that the own one is compared with on the same rows."""


NOISE = 1e-5
"""Nats a token that rounding alone can make of equal adapters; less is no difference."""


@dataclass(frozen=True)
class CaseScores:
    """Summed NLL, in nats, of one repository's rows under several adapters; None: not measured."""

    name: str
    kinds: tuple[str, ...]
    absent: npt.NDArray[np.int64]
    """(I,)"""
    n_tokens: npt.NDArray[np.int64]
    """(I,)"""
    own: Floats
    """(I,)"""
    wrong: Floats
    """(W, I)"""
    base: Floats
    """(I,)"""
    generic: Floats
    """(I,)"""
    mean: Floats | None
    """(I,)"""
    shared: Floats | None
    """(I,)"""
    along_own: Floats
    """(n_lambdas, I) under mean + lambda * (own - mean)"""
    along_wrong: Floats
    """(n_lambdas, I) the same with another repository's residual"""
    fresh: dict[int, Compared] = field(default_factory=dict)
    """Commits behind -> NLL of the rows that they wrote under the newest adapter and under the
    one from before them."""
    reordered: dict[str, Compared] = field(default_factory=dict)
    """Name of an order -> NLL of all rows in `fresh` under the newest adapter and under the one
    that was told the same commits in it."""


Choose = Callable[[CaseScores, AuditConfig], Mask]
"""Tells which rows of a repository belong to a stratum, (I,)."""


@dataclass(frozen=True)
class Ranking:
    """The own adapter among all repositories' adapters, over all rows of a repository."""

    n_adapters: int
    win_rate: float
    """Share of (repository, wrong adapter) pairs in which the own adapter is better; chance 0.5."""
    mean_rank: float
    """1 is best."""
    chance_rank: float


@dataclass(frozen=True)
class Audit:
    """What an audit found."""

    verdict: str
    tests: dict[str, AuditTest]
    strata: dict[str, dict[str, AuditTest]]
    """Stratum -> comparison -> figure; `passed` says whether its interval is below zero."""
    ranking: Ranking
    lambdas: tuple[float, ...]
    along_own: tuple[float, ...]
    """NLL at each lambda."""
    along_wrong: tuple[float, ...]
    geometry: Geometry
    n_repositories: int
    n_items: int

    def record(self, settings: str) -> AuditRecord:
        """Return what a checkpoint says of it. settings: a digest."""
        return AuditRecord(
            verdict=self.verdict,  # type: ignore[arg-type]
            tests=self.tests,
            n_repositories=self.n_repositories,
            n_items=self.n_items,
            settings=settings,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "verdict": self.verdict,
            "n_repositories": self.n_repositories,
            "n_items": self.n_items,
            "tests": {name: asdict(test) for name, test in self.tests.items()},
            "strata": {
                stratum: {name: asdict(test) for name, test in tests.items()}
                for stratum, tests in self.strata.items()
            },
            "ranking": asdict(self.ranking),
            "lambda_curve": {
                "lambdas": list(self.lambdas),
                "own": list(self.along_own),
                "wrong": list(self.along_wrong),
            },
            "geometry": {
                "names": list(self.geometry.names),
                "cosine": self.geometry.cosine.tolist(),
                "residual_ratio": self.geometry.residual_ratio.tolist(),
                "participation_ratio": self.geometry.participation_ratio,
            },
        }


def judge(scores: Sequence[CaseScores], geometry: Geometry, config: AuditConfig) -> Audit:
    """Return the figures and the verdict; the same seed gives the same intervals."""
    strata = {
        name: {f"own_minus_{other}": _against(scores, other, name, config) for other in OTHERS}
        for name in _STRATA
        if any(_STRATA[name](score, config).any() for score in scores)
    }
    tests = dict(strata["all"])
    # What the prefix shows, any adapter can copy: knowing is asked of the rest.
    tests["own_minus_mean"] = _against(scores, "mean", "absent", config)
    tests["lambda_curve"] = _lambda_test(scores, config)
    for behind in config.freshness:
        tests[f"freshness_{behind}"] = _compared([s.fresh.get(behind) for s in scores], config)
    for order in ("another", "random"):
        tests[f"shuffle_{order}"] = _compared([s.reordered.get(order) for s in scores], config)
    along = [
        np.array([_per_token(getattr(s, side), s) for s in scores]).mean(0)
        for side in ("along_own", "along_wrong")
    ]
    return Audit(
        verdict=verdict_of(tests),
        tests=tests,
        strata=strata,
        ranking=_ranking(scores),
        lambdas=config.lambdas,
        along_own=tuple(along[0].tolist()),
        along_wrong=tuple(along[1].tolist()),
        geometry=geometry,
        n_repositories=len(scores),
        n_items=sum(len(score.kinds) for score in scores),
    )


def verdict_of(tests: dict[str, AuditTest]) -> str:
    """Return `failed` where a test failed, `incomplete` where a required one was not made."""
    if any(test.passed is False for test in tests.values()):
        return "failed"
    missing = any(name not in tests or tests[name].passed is None for name in REQUIRED)
    return "incomplete" if missing else "passed"


def _against(
    scores: Sequence[CaseScores], other: str, stratum: str, config: AuditConfig
) -> AuditTest:
    differences = []
    for score in scores:
        theirs: Floats | None = getattr(score, other)
        mask = _STRATA[stratum](score, config)
        if theirs is None or not mask.any():
            continue
        if other == "wrong":
            theirs = theirs.mean(0)
        total = (score.own - theirs)[mask].sum()
        differences.append(total / score.n_tokens[mask].sum())
    return _test(differences, config)


def _lambda_test(scores: Sequence[CaseScores], config: AuditConfig) -> AuditTest:
    """Own residual against the wrong one, the mean over all lambdas that are not zero."""
    used = [i for i, weight in enumerate(config.lambdas) if weight]
    if not used:
        return AuditTest(passed=None)
    differences = [
        _per_token(score.along_own[used] - score.along_wrong[used], score).mean()
        for score in scores
    ]
    return _test(differences, config)


def _compared(found: Sequence[Compared | None], config: AuditConfig) -> AuditTest:
    """Return the test of one comparison, of the repositories in which it was made."""
    return _test([(own - other).sum() / n for own, other, n in filter(None, found)], config)


def _per_token(sums: Floats, score: CaseScores) -> Floats:
    """Return (...,) for (..., I)."""
    means: Floats = sums.sum(-1) / score.n_tokens.sum()
    return means


def _test(differences: Sequence[float], config: AuditConfig) -> AuditTest:
    """Return the test of a difference for each repository; fewer than two say nothing."""
    if len(differences) < 2:
        return AuditTest(passed=None)
    values = np.array(differences, dtype=np.float64)
    rng = np.random.default_rng(config.seed)
    draws = rng.integers(0, len(values), (config.resamples, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return AuditTest(
        passed=bool(high < -NOISE), mean=float(values.mean()), low=float(low), high=float(high)
    )


def _ranking(scores: Sequence[CaseScores]) -> Ranking:
    worse = [(score.own.sum() < score.wrong.sum(1)) for score in scores]
    better = [(score.wrong.sum(1) < score.own.sum()).sum() for score in scores]
    n_adapters = 1 + len(scores[0].wrong)
    return Ranking(
        n_adapters=n_adapters,
        win_rate=float(np.mean([each.mean() for each in worse])),
        mean_rank=float(1 + np.mean(better)),
        chance_rank=(n_adapters + 1) / 2,
    )


def _every(score: CaseScores, _: AuditConfig) -> Mask:
    return np.ones(len(score.kinds), dtype=bool)


def _is_absent(score: CaseScores, _: AuditConfig) -> Mask:
    absent: Mask = score.absent > 0
    return absent


def _of_kind(kind: str) -> Choose:
    return lambda score, _: np.array(score.kinds) == kind


def _is_known(score: CaseScores, config: AuditConfig) -> Mask:
    known: Mask = score.base / score.n_tokens < config.known_nll
    return known


def _is_short(score: CaseScores, config: AuditConfig) -> Mask:
    short: Mask = score.n_tokens <= config.short_tokens
    return short


def _not(choose: Choose) -> Choose:
    return lambda score, config: ~choose(score, config)


_STRATA: dict[str, Choose] = {
    "all": _every,
    "absent": _is_absent,
    "present": _not(_is_absent),
    "short": _is_short,
    "long": _not(_is_short),
    "known": _is_known,
    "unknown": _not(_is_known),
    "file": _of_kind("file"),
    "from_commits": _not(_of_kind("file")),
    "commit": _of_kind("commit"),
    "assertion": _of_kind("assertion"),
}
