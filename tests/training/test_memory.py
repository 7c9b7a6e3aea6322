"""The family `memory` from mined repositories to states: keys, embedding, fitting, the daemon."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path

import pytest
import torch

from code2lora.errors import UserError
from code2lora.history import open_history
from code2lora.history.model import SourceFile
from code2lora.history.rules import FileRules
from code2lora.hypernetwork.checkpoint import load_family
from code2lora.hypernetwork.encoder_gradients import GradientsEncoder, key_name
from code2lora.hypernetwork.identity import encoder_fingerprint
from code2lora.hypernetwork.memory_family import MemoryFamily
from code2lora.hypernetwork.models import resolve_model
from code2lora.training import run
from code2lora.training.baselines.loading import SHARED_LORA
from code2lora.training.baselines.material import BaselineMaterial, Compared
from code2lora.training.data.dataset import load_embedded
from code2lora.training.data.embedding import EmbedConfig, embed_mined, recipe_of
from code2lora.training.data.mining import Repository
from code2lora.training.data.shards import read_shards
from code2lora.training.fitting.inputs import PartInputs
from code2lora.training.fitting.items import ItemBuilder
from code2lora.training.fitting.learner import Learner, told_states
from code2lora.training.fitting.material import gather
from code2lora.training.fitting.windows import WindowSampler
from code2lora.training.pretraining.keys import KeySearch, find_keys
from code2lora.training.pretraining.keys_config import KeysConfig
from code2lora.training.recipe import Recipe, parse_recipe
from tests.training.test_run import RECIPE

KEYS = KeysConfig(n_keys=3, excerpt_tokens=32, snapshot_files=3, diff_files=2)


@pytest.fixture
def recipe() -> Recipe:
    recipe = parse_recipe(RECIPE, where="test")
    learner = dataclasses.replace(recipe.fit.learner, family="memory", encoder="frozen")
    fit = dataclasses.replace(recipe.fit, learner=learner, learning_rate=1e-2, n_lanes=1)
    return dataclasses.replace(recipe, keys=KEYS, fit=fit)


@pytest.fixture
def encoder_dir(decoder: run.Decoder, mined: Path, tmp_path: Path) -> Path:
    """The encoder, and the features of all repositories made with it."""
    path = tmp_path / "model" / "encoder"
    assert find_keys(list(read_shards(mined)), decoder, KEYS, path) is not None
    embed_mined(mined, path, EmbedConfig(), base=decoder.path)
    return path


def test_keys_are_where_repositories_differ(decoder: run.Decoder) -> None:
    """What all repositories share is in no key; the keys of one module are orthogonal."""
    search = KeySearch(decoder.model, decoder.tokenizer, decoder.config, KEYS)
    same = [SourceFile("a.py", "a", "def anchor(): return 1\n")]
    for _ in range(3):
        search.add(same)
    with pytest.raises(UserError, match="do not differ"):
        search.keys()
    search.add([SourceFile("b.py", "b", "basket = bishop + bronze\n")])
    search.add([])
    assert search.n_repositories == 4

    keys = search.keys()

    assert set(keys) == {key_name(*place) for place in search.config.blocks.places}
    for (_, target), rows in zip(search.config.blocks.places, keys.values(), strict=True):
        assert rows.shape == (3, decoder.config.dims[target][0])
        products = rows @ rows.T
        assert torch.allclose(products, torch.diag(products.diagonal()), atol=1e-2 * products.max())
    assert not any(p.requires_grad for p in decoder.model.parameters())


def test_what_is_embedded_adds_up_to_what_the_encoder_reads(
    decoder: run.Decoder, encoder_dir: Path, mined: Path, repositories: list[Repository]
) -> None:
    shards = list(read_shards(mined))
    recipe = recipe_of(encoder_dir, shards)
    encoder = GradientsEncoder.over(encoder_dir, decoder.model, decoder.tokenizer, recipe)
    inputs = PartInputs(KEYS.diff_files)
    for shard, repository, data in zip(
        shards,
        repositories,
        load_embedded(shards, encoder_fingerprint(encoder_dir, recipe)),
        strict=True,
    ):
        rules = FileRules.named(recipe.rules)
        with closing(open_history(Path(repository.git_dir))) as history:
            for index, commit in enumerate(shard.table("commits")["commit"]):
                if index in data.anchors:
                    expected = encoder.read_snapshot(history.snapshot(commit, rules)).features
                    found = inputs.snapshot(data, index, frozenset())
                    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
                if index:
                    expected = encoder.read_diffs([history.diff(commit, rules)])[0].features
                    found = inputs.diff(data, index, frozenset())
                    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_a_held_out_file_is_not_told(encoder_dir: Path, mined: Path) -> None:
    shards = list(read_shards(mined))
    fingerprint = encoder_fingerprint(encoder_dir, recipe_of(encoder_dir, shards))
    (data, *_) = load_embedded(shards, fingerprint)
    inputs = PartInputs(KEYS.diff_files)
    anchor, paths = data.anchors[0], {file.path for file in data.files(data.anchors[0])}

    whole = inputs.snapshot(data, anchor, frozenset())
    less = inputs.snapshot(data, anchor, {min(paths)})

    assert less[-1] < whole[-1]
    assert not inputs.snapshot(data, anchor, paths).any()
    changed = next(i for i in range(1, data.n_commits) if data.changes(i, frozenset()))
    assert inputs.diff(data, changed, frozenset()).any()
    assert not inputs.diff(data, changed, paths).any()


def test_a_fitted_memory_is_served_as_it_was_trained(
    recipe: Recipe,
    decoder: run.Decoder,
    encoder_dir: Path,
    mined: Path,
    tmp_path: Path,
) -> None:
    out_dir = tmp_path / "model"

    result = run.fit(recipe, mined, decoder, out_dir, features=encoder_dir)

    assert result.finished
    loaded = load_family(resolve_model(str(out_dir), tmp_path))
    family = loaded.family
    assert isinstance(family, MemoryFamily)
    moved = {name for name, t in family.head.p.items() if t.any()}
    assert moved == set(family.head.p)
    (data, *_) = load_embedded(list(read_shards(mined)), loaded.encoder_fingerprint)
    learner = Learner(family)
    states = told_states(learner, data, 0, data.n_commits - 1)
    state = family.initial(learner.inputs.snapshot(data, 0, frozenset()))
    for index in range(1, data.n_commits):
        state = family.advance(state, learner.inputs.diff(data, index, frozenset()))
    flat = torch.cat([state["mean"], state["recent"], state["sizes"]])
    torch.testing.assert_close(states[-1], flat)


def test_a_fit_goes_on_as_if_never_stopped(
    recipe: Recipe, decoder: run.Decoder, encoder_dir: Path, mined: Path, tmp_path: Path
) -> None:
    def weights(out: Path, *, interrupted: bool) -> dict[str, torch.Tensor]:
        if interrupted:
            steps = iter([False, True])
            halted = run.fit(
                recipe, mined, decoder, out, features=encoder_dir, stop=lambda: next(steps, True)
            )
            assert not halted.finished
        run.fit(recipe, mined, decoder, out, features=encoder_dir)
        from safetensors.torch import load_file

        return load_file(out / "hypernetwork" / "model.safetensors")

    whole = weights(tmp_path / "a", interrupted=False)
    resumed = weights(tmp_path / "b", interrupted=True)

    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)


def test_family_and_features_have_to_fit(
    recipe: Recipe, decoder: run.Decoder, encoder_dir: Path, mined: Path, tmp_path: Path
) -> None:
    learner = dataclasses.replace(recipe.fit.learner, family="gru")
    gru = dataclasses.replace(recipe, fit=dataclasses.replace(recipe.fit, learner=learner))
    with pytest.raises(UserError, match="family is 'gru', but the features are the base"):
        run.fit(gru, mined, decoder, tmp_path / "x", features=encoder_dir)
    with pytest.raises(UserError, match="family is 'memory', but the features are not"):
        run.fit(recipe, mined, decoder, tmp_path / "x", features="released")


def test_another_base_of_the_same_shape_is_refused(
    recipe: Recipe, decoder: run.Decoder, encoder_dir: Path, mined: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    with torch.no_grad():
        decoder.model.model.embed_tokens.weight += 1.0
    decoder.model.save_pretrained(other)
    decoder.tokenizer.save(str(other / "tokenizer.json"))

    with pytest.raises(UserError, match="made for another base model"):
        embed_mined(mined, encoder_dir, EmbedConfig(), base=other)
    with pytest.raises(UserError, match="made for another base model"):
        wrong = run.load_decoder(other, name="tiny")
        run.fit(recipe, mined, wrong, tmp_path / "x", features=encoder_dir)


def test_what_it_is_compared_with_is_trained_on_the_same_items(
    recipe: Recipe, decoder: run.Decoder, mined: Path, encoder_dir: Path
) -> None:
    """A shared LoRA that is asked for commits alone would be an easy rival."""
    own = gather(recipe, run.split(mined), decoder, features=encoder_dir)
    builder = ItemBuilder(decoder.tokenizer, recipe.fit.items, end_id=decoder.end_id)
    sampler = WindowSampler(
        own.training,
        builder,
        recipe.fit.windows,
        inputs=own.learner.inputs,
        seed=recipe.fit.seed,
    )

    rival = BaselineMaterial(recipe, mined, decoder, Compared()).source(SHARED_LORA)

    for step in range(4):
        windows = sampler.windows(step)
        assert rival.items(step) == [item for window in windows for item in window.items]
    assert any(target.kind == "file" for window in windows for target in window.targets)
