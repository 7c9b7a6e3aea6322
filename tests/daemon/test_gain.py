"""The running gain and the gate's rule, on figures whose answers are known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest

from code2lora.daemon.gain import (
    CERTAINTY,
    LEAST_COMMITS,
    LEAST_GAIN,
    gain_of,
    next_use,
    per_token,
    running_gain,
)
from code2lora.state_store.records import Use


@dataclass(frozen=True)
class Figures:
    n_tokens: int
    base_nats: float
    generic_nats: float
    own_nats: float


def commits(
    n: int, *, generic: float, own: float, noise: float = 0.0, seed: int = 0
) -> list[Figures]:
    """Return commits whose losses lie so many nats a token above the base's, on average."""
    rng = random.Random(seed)
    return [
        Figures(
            n_tokens := rng.randrange(50, 150),
            3.0 * n_tokens,
            (3.0 + generic + rng.gauss(0, noise)) * n_tokens,
            (3.0 + own + rng.gauss(0, noise)) * n_tokens,
        )
        for _ in range(n)
    ]


def test_a_gain_is_weighted_by_tokens_and_its_error_is_that_of_commits() -> None:
    few, many = Figures(100, 300.0, 300.0, 290.0), Figures(300, 900.0, 900.0, 840.0)

    gain = running_gain([few, many, Figures(0, 0.0, 0.0, 0.0)])

    assert gain is not None and (gain.n_commits, gain.n_tokens) == (2, 400)
    assert gain.over_base.mean == pytest.approx(70 / 400)
    # residuals 10 - 0.175 * 100 and 60 - 0.175 * 300, so 7.5 each: sqrt(2 * 7.5^2 * 2) / 400
    assert gain.over_base.error == pytest.approx(15 / 400)
    assert (gain.generic_over_base.mean, gain.generic_over_base.error) == (0.0, 0.0)
    assert per_token(few, "base") == pytest.approx(0.1)
    assert per_token(few, "generic") == pytest.approx(0.1)
    assert per_token(Figures(0, 0.0, 0.0, 0.0), "base") is None


def test_the_error_is_that_of_repeated_draws() -> None:
    means = [
        gain_of("own", "base", commits(40, generic=0.0, own=-0.1, noise=0.2, seed=seed))
        for seed in range(300)
    ]
    average = sum(m.mean for m in means) / len(means)
    spread = (sum((m.mean - average) ** 2 for m in means) / (len(means) - 1)) ** 0.5
    told = sum(m.error or 0.0 for m in means) / len(means)
    assert average == pytest.approx(0.1, abs=0.01)
    assert told == pytest.approx(spread, rel=0.15)


def test_before_anything_is_scored_there_is_no_gain() -> None:
    assert running_gain([]) is None
    assert running_gain([Figures(0, 0.0, 0.0, 0.0)]) is None
    alone = running_gain(commits(1, generic=0.0, own=-1.0))
    assert alone is not None and alone.over_base.error is None and not alone.over_base.is_shown


@pytest.mark.parametrize(
    ("generic", "own", "expected"),
    [
        (-0.2, -0.3, "own"),
        (-0.2, -0.1, "generic"),
        (0.1, 0.2, "base"),
        (0.3, 0.1, "base"),
        (-0.1, 0.2, "generic"),
        (0.0, 0.0, "own"),
    ],
)
def test_the_best_of_three_serves_once_it_is_shown(
    generic: float, own: float, expected: Use
) -> None:
    scores = commits(LEAST_COMMITS, generic=generic, own=own, noise=0.01)
    assert next_use("own", scores) == expected
    if generic or own:
        assert {next_use(now, scores) for now in ("own", "generic", "base")} == {expected}
    assert next_use("own", scores[1:]) == "own", "the gate waits for enough commits"


def test_what_is_not_shown_changes_nothing() -> None:
    """A hair's breadth is not a reason, and neither is what may well be chance."""
    hair = commits(40, generic=-LEAST_GAIN, own=0.0, noise=0.0)
    assert next_use("own", hair) == "own" and next_use("generic", hair) == "generic"
    chance = commits(20, generic=-0.05, own=0.0, noise=0.5)
    gain = gain_of("generic", "own", chance)
    assert abs(gain.mean) < CERTAINTY * (gain.error or 0.0)
    assert next_use("own", chance) == "own" and next_use("generic", chance) == "generic"


def flips(scores: Sequence[Figures], window: int) -> int:
    """Return how often the gate changes its mind along a history."""
    use: Use = "own"
    n = 0
    for end in range(1, len(scores) + 1):
        after = next_use(use, scores[max(0, end - window) : end])
        n += after != use
        use = after
    return n


def test_equal_adapters_are_seldom_exchanged() -> None:
    told = [flips(commits(300, generic=0.0, own=0.0, noise=0.3, seed=s), 50) for s in range(10)]
    naive = 0
    for seed in range(10):
        scores = commits(300, generic=0.0, own=0.0, noise=0.3, seed=seed)
        signs = [gain_of("own", "generic", scores[i - 50 : i]).mean > 0 for i in range(50, 300)]
        naive += sum(a != b for a, b in pairwise(signs))
    assert sum(told) / len(told) < 6
    assert sum(told) < naive / 2


def test_the_gate_comes_back_when_the_own_adapter_has_learned() -> None:
    scores = commits(60, generic=-0.1, own=0.0, noise=0.02) + commits(
        60, generic=-0.1, own=-0.2, noise=0.02
    )
    assert flips(scores, 50) == 2
