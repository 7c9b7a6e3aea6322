from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from code2lora.hypernetwork.checkpoint import load_family
from code2lora.hypernetwork.config import BaseConfig
from code2lora.hypernetwork.models import ModelPaths
from code2lora.training.data.dataset import LINES, RepositoryData
from code2lora.training.evaluation.evaluate import (
    Case,
    EvaluateConfig,
    evaluate,
    prepare,
    told_states,
)
from code2lora.training.fitting.items import ItemBuilder, ItemConfig, collate
from code2lora.training.fitting.learner import Learner, LearnerConfig, build_learner
from code2lora.training.fitting.objective import Frozen, freeze, row_nll
from code2lora.training.publish import generic_states, publish
from tests.training.worlds import make_base

CONFIG = EvaluateConfig(
    file_items=3, commit_items=3, recent_commits=3, replay_commits=1, rows_per_pass=2, resamples=50
)
LEARNER = LearnerConfig(encoder_width=12, hidden_width=14, trunk_width=10, rank=3, alpha=6.0)


@pytest.fixture
def learner(data: list[RepositoryData], tokenizer: Tokenizer) -> Learner:
    _, base_config = make_base(tokenizer)
    learner = build_learner(LEARNER, base_config, tokenizer, LINES, data, seed=1)
    with torch.no_grad():  # a residual of zero would make all adapters the same
        learner.family.head.get_parameter("residual.weight").normal_()
    return learner


@pytest.fixture
def base(tokenizer: Tokenizer) -> Frozen:
    return freeze(make_base(tokenizer)[0], autocast=False)


@pytest.fixture
def cases(data: list[RepositoryData], tokenizer: Tokenizer) -> list[Case]:
    items = ItemConfig(max_tokens=48, prefix_tokens=16, suffix_tokens=8)
    return prepare(data, ItemBuilder(tokenizer, items), CONFIG)


def test_cases_ask_only_what_is_not_told(cases: list[Case]) -> None:
    assert len(cases) == 3
    for case in cases:
        assert case.told_up_to == case.data.n_commits - 1 - 3
        assert case.anchor <= case.told_up_to
        assert set(case.kinds) == {"file", "commit"}
        asked = case.data.commit_targets(case.told_up_to + 1, case.data.n_commits)
        assert {target.index for target in asked} <= {6, 7, 8}
        assert case.held_out


def test_figures_are_those_of_the_slow_way(
    learner: Learner, base: Frozen, cases: list[Case]
) -> None:
    evaluation = evaluate(learner, base, cases, CONFIG)

    with torch.no_grad():
        states = torch.stack(
            [told_states(learner, c.data, c.anchor, c.told_up_to, c.held_out)[-1] for c in cases]
        )
        adapters = learner.family.lora(states)
        for i, figures in enumerate(evaluation.repositories):
            tokens, labels = collate(cases[i].items)
            per_token = []
            for j in range(3):
                index = torch.full((len(tokens),), j)
                nll, n = row_nll(base, tokens, labels, adapters, index)
                per_token.append((nll.sum() / n.sum()).item())
            others = [per_token[j] for j in range(3) if j != i]
            assert figures.own == pytest.approx(per_token[i], rel=1e-4)
            assert figures.wrong == pytest.approx(sum(others) / 2, rel=1e-4)
            assert figures.rank == 1 + sum(other < per_token[i] for other in others)
    assert evaluation.n_adapters == 3


def test_wrong_adapters_can_be_a_sample(learner: Learner, base: Frozen, cases: list[Case]) -> None:
    config = EvaluateConfig(wrong=1, resamples=5)
    seen: list[tuple[int, int]] = []

    evaluation = evaluate(
        learner, base, cases, config, progress=lambda done, n: seen.append((done, n))
    )

    assert evaluation.n_adapters == 2
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_one_repository_alone_cannot_be_evaluated(
    learner: Learner, base: Frozen, cases: list[Case]
) -> None:
    with pytest.raises(ValueError, match="1 repositories to evaluate, expected at least 2"):
        evaluate(learner, base, cases[:1], CONFIG)


def test_a_published_model_loads_and_gives_the_learners_adapters(
    learner: Learner,
    data: list[RepositoryData],
    cases: list[Case],
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    model, base_config = make_base(tokenizer)
    model.save_pretrained(tmp_path / "base")
    hidden = generic_states(learner, data, replay_commits=2)
    paths = publish(
        learner,
        LEARNER,
        base_config,
        tmp_path,
        base_dir=tmp_path / "base",
        generic=hidden,
        metrics={"own_minus_wrong": -0.5},
    )

    loaded = load_family(paths)

    assert loaded.config.metrics == {"own_minus_wrong": -0.5}
    assert loaded.config.base.fingerprint is not None
    case = cases[0]
    with torch.no_grad():
        state = told_states(learner, case.data, case.anchor, case.told_up_to, case.held_out)[-1]
        expected = learner.family.lora(state[None])
        mean = learner.family.lora(hidden).b["q_proj"].mean(0)
    found = loaded.family.adapter({"h": state})
    generic = loaded.family.generic()
    for target, b in expected.b.items():
        torch.testing.assert_close(found.b[target], b[0])
    # the core is linear in the trunk's output, so the mean repository's B is the mean of the Bs
    torch.testing.assert_close(generic.b["q_proj"], mean, rtol=1e-4, atol=1e-5)
    encoder = loaded.family.encoder
    torch.testing.assert_close(encoder.table, learner.inputs.table.detach())


def test_publishing_rounds_the_table_to_what_its_file_holds(
    learner: Learner, data: list[RepositoryData], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    from code2lora.training.data.bags import count_tokens, encode

    paths: ModelPaths = publish(
        learner,
        LEARNER,
        BaseConfig(id="tiny", n_layers=2, dims=make_base(tokenizer)[1].dims),
        tmp_path,
        base_dir=None,
        generic=generic_states(learner, data, replay_commits=1),
        metrics={},
    )
    texts = ["def anchor_1(amber):\n    return 1\n", ""]
    bags = count_tokens(learner.inputs.encoder, texts)

    vectors = SentenceTransformer(str(paths.encoder), device="cpu").encode(
        texts, convert_to_tensor=True
    )

    ours = encode(learner.inputs.table.detach(), [bags.mean(row) for row in range(2)])
    torch.testing.assert_close(vectors.float(), ours, rtol=2e-2, atol=2e-3)
    assert sum(f.stat().st_size for f in paths.encoder.rglob("model.safetensors")) < (
        2 * learner.inputs.table.numel() + 1000
    )
