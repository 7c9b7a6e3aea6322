from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from code2lora.hypernetwork.config import AuditTest
from code2lora.training.audit.geometry import geometry
from code2lora.training.audit.items import AuditConfig
from code2lora.training.audit.report import (
    NOISE,
    CaseScores,
    judge,
    verdict_of,
)

CONFIG = AuditConfig(
    lambdas=(0.0, 1.0, 2.0),
    freshness=(10,),
    short_tokens=10,
    known_nll=1.5,
    resamples=500,
    seed=1,
)
GEOMETRY = geometry(["a", "b"], np.array([[4.0, 2.0], [2.0, 9.0]]))


def scores(name: str, own: float) -> CaseScores:
    """Three rows of 10, 20 and 10 tokens; `own` nats better than the base on each."""
    base = np.array([20.0, 20.0, 30.0])
    return CaseScores(
        name=name,
        kinds=("file", "commit", "assertion"),
        absent=np.array([2, 0, 1]),
        n_tokens=np.array([10, 20, 10]),
        own=base - own,
        wrong=np.stack([base - own + 8, base - own - 4]),
        base=base,
        generic=base - 2,
        mean=base - 1,
        shared=None,
        along_own=np.stack([base - 1, base - own, base]),
        along_wrong=np.stack([base - 1, base, base + 6]),
        reordered={"another": (base - own, base, 40)},
        fresh={10: (np.array([4.0, 6.0]), np.array([8.0, 12.0]), 10)},
    )


def test_figures_of_a_case_worked_out_by_hand() -> None:
    found = judge([scores("a", 4), scores("b", 8)], GEOMETRY, CONFIG)

    # 40 tokens in 3 rows; a gains 12 nats, b 24
    tests = found.tests
    assert tests["own_minus_base"].mean == pytest.approx(-(12 + 24) / 2 / 40)
    assert tests["own_minus_base"].low == pytest.approx(-24 / 40)
    assert tests["own_minus_base"].high == pytest.approx(-12 / 40)
    assert tests["own_minus_generic"].mean == pytest.approx(-(6 + 18) / 2 / 40)
    assert tests["own_minus_wrong"].mean == pytest.approx(-2 * 3 / 40)
    # against the mean only rows 0 and 2 count, 20 tokens
    assert tests["own_minus_mean"].mean == pytest.approx(-(2 * 3 + 2 * 7) / 2 / 20)
    assert found.strata["all"]["own_minus_mean"].mean == pytest.approx(-(9 + 21) / 2 / 40)
    assert tests["own_minus_shared"] == AuditTest(passed=None)
    # lambda 1: own - wrong is -4 and -8 a row, lambda 2: -6 a row
    assert tests["lambda_curve"].mean == pytest.approx(-3 * ((4 + 6) / 2 + (8 + 6) / 2) / 2 / 40)
    assert tests["freshness_10"].mean == pytest.approx(-1.0)
    assert tests["shuffle_another"].mean == pytest.approx(-(12 + 24) / 2 / 40)
    assert tests["shuffle_random"] == AuditTest(passed=None)
    # of each repository's two wrong adapters one is better than its own
    assert (found.ranking.win_rate, found.ranking.mean_rank) == (0.5, 2.0)
    assert (found.ranking.n_adapters, found.ranking.chance_rank) == (3, 2.0)
    assert found.along_own == pytest.approx((67 / 40, (70 - 18) / 40, 70 / 40))
    assert found.verdict == "passed"


def test_strata_hold_their_rows_alone() -> None:
    strata = judge([scores("a", 4), scores("b", 8)], GEOMETRY, CONFIG).strata

    def gain(stratum: str) -> float | None:
        return strata[stratum]["own_minus_base"].mean

    assert gain("absent") == pytest.approx(-6 * 2 / 20)
    assert gain("present") == gain("long") == gain("commit") == pytest.approx(-6 / 20)
    assert gain("short") == pytest.approx(-6 * 2 / 20)
    # 20 nats for 20 tokens are known, 20 and 30 for 10 are not
    assert gain("known") == pytest.approx(-6 / 20)
    assert gain("unknown") == pytest.approx(-6 * 2 / 20)
    assert gain("file") == gain("assertion") == pytest.approx(-6 / 10)


def test_a_stratum_without_rows_is_left_out() -> None:
    few = [replace(scores(name, 4), kinds=("file",) * 3) for name in "ab"]

    strata = judge(few, GEOMETRY, CONFIG).strata

    assert "file" in strata
    assert not {"commit", "assertion"} & set(strata)


def test_a_difference_that_rounding_could_make_is_none() -> None:
    def shifted(by: float) -> CaseScores:
        each = scores("a", 4)
        return replace(each, generic=each.own + by * each.n_tokens)

    def passed(by: float) -> bool | None:
        found = judge([shifted(by), shifted(by)], GEOMETRY, CONFIG)
        return found.tests["own_minus_generic"].passed

    assert (passed(0.9 * NOISE), passed(1.1 * NOISE), passed(-1.0)) == (False, True, False)


def test_an_interval_that_reaches_zero_does_not_pass() -> None:
    found = judge([scores("a", 4), scores("b", -4), scores("c", 4)], GEOMETRY, CONFIG)

    test = found.tests["own_minus_base"]
    assert (test.passed, found.verdict) == (False, "failed")
    assert test.low is not None and test.high is not None
    assert test.low < 0 < test.high


def test_the_interval_is_of_repositories_and_not_of_rows() -> None:
    values = np.random.default_rng(0).normal(size=40)
    every = [scores(str(i), x) for i, x in enumerate(values)]

    test = judge(every, GEOMETRY, replace(CONFIG, resamples=4000)).tests["own_minus_base"]

    half = 1.96 * np.std(values) * 3 / 40 / np.sqrt(len(values))
    assert test.mean == pytest.approx(-values.mean() * 3 / 40)
    assert test.high is not None and test.low is not None
    assert test.high - test.low == pytest.approx(2 * half, rel=0.08)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "passed"),
        ({"own_minus_shared": None}, "passed"),
        ({"own_minus_mean": None}, "incomplete"),
        ({"own_minus_wrong": None, "shuffle_random": False}, "failed"),
        ({"freshness_50": False}, "failed"),
    ],
)
def test_the_verdict(changes: dict[str, bool | None], verdict: str) -> None:
    passed = {f"own_minus_{other}": True for other in ("mean", "wrong", "generic", "base")}
    tests = {name: AuditTest(passed=value) for name, value in (passed | changes).items()}

    assert verdict_of(tests) == verdict


def test_the_file_has_what_the_report_draws() -> None:
    found = judge([scores("a", 4), scores("b", 8)], GEOMETRY, CONFIG)

    content = json.loads(json.dumps(found.to_dict()))

    assert content["lambda_curve"] == {
        "lambdas": [0.0, 1.0, 2.0],
        "own": pytest.approx([67 / 40, 52 / 40, 70 / 40]),
        "wrong": pytest.approx([67 / 40, 70 / 40, 88 / 40]),
    }
    assert content["geometry"]["names"] == ["a", "b"]
    assert content["geometry"]["cosine"][0] == pytest.approx([1.0, 1 / 3])
    assert content["verdict"] == "passed"
    assert content["tests"]["own_minus_shared"] == {
        "passed": None,
        "mean": None,
        "low": None,
        "high": None,
    }
    record = found.record("digest")
    assert (record.verdict, record.settings, record.n_items) == ("passed", "digest", 6)
