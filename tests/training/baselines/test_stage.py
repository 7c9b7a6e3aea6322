from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from code2lora.errors import UserError
from code2lora.hypernetwork.lora import Lora
from code2lora.training import run
from code2lora.training.baselines.loading import (
    FULL_TUNING,
    FULL_TUNING_RAG,
    REPOSITORY_LORA,
    ROWS,
    SHARED_LORA,
    TEXT_LORA,
    baseline_adapter,
    is_trained,
    load_baseline,
    tuned_decoder,
)
from code2lora.training.baselines.material import BaselineMaterial, Compared
from code2lora.training.baselines.stage import train_baselines
from code2lora.training.data.dataset import RepositoryData
from code2lora.training.data.mining import Repository
from code2lora.training.data.shards import read_shards
from code2lora.training.evaluation.suites import CROSS_REPO, IN_REPO, SuiteCase
from code2lora.training.fitting.fit import FitRun
from code2lora.training.fitting.items import Item
from code2lora.training.recipe import Recipe, parse_recipe
from code2lora.training.split import bucket
from tests.training.worlds import make_base

RECIPE = """
[mine]
commits = 9
anchor_every = 4
target_every = 1
[mine.targets]
max_lines = 4
min_chars = 8
prefix_chars = 120
[fit]
max_steps = 3
monitor_every = 2
monitor_items = 1
warmup_steps = 1
margin_rows = 2
autocast_bf16 = false
tensorboard = false
[fit.learner]
encoder_width = 12
hidden_width = 14
trunk_width = 10
rank = 3
[fit.windows]
repositories = 2
commits = 3
states = 2
[fit.items]
max_tokens = 40
prefix_tokens = 16
suffix_tokens = 6
[baselines]
watch_every = 2
watched_rows = 1
context_tokens = 24
[baselines.repository]
rows_per_step = 2
max_steps = 2
look_every = 1
repositories_at_once = 3
validation_share = 0.3
[evaluate]
file_items = 2
commit_items = 2
recent_commits = 3
replay_commits = 1
out_of_time_gap = 1
chunk_tokens = 12
"""


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return parse_recipe(RECIPE, where="test")


