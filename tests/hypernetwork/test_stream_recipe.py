"""The stream in a checkpoint's recipe: named, implied, and no reason for another fingerprint."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest

from code2lora.errors import UserError
from code2lora.history.rules import RECIPES
from code2lora.history.stream import STREAMS
from code2lora.hypernetwork import models
from code2lora.hypernetwork.config import CheckpointConfig, parse_config
from code2lora.hypernetwork.identity import encoder_fingerprint, read_config
from tests.hypernetwork import tiny

MINI = Path(models.__file__).parent / "bundled" / "mini"


def with_recipe(**changes: object) -> CheckpointConfig:
    config = tiny.checkpoint_config()
    recipe = replace(config.encoder.recipe, **changes)  # type: ignore[arg-type]
    return replace(config, encoder=replace(config.encoder, recipe=recipe))


def test_a_recipe_that_names_no_stream_advances_on_every_commit() -> None:
    values = dataclasses.asdict(tiny.checkpoint_config())
    del values["encoder"]["recipe"]["stream"], values["encoder"]["recipe"]["snapshot_rules"]

    recipe = parse_config(values, where="c").encoder.recipe

    assert (recipe.stream, recipe.snapshot_rules) == ("commits", None)


def test_every_stream_is_read_and_no_other() -> None:
    for name in STREAMS:
        config = with_recipe(stream=name)
        assert parse_config(json.loads(config.canonical()), where="c") == config
    values = json.loads(with_recipe(stream="assertions").canonical())
    values["encoder"]["recipe"]["stream"] = "days"
    with pytest.raises(UserError) as caught:
        parse_config(values, where="c")
    assert caught.value.message == (
        "c: encoder.recipe.stream is 'days', expected one of: assertions, commits"
    )


def test_what_goes_without_saying_leaves_fingerprints_as_they_were() -> None:
    """The bundled checkpoint was written before recipes named a stream."""
    file = json.loads((MINI / "hypernetwork" / "config.json").read_text())
    config = read_config(MINI / "hypernetwork")

    assert set(file["encoder"]["recipe"]) == {"diff", "snapshot", "rules"}
    assert json.loads(config.canonical())["encoder"] == file["encoder"]
    found = encoder_fingerprint(MINI / "encoder", config.encoder.recipe)
    assert found == file["encoder"]["fingerprint"]


def test_another_stream_is_another_checkpoint_behind_the_same_encoder(tmp_path: Path) -> None:
    ours, theirs = with_recipe(), with_recipe(stream="assertions")
    assert ours.identity() != theirs.identity()
    recipes = [config.encoder.recipe for config in (ours, theirs)]
    prints = {encoder_fingerprint(tmp_path, recipe) for recipe in recipes}
    assert len(prints) == 1  # features of a diff do not depend on which commits are steps

    other = with_recipe(snapshot_rules=next(iter(RECIPES))).encoder.recipe
    assert encoder_fingerprint(tmp_path, other) not in prints
