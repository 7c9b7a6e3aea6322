from __future__ import annotations

import copy
from dataclasses import replace
from typing import Literal

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from code2lora.hypernetwork.config import AuditTest
from code2lora.hypernetwork.heads import first
from code2lora.hypernetwork.lora import Lora
from code2lora.training.audit.adapters import concatenate, mean_adapter, mix
from code2lora.training.audit.items import (
    AuditCase,
    AuditConfig,
    last_told,
    order_of_another,
    prepare_audit,
)
from code2lora.training.audit.scores import Stopped, _Told, _told, audit, mean_of_training
from code2lora.training.data.dataset import LINES, RepositoryData
from code2lora.training.data.features import Features
from code2lora.training.fitting.items import Item, ItemBuilder, ItemConfig, collate
from code2lora.training.fitting.learner import (
    Learner,
    LearnerConfig,
    build_frozen_learner,
    build_learner,
)
from code2lora.training.fitting.objective import Frozen, freeze, row_nll
from tests.training.worlds import make_base

CONFIG = AuditConfig(
    items=4,
    fresh_items=3,
    freshness=(2, 4),
    recent_commits=3,
    replay_commits=6,
    rows_per_pass=8,
)
LEARNER = LearnerConfig(
    encoder_width=12, hidden_width=14, trunk_width=20, rank=3, alpha=6.0, carry=0.0
)
N_LAYERS = 2


@pytest.fixture(scope="module")
def base(tokenizer: Tokenizer) -> Frozen:
    return freeze(make_base(tokenizer)[0], autocast=False)


@pytest.fixture(scope="module")
def builder(tokenizer: Tokenizer) -> ItemBuilder:
    return ItemBuilder(tokenizer, ItemConfig(max_tokens=48, prefix_tokens=16, suffix_tokens=8))


@pytest.fixture(scope="module")
def cases(data: list[RepositoryData], builder: ItemBuilder) -> list[AuditCase]:
    return prepare_audit(data, builder, CONFIG)


@pytest.fixture
def learner(data: list[RepositoryData], tokenizer: Tokenizer) -> Learner:
    return build_learner(LEARNER, make_base(tokenizer)[1], tokenizer, LINES, data, seed=1)


# -- adapters ------------------------------------------------------------------------------

DIMS = {"q_proj": (7, 11), "down_proj": (13, 5)}


def make_lora(seed: int, *, rank: int, n_layers: int = 3, alpha: float = 6.0) -> Lora:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Lora(
        a={target: draw(n_layers, rank, d_in) for target, (d_in, _) in DIMS.items()},
        b={target: draw(n_layers, d_out, rank) for target, (_, d_out) in DIMS.items()},
        rank=rank,
        alpha=alpha,
    )


def change(lora: Lora, target: str) -> Tensor:
    """The slow way: (L, d_out, d_in)."""
    return lora.scale * lora.b[target] @ lora.a[target]


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 4.0])
def test_a_mix_is_the_mean_and_so_much_of_the_residual(weight: float) -> None:
    mean, own = make_lora(0, rank=2, n_layers=1, alpha=1.0), make_lora(1, rank=4)

    found = mix(mean, own, weight)

    assert (found.rank, found.scale) == (6, 1.0)
    for target, (d_in, d_out) in DIMS.items():
        assert found.a[target].shape == (3, 6, d_in)
        assert found.b[target].shape == (3, d_out, 6)
        start = change(mean, target)
        expected = start + weight * (change(own, target) - start)
        torch.testing.assert_close(change(found, target), expected, rtol=1e-5, atol=1e-5)


def test_a_mean_over_shared_directions_keeps_its_rank() -> None:
    loras = [make_lora(seed, rank=3) for seed in range(4)]
    loras = [Lora(a=loras[0].a, b=each.b, rank=3, alpha=6.0) for each in loras]

    found = mean_adapter(loras, max_rank=3)

    assert (found.lora.rank, found.n_adapters, found.kept) == (3, 4, 1.0)
    for target in DIMS:
        expected = torch.stack([change(each, target) for each in loras]).mean(0)
        torch.testing.assert_close(change(found.lora, target), expected)


