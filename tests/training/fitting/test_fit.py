from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from code2lora.errors import UserError
from code2lora.training.data.dataset import LINES, RepositoryData
from code2lora.training.data.features import Features
from code2lora.training.evaluation.evaluate import EvaluateConfig, prepare
from code2lora.training.evaluation.report import Evaluation
from code2lora.training.fitting.fit import FitRun, fit, gain
from code2lora.training.fitting.items import ItemBuilder, ItemConfig
from code2lora.training.fitting.learner import (
    LearnerConfig,
    build_frozen_learner,
    build_learner,
    told_states,
)
from code2lora.training.fitting.objective import freeze
from code2lora.training.fitting.schedule import FitConfig, FitProgress
from code2lora.training.fitting.windows import WindowConfig
from tests.training.worlds import make_base

CONFIG = FitConfig(
    learner=LearnerConfig(encoder_width=12, hidden_width=14, trunk_width=10, rank=3, alpha=6.0),
    windows=WindowConfig(repositories=3, commits=3, states=2, restart_share=0.5, horizon=6),
    items=ItemConfig(max_tokens=40, prefix_tokens=16, suffix_tokens=6),
    max_steps=6,
    learning_rate=1e-2,
    encoder_learning_rate=1e-2,
    warmup_steps=2,
    margin_rows=3,
    settle_every=2,
    monitor_every=3,
    autocast_bf16=False,
    tensorboard=False,
)

D_SNAPSHOT, D_DIFF = 10, 6

MakeRun = Callable[..., FitRun]


@pytest.fixture(scope="module")
def embedded(data: list[RepositoryData]) -> list[RepositoryData]:
    """The repositories with vectors in place of bags, as a frozen encoder would give them."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for each in data:
        told = copy.copy(each)
        told.features = Features(
            torch.randn(each.n_commits, D_DIFF, generator=generator),
            {anchor: torch.randn(D_SNAPSHOT, generator=generator) for anchor in each.anchors},
        )
        found.append(told)
    return found


@pytest.fixture
def make_run(
    data: list[RepositoryData],
    embedded: list[RepositoryData],
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> MakeRun:
    """Return a fresh run of some settings in a folder below the test's own."""

    def make(config: FitConfig = CONFIG, *, out: str = "run", monitored: bool = False) -> FitRun:
        model, base_config = make_base(tokenizer)
        builder = ItemBuilder(tokenizer, config.items)
        evaluation = EvaluateConfig(file_items=2, commit_items=2, recent_commits=3)
        frozen = config.learner.encoder == "frozen"
        if frozen:
            learner = build_frozen_learner(
                config.learner, base_config, D_SNAPSHOT, D_DIFF, seed=config.seed
            )
        else:
            learner = build_learner(
                config.learner, base_config, tokenizer, LINES, data, seed=config.seed
            )
        return FitRun(
            config,
            tmp_path / out,
            learner=learner,
            base=freeze(model, autocast=config.autocast_bf16, checkpointing=config.checkpointing),
            builder=builder,
            repositories=embedded if frozen else data,
            monitor=prepare(data, builder, evaluation) if monitored else (),
            monitor_config=evaluation,
        )

    return make


def _weights(run: FitRun) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.learner.state_dict().items()}


def _assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def _config(family: str, head: str, encoder: str, **changes: Any) -> FitConfig:
    # The paper's adapters begin small and stay so for long; a large alpha makes up for it.
    alpha = 90.0 if head == "paper" else CONFIG.learner.alpha
    learner = dataclasses.replace(
        CONFIG.learner, family=family, head=head, encoder=encoder, alpha=alpha
    )
    windows = dataclasses.replace(
        CONFIG.windows,
        commits=0 if family == "static" else CONFIG.windows.commits,
        items_per_state=2 if family == "static" else 1,
    )
    return dataclasses.replace(CONFIG, learner=learner, windows=windows, **changes)


EVERY_KIND = [
    pytest.param(family, head, encoder, id=f"{family}-{head}-{encoder}")
    for family in ("gru", "static")
    for head in ("factorized", "paper")
    for encoder in ("lines", "frozen")
]


@pytest.mark.parametrize(("family", "head", "encoder"), EVERY_KIND)
def test_gradient_reaches_every_trainable_tensor(
    make_run: MakeRun, family: str, head: str, encoder: str
) -> None:
    run = make_run(_config(family, head, encoder))
    seen: set[str] = set()
    # The residual starts at zero, and so does the gradient of all that lies behind it. A window
    # that goes on says nothing about how states begin.
    for _ in range(4):
        run.step()
        for name, parameter in run.learner.named_parameters():
            if parameter.grad is not None and parameter.grad.abs().sum() > 0:
                seen.add(name)

    assert seen == {name for name, _ in run.learner.named_parameters()}
    assert ("inputs.table" in seen) == (encoder == "lines")


