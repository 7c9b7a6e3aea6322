from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from code2lora.training.evaluation.findings import write_findings
from code2lora.training.evaluation.report import RepositoryScores, summarise


def _scores(name: str, *, base: list[float], own: list[float], wrong: list[list[float]]):  # type: ignore[no-untyped-def]
    n = len(base)
    return RepositoryScores(
        name=name,
        kinds=("file", "commit", "commit")[:n],
        absent=(2, 0, 1)[:n],
        n_tokens=np.array([10, 20, 10])[:n],
        base=np.array(base),
        generic=np.array(base) - 1,
        own=np.array(own),
        stale=np.array(own) + 0.5,
        wrong=np.array(wrong),
    )


SCORES = [
    # 40 tokens: base 2.0, own 1.5, wrong means 70 and 58 of 40 tokens
    _scores("a", base=[20, 40, 20], own=[15, 30, 15], wrong=[[20, 30, 20], [15, 28, 15]]),
    # 30 tokens: base 3.0, own 2.5
    _scores("b", base=[30, 60], own=[25, 50], wrong=[[25, 53], [30, 60]]),
]


def test_figures_of_a_case_worked_out_by_hand() -> None:
    evaluation = summarise(SCORES, resamples=50, seed=1)

    every = evaluation.strata["all"]
    assert (every.n_repositories, every.n_items, every.n_tokens) == (2, 5, 70)
    assert every.base == pytest.approx((2.0 + 3.0) / 2)
    assert every.own == pytest.approx((1.5 + 2.5) / 2)
    # mean of both wrong adapters: a (70 + 58) / 2 / 40 = 1.6, b (78 + 90) / 2 / 30 = 2.8
    assert every.wrong == pytest.approx((1.6 + 2.8) / 2)
    assert every.own_minus_wrong.mean == pytest.approx((-0.1 - 0.3) / 2)
    assert every.own_minus_base.mean == pytest.approx(-0.5)
    assert every.generic_minus_base.mean == pytest.approx((-3 / 40 - 2 / 30) / 2)
    assert every.own_minus_stale.mean == pytest.approx((-1.5 / 40 - 1.0 / 30) / 2)
    # a's second wrong adapter beats its own: 3 wins of 4, ranks 2 and 1
    assert evaluation.win_rate == pytest.approx(0.75)
    assert evaluation.mean_rank == pytest.approx(1.5)
    assert evaluation.best_share == pytest.approx(0.5)
    assert evaluation.n_adapters == 3
    assert evaluation.headline()["chance_rank"] == 2.0


def test_strata_hold_their_rows_alone() -> None:
    evaluation = summarise(SCORES, resamples=10, seed=1)

    absent = evaluation.strata["absent"]  # rows 0 and 2 of a, row 0 of b
    assert (absent.n_items, absent.n_tokens) == (3, 30)
    assert absent.base == pytest.approx((40 / 20 + 30 / 10) / 2)
    assert evaluation.strata["present"].n_items == 2
    assert evaluation.strata["file"].n_tokens == 20


def test_intervals_are_of_repositories_and_not_of_rows() -> None:
    """Rows that all agree within a repository leave the interval as wide as repositories differ."""
    scores = [
        _scores(str(i), base=[0, 0, 0], own=[x * 10, x * 20, x * 10], wrong=[[0, 0, 0]])
        for i, x in enumerate(np.random.default_rng(0).normal(size=40))
    ]
    means = [score.own.sum() / 40 for score in scores]

    found = summarise(scores, resamples=4000, seed=1).strata["all"].own_minus_wrong

    half = 1.96 * np.std(means) / np.sqrt(len(means))
    assert found.mean == pytest.approx(np.mean(means))
    assert found.high - found.low == pytest.approx(2 * half, rel=0.08)


def test_one_repository_has_an_interval_of_no_width() -> None:
    found = summarise(SCORES[:1], resamples=20, seed=1).strata["all"].own_minus_base

    assert found.low == found.high == pytest.approx(-0.5)


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("x.json", "y.json"):
        found = summarise(SCORES, resamples=100, seed=3)
        write_findings(found.to_dict(), tmp_path / name)

    assert (tmp_path / "x.json").read_bytes() == (tmp_path / "y.json").read_bytes()
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["repositories"][0]["rank"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "y.json"]
