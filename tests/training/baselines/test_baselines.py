from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen2ForCausalLM

from code2lora.errors import UserError
from code2lora.hypernetwork.config import BaseConfig
from code2lora.hypernetwork.inject import LoraSlots
from code2lora.training.baselines.config import RepositoryLoraConfig
from code2lora.training.baselines.context_items import (
    ContextItems,
    RetrievedContexts,
    with_context,
)
from code2lora.training.baselines.full_tuning import FullTuning
from code2lora.training.baselines.lora_files import read_lora, write_lora
from code2lora.training.baselines.own_past import Past, draw_rows, hidden_paths, pasts_of
from code2lora.training.baselines.repository_lora import BankRun
from code2lora.training.baselines.shared_lora import LoraBank, SharedLora
from code2lora.training.baselines.tuning import (
    NothingTold,
    SampledItems,
    Trainee,
    TuneConfig,
    TuneRun,
)
from code2lora.training.data.dataset import RepositoryData, Target
from code2lora.training.fitting.items import IGNORED, Item, ItemBuilder, ItemConfig, collate
from code2lora.training.fitting.objective import Frozen, freeze, row_nll
from code2lora.training.fitting.windows import WindowConfig, WindowSampler
from tests.training.worlds import make_base

ITEMS = ItemConfig(max_tokens=40, prefix_tokens=16, suffix_tokens=6)
WINDOWS = WindowConfig(repositories=3, commits=3, states=2, restart_share=0.5, horizon=6)
TUNE = TuneConfig(steps=6, learning_rate=1e-2, warmup_steps=2, watch_every=3)
OWN = RepositoryLoraConfig(
    learning_rate=2e-2,
    rows_per_step=4,
    warmup_steps=2,
    max_steps=24,
    look_every=6,
    patience=4,
    validation_share=0.25,
)


@dataclass(frozen=True)
class Question:
    """What is asked of a repository."""

    data: RepositoryData
    anchor: int
    told_up_to: int
    held_out: frozenset[str]


@pytest.fixture
def base(tokenizer: Tokenizer) -> tuple[Qwen2ForCausalLM, BaseConfig]:
    return make_base(tokenizer)


@pytest.fixture
def builder(tokenizer: Tokenizer) -> ItemBuilder:
    return ItemBuilder(tokenizer, ITEMS)


@pytest.fixture
def make_source(data: list[RepositoryData], builder: ItemBuilder) -> Callable[[], SampledItems]:
    """Return a fresh sampler of the three repositories' items, the same on every call."""
    return lambda: SampledItems(
        WindowSampler(data, builder, WINDOWS, inputs=NothingTold(holds_out=True), seed=1)
    )


def _make_trainee(kind: str, base: tuple[Qwen2ForCausalLM, BaseConfig]) -> Trainee:
    model, config = base
    if kind == "lora":
        bank = LoraBank(config, rank=3, alpha=6.0, seed=1)
        return SharedLora(bank, freeze(model, autocast=False))
    return FullTuning(model, rows_per_pass=2, autocast=False)


def _weights(trainee: Trainee) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainee.trained.items()}


def _run(trainee: Trainee, source: Any, out_dir: Path, **more: Any) -> TuneRun:
    more = {"config": TUNE, "identity": {"seed": 1}} | more
    return TuneRun(out_dir=out_dir, trainee=trainee, source=source, **more)


def _expected_nll(model: Any, item: Item) -> float:
    """The slow obvious formula, one row at a time."""
    with torch.no_grad():
        logits = model(torch.tensor([item.ids])).logits[0]
    log_p = logits.log_softmax(-1)
    places = range(item.n_given, len(item.ids))
    return -sum(float(log_p[place - 1, item.ids[place]]) for place in places)


KINDS = pytest.mark.parametrize("kind", ["lora", "full"])


@KINDS
def test_gradient_reaches_every_trained_tensor(
    kind: str,
    base: tuple[Qwen2ForCausalLM, BaseConfig],
    make_source: Callable[[], SampledItems],
    tmp_path: Path,
) -> None:
    trainee = _make_trainee(kind, base)
    run = _run(trainee, make_source(), tmp_path)
    # B starts at zero, and so does the gradient of A.
    run.step()

    run.step()

    for name, parameter in trainee.trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@KINDS
