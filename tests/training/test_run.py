from __future__ import annotations

import json
from pathlib import Path

import pytest

from code2lora.errors import UserError
from code2lora.hypernetwork.checkpoint import load_family
from code2lora.hypernetwork.models import resolve_model
from code2lora.training import run
from code2lora.training.data.mining import Repository
from code2lora.training.data.shards import read_shards
from code2lora.training.recipe import Recipe, parse_recipe
from code2lora.training.split import bucket
from tests.training.worlds import MORE_WORDS, make_repository

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
n_lanes = 2
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
[evaluate]
file_items = 2
commit_items = 2
recent_commits = 3
replay_commits = 1
resamples = 20
"""


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return parse_recipe(RECIPE, where="test")


@pytest.fixture(scope="module")
def names() -> dict[str, list[str]]:
    """Names by what their buckets are for, found by counting up."""
    found: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for i in range(60):
        kind = {8: "validation", 9: "test"}.get(bucket(f"owner/name-{i}"), "train")
        found[kind].append(f"owner/name-{i}")
    return {kind: every[:n] for (kind, every), n in zip(found.items(), (2, 2, 1), strict=True)}


@pytest.fixture(scope="module")
def mined(
    recipe: Recipe,
    names: dict[str, list[str]],
    repositories: list[Repository],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Five names in three kinds of buckets, each with a small repository of its own."""
    out_dir = tmp_path_factory.mktemp("mined-by-bucket")
    more = [make_repository(out_dir / "git", name) for name in MORE_WORDS]
    every = [name for kind in names.values() for name in kind]
    given = [
        Repository(name, repository.git_dir)
        for name, repository in zip(every, [*repositories, *more], strict=True)
    ]
    results = run.mine(recipe, given, out_dir / "mined")
    assert [result.status for result in results] == ["mined"] * 5
    return out_dir / "mined"


def test_the_stages_make_a_model_that_loads_with_its_figures(
    recipe: Recipe,
    names: dict[str, list[str]],
    mined: Path,
    decoder: run.Decoder,
    tmp_path: Path,
) -> None:
    out_dir = tmp_path / "model"

    result = run.fit(recipe, mined, decoder, out_dir)
    evaluation = run.evaluate(recipe, mined, decoder, out_dir)

    assert (result.step, result.finished) == (3, True)
    loaded = load_family(resolve_model(str(out_dir), tmp_path))
    assert loaded.config.base.id == "tiny"
    assert loaded.config.encoder.recipe.rules == "source"
    assert loaded.config.metrics == evaluation.headline()
    content = json.loads((out_dir / "evaluation.json").read_text())
    measured = [repository["name"] for repository in content["repositories"]]
    assert measured == sorted(names["validation"])


def test_repositories_of_the_test_bucket_are_never_read(
    names: dict[str, list[str]], mined: Path
) -> None:
    training, validation = run.split(mined)

    assert {shard.name for shard in training} == set(names["train"])
    assert {shard.name for shard in validation} == set(names["validation"])


def test_a_run_that_is_asked_to_stop_publishes_nothing_and_goes_on_later(
    recipe: Recipe, mined: Path, decoder: run.Decoder, tmp_path: Path
) -> None:
    out_dir = tmp_path / "model"

    assert not run.fit(recipe, mined, decoder, out_dir, stop=lambda: True).finished
    assert not (out_dir / "hypernetwork").exists()
    assert run.fit(recipe, mined, decoder, out_dir).finished
    assert (out_dir / "hypernetwork" / "config.json").is_file()


def test_a_missing_base_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no base model at"):
        run.load_decoder(tmp_path, name="tiny")


def test_too_few_validation_repositories_are_a_user_error(
    recipe: Recipe,
    mined: Path,
    decoder: run.Decoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run.fit(recipe, mined, decoder, tmp_path / "model")
    shards = [shard for shard in read_shards(mined) if shard.split == "train"]
    monkeypatch.setattr(run, "read_shards", lambda mined: shards)
    with pytest.raises(UserError, match="0 validation repositories, expected at least 2"):
        run.evaluate(recipe, mined, decoder, tmp_path / "model")