@pytest.mark.parametrize("max_rank", [9, 7])
def test_a_mean_of_any_adapters_is_exact_while_its_rank_suffices(max_rank: int) -> None:
    """Ranks 2 + 3 + 4 fit into 9 as they are; no module here has more than 7 dimensions."""
    loras = [make_lora(0, rank=2), make_lora(1, rank=3, alpha=1.5), make_lora(2, rank=4)]

    found = mean_adapter(loras, max_rank=max_rank)

    assert found.lora.rank == max_rank
    assert found.kept == pytest.approx(1.0)
    for target in DIMS:
        expected = torch.stack([change(each, target) for each in loras]).mean(0)
        torch.testing.assert_close(change(found.lora, target), expected, rtol=1e-4, atol=1e-5)


def test_a_mean_that_does_not_fit_keeps_its_largest_part_and_says_so() -> None:
    loras = [make_lora(seed, rank=4) for seed in range(3)]
    whole = concatenate(loras, [1 / 3] * 3)

    found = mean_adapter(loras, max_rank=2)

    kept = total = 0.0
    for target in DIMS:
        u, s, vh = torch.linalg.svd(change(whole, target).double(), full_matrices=False)
        best = (u[..., :2] * s[:, None, :2]) @ vh[:, :2]
        torch.testing.assert_close(change(found.lora, target).double(), best, rtol=1e-4, atol=1e-4)
        kept += s[:, :2].square().sum().item()
        total += s.square().sum().item()
    assert found.kept == pytest.approx(kept / total, rel=1e-5)
    assert 0.3 < found.kept < 0.95


# -- what is asked -------------------------------------------------------------------------