def test_loss_falls_and_the_base_stays_as_it_is(
    kind: str,
    base: tuple[Qwen2ForCausalLM, BaseConfig],
    make_source: Callable[[], SampledItems],
    tmp_path: Path,
) -> None:
    before = {name: tensor.clone() for name, tensor in base[0].state_dict().items()}
    losses: list[float] = []
    run = _run(
        _make_trainee(kind, base),
        make_source(),
        tmp_path,
        config=dataclasses.replace(TUNE, steps=40),
    )

    run.run(progress=lambda report: losses.append(report.loss))

    assert sum(losses[-8:]) < 0.85 * sum(losses[:8])
    for name, tensor in base[0].state_dict().items():
        assert torch.equal(tensor, before[name]), name


@KINDS
def test_a_row_is_scored_as_by_the_plain_formula(
    kind: str,
    base: tuple[Qwen2ForCausalLM, BaseConfig],
    make_source: Callable[[], SampledItems],
    tmp_path: Path,
) -> None:
    source = make_source()
    trainee = _make_trainee(kind, base)
    _run(trainee, source, tmp_path).run()
    items = source.items(7)

    nll, n_tokens = trainee.nll(items)

    model = trainee.model if isinstance(trainee, FullTuning) else base[0]
    slots = LoraSlots(model)
    slots.set(trainee.bank.one(0) if isinstance(trainee, SharedLora) else None)
    assert nll.tolist() == pytest.approx([_expected_nll(model, each) for each in items], rel=1e-4)
    assert n_tokens.tolist() == [len(each.ids) - each.n_given for each in items]
    slots.remove()


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_full_tuning_has_the_gradient_of_the_plain_formula(
    power: float,
    base: tuple[Qwen2ForCausalLM, BaseConfig],
    make_source: Callable[[], SampledItems],
) -> None:
    items = make_source().items(0)
    trainee = FullTuning(base[0], rows_per_pass=2, autocast=False, length_power=power)

    loss = trainee.learn(items)

    tokens, labels = collate(items)
    plain = base[0].requires_grad_(True)
    logits, wanted = plain(tokens).logits[:, :-1], labels[:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
    n_tokens = (wanted != IGNORED).sum(1)
    assert len(n_tokens.unique()) > 1
    expected = (nll.sum(1) / n_tokens * n_tokens**power).sum() / (n_tokens**power).sum()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(trainee.trained[name].grad, parameter.grad, rtol=1e-3, atol=1e-6)


def test_activations_that_are_computed_again_give_the_same_gradients(
    base: tuple[Qwen2ForCausalLM, BaseConfig], make_source: Callable[[], SampledItems]
) -> None:
    items = make_source().items(0)
    whole = FullTuning(base[0], rows_per_pass=3, autocast=False)
    again = FullTuning(base[0], rows_per_pass=3, autocast=False, checkpoint_activations=True)

    whole.learn(items)
    again.learn(items)

    for name, parameter in whole.trained.items():
        torch.testing.assert_close(again.trained[name].grad, parameter.grad)


@KINDS
def test_a_resumed_run_ends_as_the_uninterrupted_one(
    kind: str,
    base: tuple[Qwen2ForCausalLM, BaseConfig],
    make_source: Callable[[], SampledItems],
    tmp_path: Path,
) -> None:
    watched = make_source().items(0)
    whole = _make_trainee(kind, base)
    expected = _run(whole, make_source(), tmp_path / "whole", watched=watched).run()

    asked = iter([False, False, False, False, True])
    cut = _make_trainee(kind, base)
    first = _run(cut, make_source(), tmp_path / "cut", watched=watched)
    result = first.run(stop=lambda: next(asked))
    assert (result.step, result.finished) == (4, False)
    resumed = _make_trainee(kind, base)
    steps: list[int] = []
    result = _run(resumed, make_source(), tmp_path / "cut", watched=watched).run(
        progress=lambda report: steps.append(report.step)
    )

    assert steps == [5, 6]
    assert result == expected
    for name, tensor in _weights(whole).items():
        assert torch.equal(resumed.trained[name], tensor), name


class _Walk:
    """A trainee of one number that grows by every step; rows are written best where it is 2.4."""

    def __init__(self) -> None:
        self.number = torch.nn.Parameter(torch.zeros(1))
        self.trained = {"number": self.number}

    def learn(self, items: Sequence[Item]) -> float:
        self.number.grad = -torch.ones(1)
        return 0.0

    def nll(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        return (self.number.detach() - 2.4).abs(), torch.ones(1)


def test_the_weights_that_write_the_watched_rows_best_are_kept(
    make_source: Callable[[], SampledItems], tmp_path: Path
) -> None:
    steps_of_one = dataclasses.replace(
        TUNE, learning_rate=1.0, warmup_steps=0, stable_share=1.0, watch_every=1, weight_decay=0.0
    )
    walk = _Walk()
    watched = make_source().items(0)[:1]
    run = _run(walk, make_source(), tmp_path, config=steps_of_one, watched=watched)

    result = run.run()

    assert (result.step, result.best_step) == (6, 2)
    assert result.best_watched == pytest.approx(0.4, abs=1e-3)
    assert walk.number.item() == pytest.approx(2.0, abs=1e-3)


def test_a_run_of_other_settings_is_not_resumed(
    base: tuple[Qwen2ForCausalLM, BaseConfig],
    make_source: Callable[[], SampledItems],
    tmp_path: Path,
) -> None:
    _run(_make_trainee("lora", base), make_source(), tmp_path).run()

    with pytest.raises(UserError, match="was made with other settings"):
        _run(_make_trainee("lora", base), make_source(), tmp_path, identity={"seed": 2}).run()


def test_the_rate_warms_up_stays_and_falls() -> None:
    config = TuneConfig(steps=100, learning_rate=2.0, warmup_steps=10, stable_share=0.5)

    rates = [config.rate(step) for step in (0, 9, 50, 75, 100)]

    assert rates == pytest.approx([0.2, 2.0, 2.0, 1.05, 0.1])


def test_a_lora_is_read_back_as_it_was_written(
    base: tuple[Qwen2ForCausalLM, BaseConfig], tmp_path: Path
) -> None:
    bank = LoraBank(base[1], rank=3, alpha=6.0, seed=1)
    for parameter in bank.parameters():
        parameter.data.normal_()

    write_lora(tmp_path / "one", bank.one(0), base[1])
    found = read_lora(tmp_path / "one")

    assert (found.rank, found.alpha) == (3, 6.0)
    for side, expected in ((found.a, bank.one(0).a), (found.b, bank.one(0).b)):
        assert side.keys() == expected.keys()
        assert all(torch.equal(side[target], expected[target]) for target in side)


def test_a_damaged_lora_is_a_user_error(
    base: tuple[Qwen2ForCausalLM, BaseConfig], tmp_path: Path
) -> None:
    write_lora(tmp_path / "one", LoraBank(base[1], rank=3, alpha=6.0, seed=1).one(0), base[1])
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes(b"no")

    with pytest.raises(UserError, match="is damaged"):
        read_lora(tmp_path / "one")


# --- a LoRA for each repository ---------------------------------------------------------------


def _questions(data: Sequence[RepositoryData], told_up_to: int = 6) -> list[Question]:
    return [Question(each, 4, told_up_to, frozenset()) for each in data]


def _bank_run(
    pasts: Sequence[Past],
    base: Frozen,
    config: BaseConfig,
    builder: ItemBuilder,
    out_dir: Path,
    own: RepositoryLoraConfig = OWN,
    length_power: float = 1.0,
) -> BankRun:
    bank = LoraBank(config, rank=3, alpha=6.0, seed=1, n_adapters=len(pasts))
    return BankRun(
        pasts,
        own,
        out_dir,
        bank=bank,
        base=base,
        builder=builder,
        length_power=length_power,
        max_grad_norm=1.0,
        weight_decay=0.01,
        seed=1,
        identity={"seed": 1},
    )


def _asked_rows(data: RepositoryData, after: int, builder: ItemBuilder) -> list[Item]:
    rng = random.Random(1)
    rows = [
        builder.completion(data.texts[t.file], t.path, t.start, t.end, rng)
        for t in data.commit_targets(after + 1, data.n_commits)
    ]
    return [row for row in rows if row is not None]


def test_each_repository_is_helped_by_its_own_lora_more_than_by_others(
    data: list[RepositoryData],
    base: tuple[Qwen2ForCausalLM, BaseConfig],
    builder: ItemBuilder,
    tmp_path: Path,
) -> None:
    frozen = freeze(base[0], autocast=False)
    pasts = pasts_of(_questions(data), OWN, seed=1)
    run = _bank_run(pasts, frozen, base[1], builder, tmp_path)
    assert run.run()

    for own, each in enumerate(data):
        tokens, labels = collate(_asked_rows(each, 6, builder))
        plain = row_nll(frozen, tokens, labels, None, None)[0].sum()
        scores = [row_nll(frozen, tokens, labels, run.lora(i), None)[0].sum() for i in range(3)]
        assert scores[own] < 0.9 * plain
        assert scores[own] == min(scores), each.name
    assert all(course.best_nll < course.base_nll for course in run.courses)


def test_a_bank_trains_each_lora_as_if_it_were_alone(
    data: list[RepositoryData],
    base: tuple[Qwen2ForCausalLM, BaseConfig],
    builder: ItemBuilder,
    tmp_path: Path,
) -> None:
    frozen = freeze(base[0], autocast=False)
    pasts = pasts_of(_questions(data), OWN, seed=1)
    together = _bank_run(pasts, frozen, base[1], builder, tmp_path / "together")
    together.run()

    alone = _bank_run(pasts[1:2], frozen, base[1], builder, tmp_path / "alone")
    alone.run()

    assert together.courses[1].best_step == alone.courses[0].best_step
    for target, expected in alone.lora(0).b.items():
        found = together.lora(1).b[target]
        torch.testing.assert_close(found, expected, rtol=0.05, atol=2e-3)
        assert (found - together.lora(0).b[target]).norm() > 0.1 * found.norm()


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_the_rows_of_a_bank_weigh_a_power_of_their_length(
    power: float,
    data: list[RepositoryData],
    base: tuple[Qwen2ForCausalLM, BaseConfig],
    builder: ItemBuilder,
    tmp_path: Path,
) -> None:
    (past,) = pasts_of(_questions(data)[:1], OWN, seed=1)
    rows = draw_rows(past, builder, OWN, random.Random(f"1/{past.data.name}/0"))
    once = dataclasses.replace(OWN, max_steps=1)
    losses: list[float] = []

    _bank_run([past], freeze(base[0], autocast=False), base[1], builder, tmp_path, once, power).run(
        progress=lambda report: losses.append(report.loss)
    )

    weights = [(len(row.ids) - row.n_given) ** power for row in rows]
    assert len(set(weights)) > 1
    per_token = [_expected_nll(base[0], row) / (len(row.ids) - row.n_given) for row in rows]
    mean = sum(w * loss for w, loss in zip(weights, per_token, strict=True)) / sum(weights)
    assert losses == pytest.approx([mean], rel=1e-4)


def test_a_bank_that_was_cut_off_ends_as_an_uninterrupted_one(
    data: list[RepositoryData],
    base: tuple[Qwen2ForCausalLM, BaseConfig],
    builder: ItemBuilder,
    tmp_path: Path,
) -> None:
    frozen = freeze(base[0], autocast=False)
    pasts = pasts_of(_questions(data), OWN, seed=1)
    whole = _bank_run(pasts, frozen, base[1], builder, tmp_path / "whole")
    whole.run()

    asked = iter([False] * 8 + [True])
    cut = _bank_run(pasts, frozen, base[1], builder, tmp_path / "cut")
    assert not cut.run(stop=lambda: next(asked))
    resumed = _bank_run(pasts, frozen, base[1], builder, tmp_path / "cut")
    assert resumed.run()

    assert resumed.courses == whole.courses
    for owner in range(3):
        for target, expected in whole.lora(owner).b.items():
            assert torch.equal(resumed.lora(owner).b[target], expected)


def test_a_lora_that_gets_no_better_is_the_base(
    monkeypatch: pytest.MonkeyPatch,
    data: list[RepositoryData],
    base: tuple[Qwen2ForCausalLM, BaseConfig],
    builder: ItemBuilder,
    tmp_path: Path,
) -> None:
    eager = dataclasses.replace(OWN, look_every=2, patience=2)
    pasts = pasts_of(_questions(data), eager, seed=1)
    frozen = freeze(base[0], autocast=False)
    run = _bank_run(pasts, frozen, base[1], builder, tmp_path, eager)
    # All rows are written worse with every step, but for those of the last repository.
    monkeypatch.setattr(
        run, "_validation_nll", lambda owner: 5.0 + run.n_steps * (1 if owner < 2 else -0.1)
    )

    assert run.run()

    assert [course.best_step for course in run.courses] == [0, 0, OWN.max_steps]
    assert [course.done for course in run.courses] == [True] * 3
    assert not any(b.any() for owner in (0, 1) for b in run.lora(owner).b.values())
    assert all(b.any() for b in run.lora(2).b.values())


def test_nothing_that_is_asked_about_is_trained_on(
    data: list[RepositoryData], builder: ItemBuilder
) -> None:
    for each in data:
        held_out = frozenset({each.files(4)[0].path})
        (past,) = pasts_of([Question(each, 4, 6, held_out)], OWN, seed=1)
        hidden = {f.text for a in each.anchors for f in each.files(a) if f.path in held_out}

        assert past.tasks and past.sources and past.validation
        for target in (*past.tasks, *past.validation):
            assert target.index <= 6
            assert target.path not in held_out
            assert target.file not in hidden
        for file in past.sources:
            assert file.path not in held_out
            assert file.text not in hidden


def test_the_rows_come_from_the_past_alone(
    data: list[RepositoryData], tokenizer: Tokenizer, builder: ItemBuilder
) -> None:
    """No row shows a function that only the asked-about commits brought."""
    each = data[0]
    (past,) = pasts_of([Question(each, 4, 6, frozenset())], OWN, seed=1)
    later = [t for t in each.commit_targets(7, each.n_commits)]
    asked = {each.texts[t.file][t.start : t.end] for t in later}
    known = "\n".join(
        text for target in each.commit_targets(0, 6) for text in [each.texts[target.file]]
    ) + "\n".join(each.texts[file.text] for file in each.files(4))
    new_lines = {
        line for text in asked for line in text.splitlines() if line.strip() and line not in known
    }
    assert new_lines

    for step in range(40):
        rows = draw_rows(past, builder, OWN, random.Random(step))
        for row in rows:
            shown = tokenizer.decode(list(row.ids))
            assert not any(line in shown for line in new_lines)


def test_validation_rows_are_not_trained_on(data: list[RepositoryData]) -> None:
    for told_up_to in (1, 6):
        for past in pasts_of(_questions(data, told_up_to), OWN, seed=1):
            assert past.validation
            assert not set(past.validation) & set(past.tasks)
            if told_up_to == 1:  # too few commits: whole files are kept back
                kept = {target.path for target in past.validation}
                assert not kept & {target.path for target in past.tasks}
                assert not kept & {file.path for file in past.sources}
            else:
                first = min(target.index for target in past.validation)
                assert all(target.index < first for target in past.tasks)


def test_cases_share_a_past_only_where_they_are_told_the_same_commits(
    data: list[RepositoryData],
) -> None:
    first, second = (file.path for file in data[0].files(4)[:2])
    questions = [
        Question(data[0], 4, 6, frozenset({first})),
        Question(data[0], 4, 5, frozenset()),
        Question(data[0], 4, 6, frozenset({second})),
    ]

    pasts = pasts_of(questions, OWN, seed=1)

    assert [(past.told_up_to, past.hidden) for past in pasts] == [(5, set()), (6, {first, second})]


class _Renames:
    """Commits 1 to 3: a -> b, c -> d, b -> c."""

    def changes(self, index: int, held_out: frozenset[str]) -> list[Any]:
        @dataclass(frozen=True)
        class Renamed:
            old_path: str | None
            path: str

        pairs = {1: ("a", "b"), 2: ("c", "d"), 3: ("b", "c"), 4: (None, "z")}
        return [Renamed(*pairs[index])]


@pytest.mark.parametrize(
    ("held_out", "last", "expected"),
    [
        ({"b"}, 1, {"a", "b"}),
        ({"a"}, 3, {"a", "b", "c", "d"}),
        ({"z"}, 4, {"z"}),
    ],
)
def test_a_held_out_file_is_hidden_under_all_its_names(
    held_out: set[str], last: int, expected: set[str]
) -> None:
    renames: Any = _Renames()

    assert hidden_paths(renames, held_out, last) == expected


# --- contexts --------------------------------------------------------------------------------


def test_contexts_stand_in_front_of_the_same_items(
    data: list[RepositoryData], builder: ItemBuilder
) -> None:
    def sampler() -> WindowSampler:
        return WindowSampler(data, builder, WINDOWS, inputs=NothingTold(holds_out=True), seed=1)

    seen: list[tuple[str, Target]] = []

    def context_of(repository: RepositoryData, target: Target) -> list[int]:
        seen.append((repository.name, target))
        return [7, 8, 9]

    plain = SampledItems(sampler()).items(0)
    found = ContextItems(sampler(), data, context_of).items(0)

    assert [item.ids for item in found] == [(7, 8, 9, *item.ids) for item in plain]
    assert [item.n_asked for item in found] == [item.n_asked for item in plain]
    assert len(seen) == len(plain)
    for name, target in seen:
        (repository,) = [each for each in data if each.name == name]
        files = [t for a in repository.anchors for t in repository.file_targets(a, {target.path})]
        assert target in [*files, *repository.commit_targets(0, repository.n_commits)]


def test_a_context_stands_behind_what_every_text_begins_with() -> None:
    item = Item(ids=(1, 2, 3, 4), n_given=3)

    assert with_context(item, [8, 9], begin=[1]) == Item(ids=(1, 8, 9, 2, 3, 4), n_given=5)
    assert with_context(item, [8, 9], begin=[5]) == Item(ids=(8, 9, 1, 2, 3, 4), n_given=5)
    assert with_context(item, [], begin=[1]) == item


class _Answer:
    """A retriever that quotes one text, whatever it is asked."""

    def __init__(self, text: str) -> None:
        self.text = text

    def retrieve(self, prefix: str, *, path: str, max_tokens: int) -> str:
        return self.text


def test_what_is_retrieved_cannot_hold_what_is_asked(
    data: list[RepositoryData], tokenizer: Tokenizer
) -> None:
    given: list[dict[str, str]] = []

    def make(files: Any, encode: Any) -> _Answer:
        given.append(dict(files))
        return _Answer("def other(): ...")

    each = data[0]
    for anchor in each.anchors:
        for target in each.file_targets(anchor, {file.path for file in each.files(anchor)}):
            RetrievedContexts(tokenizer, make, max_tokens=9)(each, target)
            assert each.texts[target.file] not in given[-1].values()
            assert set(given[-1]) < {file.path for file in each.files(anchor)}
    for target in each.commit_targets(1, each.n_commits):
        RetrievedContexts(tokenizer, make, max_tokens=9)(each, target)
        before = max(anchor for anchor in each.anchors if anchor < target.index)
        assert given[-1] == {file.path: each.texts[file.text] for file in each.files(before)}


def test_a_context_is_cut_and_one_that_spells_a_control_token_is_left_out(
    data: list[RepositoryData], tokenizer: Tokenizer
) -> None:
    def found(text: str) -> list[int]:
        contexts = RetrievedContexts(tokenizer, lambda files, encode: _Answer(text), max_tokens=4)
        return contexts(data[0], data[0].commit_targets(1, 9)[0])

    assert tokenizer.decode(found("def one(two): pass")).startswith("def")
    assert len(found("def one(two): pass")) == 4
    assert found("") == []
    assert found("x = '<|endoftext|>'") == []


def test_an_index_is_made_once_for_a_snapshot_and_the_oldest_goes(
    data: list[RepositoryData], tokenizer: Tokenizer
) -> None:
    made: list[int] = []

    def make(files: Any, encode: Any) -> _Answer:
        made.append(len(files))
        return _Answer("x")

    contexts = RetrievedContexts(tokenizer, make, max_tokens=4, n_kept=1)
    early, late = data[0].commit_targets(1, 4)[0], data[0].commit_targets(5, 9)[0]
    for target in (early, early, late, early):
        contexts(data[0], target)

    assert len(made) == 3