@pytest.fixture(scope="module")
def mined(
    recipe: Recipe, repositories: list[Repository], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two training repositories, two of validation and one of test, of the small worlds."""
    names: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for i in range(60):
        kind = {8: "validation", 9: "test"}.get(bucket(f"owner/name-{i}"), "train")
        names[kind].append(f"owner/name-{i}")
    chosen = [*names["train"][:2], *names["validation"][:2], *names["test"][:1]]
    given = [
        Repository(name, repositories[i % len(repositories)].git_dir)
        for i, name in enumerate(chosen)
    ]
    out_dir = tmp_path_factory.mktemp("mined-for-baselines")
    assert [each.status for each in run.mine(recipe, given, out_dir)] == ["mined"] * 5
    return out_dir


@pytest.fixture(scope="module")
def decoder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> run.Decoder:
    path = tmp_path_factory.mktemp("base-for-baselines")
    make_base(tokenizer)[0].save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    return run.load_decoder(path, name="tiny")


@pytest.fixture(scope="module")
def trained(
    recipe: Recipe, mined: Path, decoder: run.Decoder, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """All rows, trained once."""
    out_dir = tmp_path_factory.mktemp("baselines")
    before = {name: tensor.clone() for name, tensor in decoder.model.state_dict().items()}
    told: list[tuple[float, str]] = []

    results = train_baselines(
        recipe, mined, decoder, out_dir, progress=lambda share, said: told.append((share, said))
    )

    assert [(each.row, each.finished) for each in results] == [(row, True) for row in ROWS]
    assert [share for share, _ in told] == sorted(share for share, _ in told)
    assert {said.split(":")[0] for _, said in told} == set(ROWS)
    for name, tensor in decoder.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    return out_dir


@pytest.fixture(scope="module")
def cases(recipe: Recipe, mined: Path, decoder: run.Decoder) -> list[SuiteCase]:
    """What is asked of the validation repositories."""
    return BaselineMaterial(recipe, mined, decoder, Compared()).suite(CROSS_REPO)


def _differ(one: Lora | None, other: Lora | None) -> bool:
    assert one is not None and other is not None
    return any(not torch.equal(one.b[target], other.b[target]) for target in one.b)


def test_every_row_is_read_back_as_what_it_is(
    trained: Path, cases: list[SuiteCase], decoder: run.Decoder
) -> None:
    first, second = cases
    for row in ROWS:
        baseline = load_baseline(trained / row, decoder.config)
        assert baseline.row == row
        assert (baseline.decoder() is not None) == (row in (FULL_TUNING, FULL_TUNING_RAG))
        assert not (trained / row / "run").exists()

    shared = load_baseline(trained / SHARED_LORA)
    assert not _differ(shared.adapter(first), shared.adapter(second))
    text = load_baseline(trained / TEXT_LORA)
    assert _differ(text.adapter(first), text.adapter(second))
    assert baseline_adapter(trained / FULL_TUNING, first) is None
    assert baseline_adapter(trained / REPOSITORY_LORA, first) is not None


def test_the_tuned_decoders_differ_from_the_base_and_from_each_other(
    trained: Path, decoder: run.Decoder
) -> None:
    models = [decoder.model, *(tuned_decoder(trained / r) for r in (FULL_TUNING, FULL_TUNING_RAG))]
    heads = [model.get_input_embeddings().weight for model in models]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])
    plain = AutoModelForCausalLM.from_pretrained(trained / FULL_TUNING / "model")
    assert torch.equal(plain.get_input_embeddings().weight, heads[1])
    assert (trained / FULL_TUNING / "model" / "tokenizer.json").is_file()


def test_what_is_not_trained_is_a_user_error(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no trained row at"):
        load_baseline(tmp_path)
    with pytest.raises(UserError, match="expected a fully tuned decoder"):
        tuned_decoder(trained / SHARED_LORA)


def test_a_row_of_another_base_is_refused(trained: Path, decoder: run.Decoder) -> None:
    other = dataclasses.replace(decoder.config, fingerprint="0" * 64)

    with pytest.raises(UserError, match="was trained on tiny with other weights"):
        load_baseline(trained / SHARED_LORA, other)


def test_a_lora_that_knows_what_is_asked_is_refused(trained: Path, cases: list[SuiteCase]) -> None:
    own = load_baseline(trained / REPOSITORY_LORA)
    (first, *_) = cases
    unseen = next(f.path for f in first.data.files(first.anchor) if f.path not in first.held_out)

    with pytest.raises(UserError, match="was trained up to its commit"):
        own.adapter(dataclasses.replace(first, told_up_to=0))
    with pytest.raises(UserError, match="or on files that are asked about"):
        own.adapter(dataclasses.replace(first, held_out=frozenset({unseen, *first.held_out})))


def test_a_repository_without_a_lora_has_none(
    trained: Path, cases: list[SuiteCase], mined: Path
) -> None:
    (untrained,) = [shard for shard in read_shards(mined) if bucket(shard.name) == 9]
    case = dataclasses.replace(cases[0], data=RepositoryData(untrained, None))

    assert load_baseline(trained / REPOSITORY_LORA).adapter(case) is None


def test_a_lora_of_another_mining_is_refused(trained: Path, cases: list[SuiteCase]) -> None:
    case = cases[0]
    (folder,) = {
        path.parent
        for path in trained.glob(f"{REPOSITORY_LORA}/*/*/baseline.json")
        if case.name.replace("/", "+") in str(path)
        and str(path.parent).endswith(f"-{case.told_up_to}")
    }
    manifest = folder / "baseline.json"
    before = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(before), "n_commits": 99}))
    try:
        with pytest.raises(UserError, match="was mined again"):
            load_baseline(trained / REPOSITORY_LORA).adapter(case)
    finally:
        manifest.write_text(before)


def test_every_evaluated_repository_has_a_lora_of_its_own(
    trained: Path, recipe: Recipe, mined: Path, decoder: run.Decoder
) -> None:
    material = BaselineMaterial(recipe, mined, decoder, Compared())
    own = load_baseline(trained / REPOSITORY_LORA)
    asked = [*material.suite(CROSS_REPO), *material.suite(IN_REPO)]

    adapters = [own.adapter(case) for case in asked]

    assert len(asked) == 4
    assert all(adapter is not None for adapter in adapters)
    manifests = [
        json.loads(p.read_text()) for p in trained.glob("repository_lora/*/*/baseline.json")
    ]
    names = {each.name for each in read_shards(mined) if bucket(each.name) != 9}
    assert {each["repository"] for each in manifests} == names
    assert all(each["best_nll"] <= each["base_nll"] for each in manifests)


def test_rows_that_are_complete_are_left_alone(
    trained: Path, recipe: Recipe, mined: Path, decoder: run.Decoder
) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*.safetensors")}

    results = train_baselines(recipe, mined, decoder, trained)

    assert all(each.finished for each in results)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*.safetensors")} == before


def test_rows_of_other_settings_are_not_left_standing(
    trained: Path, recipe: Recipe, mined: Path, decoder: run.Decoder
) -> None:
    other = dataclasses.replace(recipe, fit=dataclasses.replace(recipe.fit, seed=2))

    for row in (SHARED_LORA, TEXT_LORA, REPOSITORY_LORA):
        with pytest.raises(UserError, match="was trained with other settings"):
            train_baselines(other, mined, decoder, trained, [row])


@pytest.mark.parametrize("row", [SHARED_LORA, TEXT_LORA, REPOSITORY_LORA, FULL_TUNING_RAG])
def test_a_row_that_was_cut_off_ends_as_the_uninterrupted_one(
    row: str,
    trained: Path,
    recipe: Recipe,
    mined: Path,
    decoder: run.Decoder,
    tmp_path: Path,
) -> None:
    asked = iter([False, True])

    (cut,) = train_baselines(recipe, mined, decoder, tmp_path, [row], stop=lambda: next(asked))
    assert not cut.finished
    assert not is_trained(tmp_path / row)
    (whole,) = train_baselines(recipe, mined, decoder, tmp_path, [row])

    assert whole.finished
    files = sorted(
        path.relative_to(trained / row) for path in (trained / row).rglob("*.safetensors")
    )
    assert files
    for file in files:
        expected, found = load_file(trained / row / file), load_file(tmp_path / row / file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), file


@pytest.mark.parametrize("distillation", [0.0, 1.0])
def test_shared_rows_are_trained_on_the_items_of_the_hypernetwork(
    distillation: float,
    recipe: Recipe,
    mined: Path,
    decoder: run.Decoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fit = dataclasses.replace(recipe.fit, distillation_weight=distillation, teacher_tokens=8)
    recipe = dataclasses.replace(recipe, fit=fit)
    expected: list[list[Item]] = []
    plain_step = FitRun.step

    def step(self: FitRun) -> object:
        sampled = self._sampler.windows

        def windows(*args: object) -> object:
            found = sampled(*args)
            expected.append([item for window in found for item in window.items])
            return found

        monkeypatch.setattr(self._sampler, "windows", windows)
        report = plain_step(self)
        monkeypatch.setattr(self._sampler, "windows", sampled)
        return report

    monkeypatch.setattr(FitRun, "step", step)
    run.fit(recipe, mined, decoder, tmp_path)

    source = BaselineMaterial(recipe, mined, decoder, Compared()).source(SHARED_LORA)
    assert [source.items(number) for number in range(3)] == expected


def test_the_steps_are_those_of_the_model_that_is_compared_with(
    recipe: Recipe, mined: Path, decoder: run.Decoder, tmp_path: Path
) -> None:
    run.fit(recipe, mined, decoder, tmp_path)
    by_time = dataclasses.replace(recipe.fit, max_steps=None, max_seconds=1.0)
    recipe = dataclasses.replace(recipe, fit=by_time)

    like = BaselineMaterial(recipe, mined, decoder, Compared(like=tmp_path))
    assert like.steps == 3
    with pytest.raises(UserError, match="nothing says how many steps"):
        _ = BaselineMaterial(recipe, mined, decoder, Compared()).steps


def test_an_unknown_row_is_a_user_error(
    recipe: Recipe, mined: Path, decoder: run.Decoder, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="there is no row 'other'"):
        train_baselines(recipe, mined, decoder, tmp_path, ["other"])