@pytest.mark.parametrize(("family", "head", "encoder"), EVERY_KIND)
def test_loss_falls_and_adapters_change_for_every_kind(
    make_run: MakeRun, family: str, head: str, encoder: str
) -> None:
    losses: list[float] = []
    run = make_run(_config(family, head, encoder, max_steps=30, autocast_bf16=True))
    before = run.learner.family.generic()

    fit(run, progress=lambda report: losses.append(report.loss))

    after = run.learner.family.generic()
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])
    assert not torch.equal(before.b["q_proj"], after.b["q_proj"])


@pytest.mark.parametrize("family", ["gru", "static"])
def test_states_on_frozen_features_are_those_of_the_family(
    make_run: MakeRun, embedded: list[RepositoryData], family: str
) -> None:
    run = make_run(_config(family, "paper", "frozen"))
    run.step()
    told, features = embedded[0], embedded[0].features
    assert features is not None

    with torch.no_grad():
        states = told_states(run.learner, told, 4, 8)

    state = run.learner.family.initial(features.snapshots[4])
    for index in range(5, 9):
        state = run.learner.family.advance(state, features.diffs[index])
    if family == "gru":
        torch.testing.assert_close(states[-1], state["h"])
    else:
        expected = [features.snapshots[max(a for a in told.anchors if a <= i)] for i in range(4, 9)]
        torch.testing.assert_close(states, torch.stack(expected))
        torch.testing.assert_close(states[0], state["snapshot"])


def test_holding_files_out_of_frozen_features_is_a_user_error(
    make_run: MakeRun, embedded: list[RepositoryData]
) -> None:
    run = make_run(_config("gru", "paper", "frozen"))

    with pytest.raises(UserError, match="1 files are to be held out"):
        told_states(run.learner, embedded[0], 4, 6, frozenset({"a.py"}))


def test_a_static_family_with_commits_is_a_user_error(make_run: MakeRun) -> None:
    config = _config("static", "paper", "frozen")
    with pytest.raises(UserError, match=r"windows.commits is 3"):
        make_run(dataclasses.replace(config, windows=CONFIG.windows))


def test_distillation_brings_adapters_nearer_to_the_teacher(make_run: MakeRun) -> None:
    windows = dataclasses.replace(CONFIG.windows, taught_share=1.0)
    config = dataclasses.replace(
        CONFIG,
        windows=windows,
        max_steps=30,
        teacher_tokens=24,
        target_weight=0.0,
        margin_weight=0.0,
        distillation_weight=1.0,
    )
    found: list[float] = []

    fit(make_run(config), progress=lambda report: found.append(report.distillation))

    assert min(found) > 0
    assert sum(found[-8:]) < 0.95 * sum(found[:8])


def test_no_weight_no_teacher(make_run: MakeRun) -> None:
    assert make_run().step().distillation == 0.0


