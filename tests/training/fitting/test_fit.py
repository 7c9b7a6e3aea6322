from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from code2lora.errors import UserError
from code2lora.training.data.dataset import LINES, RepositoryData
from code2lora.training.evaluation.evaluate import EvaluateConfig, prepare, told_states
from code2lora.training.fitting.fit import FitRun, fit
from code2lora.training.fitting.items import ItemBuilder, ItemConfig
from code2lora.training.fitting.learner import LearnerConfig, build_learner
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

MakeRun = Callable[..., FitRun]


@pytest.fixture
def make_run(data: list[RepositoryData], tokenizer: Tokenizer, tmp_path: Path) -> MakeRun:
    """Return a fresh run of some settings in a folder below the test's own."""

    def make(config: FitConfig = CONFIG, *, out: str = "run", monitored: bool = False) -> FitRun:
        model, base_config = make_base(tokenizer)
        builder = ItemBuilder(tokenizer, config.items)
        evaluation = EvaluateConfig(file_items=2, commit_items=2, recent_commits=3)
        learner = build_learner(
            config.learner, base_config, tokenizer, LINES, data, seed=config.seed
        )
        return FitRun(
            config,
            tmp_path / out,
            learner=learner,
            base=freeze(model, autocast=config.autocast_bf16),
            builder=builder,
            repositories=data,
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


@pytest.mark.parametrize("head", ["factorized", "paper"])
def test_gradient_reaches_every_trainable_tensor(make_run: MakeRun, head: str) -> None:
    learner = dataclasses.replace(CONFIG.learner, head=head)
    run = make_run(dataclasses.replace(CONFIG, learner=learner))
    # The residual starts at zero, and so does the gradient of all that lies behind it.
    run.step()

    run.step()

    for name, parameter in run.learner.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


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
    assert not torch.equal(first.learner.table, other.learner.table)


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


def test_the_learner_ends_with_the_weights_of_the_widest_gap(make_run: MakeRun) -> None:
    gaps: dict[int, float] = {}

    def note(report: FitProgress) -> None:
        if report.monitor is not None:
            gaps[report.step] = report.monitor.strata["all"].own_minus_wrong.mean

    result = fit(make_run(monitored=True), progress=note)

    assert set(gaps) == {3, 6}
    assert result.best_own_minus_wrong == min(gaps.values())
    assert gaps[result.best_step] == result.best_own_minus_wrong


def test_the_budget_in_seconds_ends_the_run_and_lowers_the_rate(
    data: list[RepositoryData], make_run: MakeRun
) -> None:
    config = dataclasses.replace(CONFIG, max_steps=None, max_seconds=1.0, warmup_steps=1)
    run = make_run(config)
    now = iter(x / 16 for x in range(10_000))  # a step lasts from one look to the next
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