def test_own_adapters_are_asked_what_they_were_not_told(cases: list[AuditCase]) -> None:
    assert len(cases) == 3
    for case in cases:
        newest = case.data.n_commits - 1
        assert (case.newest, case.told_up_to) == (newest, newest - newest // 3)
        later = case.data.commit_targets(case.told_up_to + 1, newest)
        held_out = case.data.file_targets(case.anchor, case.held_out)
        indices = {"commit": {t.index for t in later}, "file": {t.index for t in held_out}}
        assert {row.kind for row in case.rows} == {"commit", "file"}
        assert all(row.index in indices[row.kind] for row in case.rows)
        assert len(case.rows) <= CONFIG.items


def test_freshness_is_asked_of_told_commits_since_then(cases: list[AuditCase]) -> None:
    for case in cases:
        assert set(case.fresh) == {2, 4}
        for behind, rows in case.fresh.items():
            assert rows
            assert all(case.newest - behind < row.index <= case.newest for row in rows)
    commits = {row.index for case in cases for row in case.fresh[4]}
    assert len(commits) > 2, "rows of the older half are asked too"


def test_a_history_too_short_for_a_distance_is_not_asked_about_it(
    data: list[RepositoryData], builder: ItemBuilder
) -> None:
    config = AuditConfig(items=2, freshness=(2, 50), recent_commits=3, replay_commits=0)

    (case, *_) = prepare_audit(data, builder, config)

    assert set(case.fresh) == {2}


def test_rows_in_held_out_files_are_never_fresh(
    data: list[RepositoryData], builder: ItemBuilder
) -> None:
    config = AuditConfig(items=2, freshness=(4,), held_out_share=1.0, recent_commits=3)
    for case in prepare_audit(data, builder, config):
        changed = {t.path for t in case.data.commit_targets(case.newest - 3, case.newest)}
        assert changed <= case.held_out
        assert case.fresh == {4: ()}


def test_without_holding_out_all_rows_are_from_commits(
    data: list[RepositoryData], builder: ItemBuilder
) -> None:
    for case in prepare_audit(data, builder, CONFIG, holds_out=False):
        assert case.held_out == frozenset()
        assert {row.kind for row in case.rows} == {"commit"}


def test_the_seed_fixes_the_rows(data: list[RepositoryData], builder: ItemBuilder) -> None:
    first, again = (prepare_audit(data, builder, CONFIG) for _ in range(2))
    other = prepare_audit(data, builder, replace(CONFIG, seed=2))

    assert [case.rows for case in first] == [case.rows for case in again]
    assert [case.rows for case in first] != [case.rows for case in other]


def test_rows_come_from_all_strata_alike(data: list[RepositoryData], builder: ItemBuilder) -> None:
    """Half of a few rows, where there are enough of each, need nothing from elsewhere."""
    config = AuditConfig(items=4, recent_commits=6, short_tokens=12, held_out_share=0.0)
    for case in prepare_audit(data, builder, config):
        later = case.data.commit_targets(case.told_up_to + 1, case.newest)
        enough = min(sum(t.absent > 0 for t in later), sum(t.absent == 0 for t in later)) >= 2
        absent = sum(row.absent > 0 for row in case.rows)
        assert not enough or absent == 2


def test_the_stretch_that_is_told_leaves_room_for_what_is_compared(
    data: list[RepositoryData],
) -> None:
    assert data[0].anchors == [0, 4, 8]

    def told(recent: int, replay: int, *freshness: int) -> tuple[int, int]:
        config = AuditConfig(recent_commits=recent, replay_commits=replay, freshness=freshness)
        return last_told(data[0], config)

    assert told(1, 3) == (4, 7)
    assert told(1, 4) == (0, 7)
    assert told(1, 3, 4) == (4, 7)
    assert told(1, 3, 5) == (0, 7)
    assert told(48, 1) == (4, 6), "of a short history, only a third is not told"


def test_another_order_puts_large_commits_where_the_other_has_them() -> None:
    assert order_of_another([5, 1, 3], [10, 30, 20], "seed") == [1, 0, 2]
    # of a longer history, the sizes at the same share of it count
    assert order_of_another([5, 1, 3], [10, 0, 30, 0, 20, 0], "seed") == [1, 0, 2]
    same = order_of_another([2] * 9, [1] * 4, "seed")
    assert sorted(same) == list(range(9))
    assert same != list(range(9)), "equal sizes are drawn, or nothing would be reordered"


# -- what is found -------------------------------------------------------------------------


def teach(learner: Learner, base: Frozen, cases: list[AuditCase], n_steps: int) -> None:
    """Make the adapters what an audit wants: own rows better under own states than under others.

    The head learns the rows of the audit by heart, the quickest way to adapters that differ.
    """
    told = [_told(learner, cases, i, CONFIG) for i in range(len(cases))]
    asked: list[tuple[Item, Tensor, list[Tensor]]] = []
    for i, case in enumerate(cases):
        others = [told[j].own for j in range(len(cases)) if j != i]
        asked += [(row.item, told[i].own, others) for row in case.rows]
        for behind, state in told[i].behind.items():
            older = [state, *told[i].reordered.values()]
            asked += [(row.item, told[i].newest, older) for row in case.fresh[behind]]
    tokens, labels = collate(2 * [item for item, _, _ in asked])
    optimizer = torch.optim.Adam(learner.family.head.parameters(), lr=1e-2)
    for step in range(n_steps):
        good = [state for _, state, _ in asked]
        bad = [others[step % len(others)] for _, _, others in asked]
        lora = learner.family.lora(torch.stack([*good, *bad]).detach())
        nll, n_tokens = row_nll(base, tokens, labels, lora, torch.arange(len(tokens)))
        own, other = (nll / n_tokens).split(len(asked))
        loss = own.mean() + (1 + own - other).clamp(min=0).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    learner.requires_grad_(False)


@pytest.fixture(scope="module")
def taught(
    data: list[RepositoryData], tokenizer: Tokenizer, base: Frozen, cases: list[AuditCase]
) -> Learner:
    made = build_learner(LEARNER, make_base(tokenizer)[1], tokenizer, LINES, data, seed=1)
    teach(made, base, cases, n_steps=90)
    return made


COMPARED = {"own_minus_mean", "own_minus_wrong", "own_minus_generic", "own_minus_base"}
OTHER_TESTS = {"freshness_2", "freshness_4", "shuffle_another", "shuffle_random", "lambda_curve"}


def test_adapters_that_differ_pass(
    taught: Learner, base: Frozen, cases: list[AuditCase], data: list[RepositoryData]
) -> None:
    seen: list[tuple[int, int]] = []

    found = audit(
        taught,
        base,
        cases,
        mean_of_training(taught, data, CONFIG),
        CONFIG,
        n_layers=N_LAYERS,
        progress=lambda done, total: seen.append((done, total)),
    )

    passed = {name for name, test in found.tests.items() if test.passed}
    assert passed == COMPARED | OTHER_TESTS
    assert found.tests["own_minus_shared"] == AuditTest(passed=None)
    assert found.verdict == "passed"
    assert found.ranking.win_rate == 1.0
    assert (found.ranking.mean_rank, found.ranking.chance_rank) == (1.0, 2.0)
    assert (found.n_repositories, found.n_items) == (3, sum(len(case.rows) for case in cases))
    assert found.geometry.participation_ratio > 1
    assert seen[-1][0] == seen[-1][1], "every row was counted"
    assert found.lambdas == (0.0, 0.5, 1.0, 2.0, 4.0)
    assert found.along_own[0] == found.along_wrong[0], "both lines start at the mean adapter"
    assert found.along_own[2] < found.along_wrong[2]


def test_adapters_that_are_all_the_same_fail(
    taught: Learner, base: Frozen, cases: list[AuditCase], data: list[RepositoryData]
) -> None:
    collapsed = copy.deepcopy(taught)
    with torch.no_grad():
        collapsed.family.recentre(torch.stack([t.own for t in states_of(collapsed, cases)]))
        collapsed.family.head.get_parameter("residual.weight").zero_()

    found = audit(
        collapsed, base, cases, mean_of_training(collapsed, data, CONFIG), CONFIG, n_layers=N_LAYERS
    )

    failed = {name for name, test in found.tests.items() if test.passed is False}
    assert found.verdict == "failed"
    assert failed == (COMPARED - {"own_minus_base"}) | OTHER_TESTS
    assert found.tests["own_minus_base"].passed, "the gain over the base is real, but generic"
    assert found.geometry.participation_ratio == 0.0
    assert found.geometry.residual_ratio.tolist() == [0.0] * 3


def test_figures_are_those_of_the_slow_way(
    taught: Learner, base: Frozen, cases: list[AuditCase], data: list[RepositoryData]
) -> None:
    """A row at a time, without any adapter that is made of others."""
    found = audit(
        taught, base, cases, mean_of_training(taught, data, CONFIG), CONFIG, n_layers=N_LAYERS
    )

    told = states_of(taught, cases)
    gaps, along = [], []
    for i, case in enumerate(cases):
        nlls = torch.zeros(2, len(case.rows), dtype=torch.float64)
        n_tokens = sum(row.item.n_asked for row in case.rows)
        own, wrong = (first(taught.family.lora(told[j % 3].own[None])) for j in (i, i + 1))
        for k, row in enumerate(case.rows):
            for which, lora in enumerate((own, wrong)):
                nlls[which, k] = row_nll(base, *collate([row.item]), lora, None)[0].item()
        also = first(taught.family.lora(told[(i + 2) % 3].own[None]))
        third = sum(row_nll(base, *collate([row.item]), also, None)[0].item() for row in case.rows)
        gaps.append((nlls[0].sum().item() - (nlls[1].sum().item() + third) / 2) / n_tokens)
        along.append(nlls[1].sum().item() / n_tokens)
    assert found.tests["own_minus_wrong"].mean == pytest.approx(sum(gaps) / 3, rel=1e-4)
    assert found.along_wrong[2] == pytest.approx(sum(along) / 3, rel=1e-4)


def test_order_is_asked_of_what_the_newest_commits_wrote(
    taught: Learner, base: Frozen, cases: list[AuditCase], data: list[RepositoryData]
) -> None:
    found = audit(taught, base, cases, None, CONFIG, n_layers=N_LAYERS)

    for name in ("another", "random"):
        gaps = []
        for case, told in zip(cases, states_of(taught, cases), strict=True):
            states = (told.newest, told.reordered[name])
            new, other = (first(taught.family.lora(state[None])) for state in states)
            rows = [row for fresh in case.fresh.values() for row in fresh]
            total = sum(
                row_nll(base, *collate([row.item]), new, None)[0].item()
                - row_nll(base, *collate([row.item]), other, None)[0].item()
                for row in rows
            )
            gaps.append(total / sum(row.item.n_asked for row in rows))
        assert found.tests[f"shuffle_{name}"].mean == pytest.approx(sum(gaps) / 3, rel=1e-4)


def test_a_shared_lora_is_one_more_comparison(
    taught: Learner, base: Frozen, cases: list[AuditCase], data: list[RepositoryData]
) -> None:
    """An own adapter is no better than itself, so the test against repository 0's must not pass."""
    shared = first(taught.family.lora(states_of(taught, cases)[0].own[None]))

    found = audit(
        taught,
        base,
        cases,
        mean_of_training(taught, data, CONFIG),
        CONFIG,
        n_layers=N_LAYERS,
        shared=shared,
    )

    test = found.tests["own_minus_shared"]
    assert test.mean is not None
    assert test.mean < 0
    assert (test.passed, test.high) == (False, pytest.approx(0.0, abs=1e-6))


def test_without_training_repositories_the_verdict_is_incomplete(
    taught: Learner, base: Frozen, cases: list[AuditCase]
) -> None:
    found = audit(taught, base, cases, None, CONFIG, n_layers=N_LAYERS)

    assert found.tests["own_minus_mean"] == AuditTest(passed=None)
    assert found.verdict == "incomplete"
    generic = found.strata["all"]["own_minus_generic"].mean
    assert generic == pytest.approx(found.along_own[2] - found.along_own[0], rel=1e-6)


def test_a_family_that_reads_no_commits_has_no_freshness_to_ask_about(
    data: list[RepositoryData], tokenizer: Tokenizer, base: Frozen, builder: ItemBuilder
) -> None:
    config = replace(CONFIG, replay_commits=0, freshness=(2,))
    learner = build_learner(
        replace(LEARNER, family="static", head="paper"),
        make_base(tokenizer)[1],
        tokenizer,
        LINES,
        data,
        seed=1,
    )
    cases = [replace(case, newest=7) for case in prepare_audit(data, builder, config)]
    assert all(case.anchor == 4 for case in cases), "no snapshot lies between 5 and 7"

    found = audit(
        learner, base, cases, mean_of_training(learner, data, config), config, n_layers=N_LAYERS
    )

    missing = {name for name, test in found.tests.items() if test.passed is None}
    assert missing == {"own_minus_shared", "freshness_2", "shuffle_another", "shuffle_random"}
    assert found.verdict == "failed"


@pytest.mark.parametrize("family", ["gru", "static"])
def test_frozen_features_are_audited_too(
    family: Literal["gru", "static"],
    data: list[RepositoryData],
    tokenizer: Tokenizer,
    base: Frozen,
    builder: ItemBuilder,
) -> None:
    """As the released models are: the paper's head, told by vectors that were made beforehand."""
    width, diff_width = 9, 7 if family == "gru" else 0
    embedded = [copy.copy(each) for each in data]
    for seed, each in enumerate(embedded):
        generator = torch.Generator().manual_seed(seed)
        each.features = Features(
            diffs=torch.randn(each.n_commits, diff_width, generator=generator),
            snapshots={n: torch.randn(width, generator=generator) for n in each.anchors},
        )
    config = replace(LEARNER, family=family, head="paper")
    base_config = make_base(tokenizer)[1]
    learner = build_frozen_learner(config, base_config, width, diff_width, seed=1)
    assert not learner.inputs.holds_out
    cases = prepare_audit(embedded, builder, CONFIG, holds_out=False)
    mean = mean_of_training(learner, embedded, CONFIG)
    assert mean is not None and mean.lora.rank == 9

    found = audit(learner, base, cases, mean, CONFIG, n_layers=N_LAYERS)

    measured = {name for name, test in found.tests.items() if test.passed is not None}
    # The newest commit has a snapshot, so even the static adapter is newer there than before.
    unordered = {"shuffle_another", "shuffle_random"} if family == "static" else set()
    assert measured == COMPARED | OTHER_TESTS - unordered
    assert set(found.strata) >= {"all", "commit"}
    assert "file" not in found.strata
    assert found.geometry.participation_ratio > 1


def test_an_audit_that_is_asked_to_stop_stops(
    taught: Learner, base: Frozen, cases: list[AuditCase]
) -> None:
    with pytest.raises(Stopped):
        audit(taught, base, cases, None, CONFIG, n_layers=N_LAYERS, stop=lambda: True)


def test_one_repository_cannot_be_audited(
    taught: Learner, base: Frozen, cases: list[AuditCase]
) -> None:
    with pytest.raises(ValueError, match="1 repositories to audit, expected at least 2"):
        audit(taught, base, cases[:1], None, CONFIG, n_layers=N_LAYERS)


def states_of(learner: Learner, cases: list[AuditCase]) -> list[_Told]:
    with torch.no_grad():
        return [_told(learner, cases, i, CONFIG) for i in range(len(cases))]
