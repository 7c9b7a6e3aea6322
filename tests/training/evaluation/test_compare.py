from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from code2lora.training.evaluation.compare import COLUMNS, NLL, Scored, compare, decay


def scored(
    name: str,
    nll: Sequence[float],
    exact: Sequence[float],
    *,
    distances: Sequence[int] = (0, 1, 40),
    absent: Sequence[int] = (2, 0, 1),
) -> Scored:
    n = len(nll)
    values = {column: np.zeros(n) for column in COLUMNS}
    values[NLL], values["exact_match"] = np.array(nll), np.array(exact)
    return Scored(
        name=name,
        kinds=("file", "assertion", "commit")[:n],
        absent=np.array(absent[:n]),
        distances=np.array(distances[:n]),
        n_tokens=np.array((10, 20, 10)[:n]),
        values=values,
    )


ROWS = {
    "pretrained": [scored("a", [20, 40, 20], [0, 0, 1]), scored("b", [30, 60], [1, 1])],
    "shared_lora": [scored("a", [16, 40, 20], [0, 0, 0]), scored("b", [30, 60], [0, 1])],
    "evo": [scored("b", [15, 45], [1, 1])],
}


def test_figures_of_a_case_worked_out_by_hand() -> None:
    found = compare(ROWS, ("pretrained", "shared_lora"), resamples=50, seed=1)

    base = found["all"]["pretrained"]
    assert (base.n_repositories, base.n_items) == (2, 5)
    # nats per token: a 80 of 40, b 90 of 30; exact matches: a 1 of 3, b 2 of 2
    assert base.columns[NLL].mean == pytest.approx((2 + 3) / 2)
    assert base.over_items[NLL] == pytest.approx(170 / 70)
    assert base.columns["exact_match"].mean == pytest.approx((1 / 3 + 1) / 2)
    assert base.over_items["exact_match"] == pytest.approx(3 / 5)
    assert base.minus.keys() == {"shared_lora"}
    shared = found["all"]["shared_lora"]
    assert shared.minus["pretrained"][NLL].mean == pytest.approx((-4 / 40 + 0) / 2)
    assert shared.minus["pretrained"]["exact_match"].mean == pytest.approx((-1 / 3 - 1 / 2) / 2)


def test_differences_are_taken_where_both_rows_answered() -> None:
    evo = compare(ROWS, ("pretrained",), resamples=50, seed=1)["all"]["evo"]

    assert evo.n_repositories == 1
    assert evo.minus["pretrained"][NLL].mean == pytest.approx((60 - 90) / 30)


def test_strata_hold_their_questions_alone() -> None:
    found = compare(ROWS, ("pretrained",), resamples=10, seed=1)

    assert set(found) == {"all", "absent", "present", "file", "assertion", "commit"}
    assert found["absent"]["pretrained"].n_items == 3
    assert found["assertion"]["pretrained"].columns[NLL].mean == pytest.approx((2 + 3) / 2)
    assert set(found["commit"]) == {"pretrained", "shared_lora"}


def test_a_row_alone_needs_no_reference() -> None:
    found = compare({"evo": ROWS["evo"]}, ("pretrained",), resamples=10, seed=1)
    assert found["all"]["evo"].minus == {}


def test_intervals_are_fixed_by_the_seed_and_paired() -> None:
    rng = np.random.default_rng(0)
    base = [scored(str(i), [x * 10], [0]) for i, x in enumerate(rng.normal(3, 1, 30))]
    # Every repository gains exactly 0.1 nats a token, however much repositories differ.
    own = [scored(each.name, [each.values[NLL][0] - 1], [0]) for each in base]
    rows = {"pretrained": base, "evo": own}

    found = [compare(rows, ("pretrained",), resamples=300, seed=seed) for seed in (1, 1, 2)]

    assert found[0] == found[1] != found[2]
    gap = found[0]["all"]["evo"].minus["pretrained"][NLL]
    assert (gap.low, gap.mean, gap.high) == pytest.approx((-0.1, -0.1, -0.1))
    wide = found[0]["all"]["evo"].columns[NLL]
    assert wide.high - wide.low > 0.3


def test_decay_is_the_gain_by_distance() -> None:
    rows = [scored("a", [10, 30, 10], [0] * 3), scored("b", [30, 60], [0] * 2)]

    bins = decay(rows, ROWS["pretrained"], resamples=20, seed=1)

    # Distance 0 is no distance. At 1: a gains 10 of 20 tokens, b nothing. At 40: a 10 of 10.
    assert [(each.first, each.last) for each in bins] == [(1, 2), (33, 64)]
    assert bins[0].gain.mean == pytest.approx((10 / 20 + 0) / 2)
    assert (bins[0].n_repositories, bins[0].n_items) == (2, 2)
    assert bins[1].gain.mean == pytest.approx(1.0)
    far = decay(
        [scored("a", [0], [0], distances=(1000,))],
        [scored("a", [10], [0], distances=(1000,))],
        resamples=5,
        seed=1,
    )
    assert [(each.first, each.last) for each in far] == [(129, None)]