def test_a_run_whose_looks_get_no_better_stops_early(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    # (own - base, own - wrong); the second look is the best of the first four by their sum
    looks = iter([(-0.1, -0.1), (-0.4, -0.3), (-0.5, -0.1), (-0.2, -0.45), (-0.9, -0.9)])

    def evaluate(*_: Any) -> Any:
        base, wrong = (SimpleNamespace(mean=mean) for mean in next(looks))
        every = SimpleNamespace(own_minus_base=base, own_minus_wrong=wrong)
        return SimpleNamespace(strata={"all": every})

    monkeypatch.setattr("code2lora.training.fitting.fit.evaluate", evaluate)
    config = dataclasses.replace(CONFIG, max_steps=50, monitor_every=1, patience=2)
    result = fit(make_run(config, monitored=True))

    assert (result.step, result.best_step, result.finished) == (4, 2, True)
    assert result.stopped_early
    assert result.best_own_minus_wrong == -0.3


def test_checkpointing_trains_the_same_weights(make_run: MakeRun) -> None:
    plain = make_run(out="plain")
    again = make_run(dataclasses.replace(CONFIG, checkpointing=True), out="again")
    for run in (plain, again):
        fit(run)

    for name, tensor in _weights(plain).items():
        torch.testing.assert_close(_weights(again)[name], tensor, rtol=1e-3, atol=1e-5)


def test_loss_falls_and_adapters_of_repositories_differ(
    make_run: MakeRun, data: list[RepositoryData]
) -> None:
    losses: list[float] = []
    run = make_run(dataclasses.replace(CONFIG, max_steps=40))

    fit(run, progress=lambda report: losses.append(report.loss))

    assert sum(losses[-8:]) < 0.85 * sum(losses[:8])
    family = run.learner.family
    states = torch.stack([told_states(run.learner, each, 4, 6)[-1] for each in data])
    lora = family.lora(states)
    for target, b in lora.b.items():
        delta = (b @ lora.a[target]).flatten(1)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert (delta[i] - delta[j]).norm() > 0.01 * delta[i].norm(), target


def test_the_same_seed_gives_the_same_weights_and_another_does_not(make_run: MakeRun) -> None:
    first, second = make_run(out="a"), make_run(out="b")
    other = make_run(dataclasses.replace(CONFIG, seed=2), out="c")
    for run in (first, second, other):
        fit(run)

    _assert_same(_weights(first), _weights(second))
    assert not torch.equal(first.learner.inputs.table, other.learner.inputs.table)


def test_a_resumed_run_ends_as_the_uninterrupted_one(make_run: MakeRun) -> None:
    whole = make_run(out="whole", monitored=True)
    expected = fit(whole)

    asked = iter([False, False, False, False, True])
    first = fit(make_run(out="cut", monitored=True), stop=lambda: next(asked))
    assert (first.step, first.finished) == (4, False)
    resumed = make_run(out="cut", monitored=True)
    steps: list[int] = []
    result = fit(resumed, progress=lambda report: steps.append(report.step))

    assert steps == [5, 6]
    assert result == expected
    _assert_same(_weights(resumed), _weights(whole))


def test_a_run_of_other_settings_is_not_resumed(make_run: MakeRun) -> None:
    fit(make_run(dataclasses.replace(CONFIG, max_steps=1)))

    with pytest.raises(UserError, match="was made with other settings"):
        fit(make_run(dataclasses.replace(CONFIG, margin=0.3)))


def test_a_run_of_other_repositories_is_not_resumed(
    make_run: MakeRun, data: list[RepositoryData]
) -> None:
    fit(make_run(dataclasses.replace(CONFIG, max_steps=1)))
    run = make_run()
    run._names = [*run._names, "test/another"]

    with pytest.raises(UserError, match="was made with 3 repositories, but 4 are given"):
        run.resume()


def test_a_half_written_checkpoint_is_passed_over(make_run: MakeRun, tmp_path: Path) -> None:
    fit(make_run(dataclasses.replace(CONFIG, max_steps=2)))
    (tmp_path / "run" / ".tmp-checkpoint-9").mkdir()
    (tmp_path / "run" / "checkpoint-9").mkdir()

    run = make_run(dataclasses.replace(CONFIG, max_steps=2))

    assert run.resume()
    assert run.n_steps == 2


def test_the_learner_ends_with_the_weights_of_the_best_look(make_run: MakeRun) -> None:
    looks: dict[int, Evaluation] = {}

    def note(report: FitProgress) -> None:
        if report.monitor is not None:
            looks[report.step] = report.monitor

    result = fit(make_run(monitored=True), progress=note)

    assert set(looks) == {3, 6}
    assert result.best_step == min(looks, key=lambda step: gain(looks[step]))
    best = looks[result.best_step].strata["all"]
    assert result.best_own_minus_wrong == best.own_minus_wrong.mean


def test_the_budget_in_seconds_ends_the_run_and_lowers_the_rate(
    data: list[RepositoryData], make_run: MakeRun
) -> None:
    config = dataclasses.replace(CONFIG, max_steps=None, max_seconds=1.0, warmup_steps=1)
    run = make_run(config)
    now = iter(x / 32 for x in range(10_000))  # a step looks three times
    run._clock = lambda: next(now)
    rates: list[float] = []

    result = fit(run, progress=lambda report: rates.append(report.learning_rate))

    assert result.finished
    assert result.step == 16
    assert rates[0] == pytest.approx(config.learning_rate)
    assert rates[-1] < 0.2 * config.learning_rate


def test_no_budget_and_too_few_repositories_are_user_errors(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match="no budget"):
        make_run(dataclasses.replace(CONFIG, max_steps=None))
    with pytest.raises(UserError, match="3 training repositories, but a step takes 8"):
        make_run(dataclasses.replace(CONFIG, windows=WindowConfig(repositories=8)))


def test_progress_is_written_for_tensorboard(make_run: MakeRun, tmp_path: Path) -> None:
    fit(make_run(dataclasses.replace(CONFIG, max_steps=2, tensorboard=True)))

    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"train/own_minus_wrong" in events.read_bytes()


def test_a_damaged_checkpoint_is_a_user_error(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(dataclasses.replace(CONFIG, max_steps=1))
    fit(run)
    (tensors,) = run.out_dir.glob("checkpoint-*/run.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-8])

    with pytest.raises(UserError, match="checkpoint-1 is damaged") as error:
        fit(make_run())
    assert error.value.hint == "give another output folder, or remove this one to begin again"
