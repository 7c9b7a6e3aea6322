from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from code2lora.errors import UserError
from code2lora.hypernetwork.checkpoint import load_family
from code2lora.hypernetwork.encoder_lines import LinesEncoder
from code2lora.hypernetwork.models import resolve_model
from code2lora.training import run
from code2lora.training.data.dataset import LINES
from code2lora.training.data.embedding import EmbedConfig, embed_mined
from code2lora.training.data.shards import read_shards
from code2lora.training.recipe import Recipe, bundled_recipes, load_recipe, parse_recipe

RECIPE = """
[mine]
commits = 9
anchor_every = 4
[fit]
max_steps = 2
margin_rows = 2
autocast_bf16 = false
tensorboard = false
[fit.learner]
encoder = "frozen"
head = "paper"
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
held_out_share = 0.0
"""


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return parse_recipe(RECIPE, where="test")


def test_a_model_on_frozen_features_is_fitted_and_loads_with_its_encoder(
    recipe: Recipe,
    mined: Path,
    decoder: run.Decoder,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = torch.randn(tokenizer.get_vocab_size(), 5, generator=torch.Generator().manual_seed(1))
    LinesEncoder(tokenizer, table, LINES).save(tmp_path / "encoder")
    embed_mined(mined, tmp_path / "encoder", EmbedConfig(), device=torch.device("cpu"))
    shards = list(read_shards(mined))
    monkeypatch.setattr(run, "split", lambda _: (shards, []))

    result = run.fit(recipe, mined, decoder, tmp_path / "model", features=tmp_path / "encoder")

    assert result.finished
    loaded = load_family(resolve_model(str(tmp_path / "model"), tmp_path))
    assert loaded.config.head.kind == "paper"
    assert loaded.config.encoder.fingerprint == loaded.encoder_fingerprint
    assert loaded.config.encoder.id == "encoder"


def test_a_frozen_recipe_without_features_and_the_reverse_are_user_errors(
    recipe: Recipe, mined: Path, decoder: run.Decoder, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="encoder is 'frozen', but features were not given"):
        run.fit(recipe, mined, decoder, tmp_path / "out")
    with pytest.raises(UserError, match="encoder is 'lines', but features were given"):
        run.fit(Recipe(), mined, decoder, tmp_path / "out", features=tmp_path)


def test_asking_for_what_a_told_diff_may_hold_is_a_user_error(
    recipe: Recipe, mined: Path, decoder: run.Decoder, tmp_path: Path
) -> None:
    windows = dataclasses.replace(recipe.fit.windows, nearest=0)
    asking = dataclasses.replace(recipe, fit=dataclasses.replace(recipe.fit, windows=windows))

    with pytest.raises(UserError, match=r"windows\.nearest is 0"):
        run.fit(asking, mined, decoder, tmp_path / "out", features=tmp_path)


def test_bundled_recipes_are_read() -> None:
    assert bundled_recipes() == ["mini", "mini-gru", "paper", "paper-factorized"]
    for name in ("paper", "paper-factorized"):
        found = load_recipe(name)
        assert found.fit.learner.encoder == "frozen"
        assert (found.mine.rules, found.mine.stream) == ("paper", "assertions")
        assert found.fit.items.max_tokens == 2048
