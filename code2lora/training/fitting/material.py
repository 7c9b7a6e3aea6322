"""Gather what a fit works on: repositories in memory and a learner, for either kind of encoder.

Reads   shards, and the features that a frozen encoder made of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from code2lora.errors import UserError
from code2lora.hypernetwork.config import EncoderConfig, Recipe
from code2lora.hypernetwork.encoder import reader_kind
from code2lora.hypernetwork.encoder_gradients import GradientsEncoder
from code2lora.hypernetwork.identity import encoder_fingerprint
from code2lora.training.data.dataset import RepositoryData, load_embedded, load_repositories
from code2lora.training.data.embedding import recipe_of
from code2lora.training.data.features import Features
from code2lora.training.data.shards import Shard
from code2lora.training.evaluation.evaluate import EvaluateConfig
from code2lora.training.fitting.learner import (
    Learner,
    build_frozen_learner,
    build_learner,
    build_memory_learner,
)
from code2lora.training.publish import FrozenEncoder

if TYPE_CHECKING:
    from code2lora.training.recipe import Recipe as TrainingRecipe
    from code2lora.training.run import Decoder

RELEASED_ENCODER = "Qwen/Qwen3-Embedding-0.6B"
"""What made the vectors of the released data sets."""


@dataclass(frozen=True)
class Material:
    """What a fit works on."""

    training: list[RepositoryData]
    validation: list[RepositoryData]
    learner: Learner
    """On the decoder's device."""
    encoder: FrozenEncoder | None
    """None where the learner trains its own."""


def gather(
    recipe: TrainingRecipe,
    split: tuple[Sequence[Shard], Sequence[Shard]],
    decoder: Decoder,
    features: Path | Literal["released"] | None,
    *,
    begun: Callable[[str], None] | None = None,
) -> Material:
    """Return repositories and learner for a recipe.

    split: training and validation shards   features, begun: as for `run.fit`
    Raises UserError when the recipe and the features do not fit together.
    """
    _check(recipe, features)
    config = recipe.fit
    if features is None:
        training, validation = (
            load_repositories(each, decoder.tokenizer, begun=begun) for each in split
        )
        reading = dataclasses.replace(_reading(recipe), diff="lines", snapshot="lines")
        learner = build_learner(
            config.learner, decoder.config, decoder.tokenizer, reading, training, seed=config.seed
        )
        return Material(training, validation, learner.to(decoder.model.device), None)
    directory = None if features == "released" else Path(features)
    shards = [*split[0], *split[1]]
    reading = _reading(recipe) if directory is None else recipe_of(directory, shards)
    fingerprint = None if directory is None else encoder_fingerprint(directory, reading)
    training, validation = (load_embedded(each, fingerprint) for each in split)
    if directory is not None and reading.adds_up:
        reader = GradientsEncoder.over(directory, decoder.model, decoder.tokenizer, reading)
        if reader.config.base_fingerprint not in (None, decoder.config.fingerprint):
            raise UserError(
                f"the encoder in {directory} was made for another base model than {decoder.path}",
                hint="fit on the base model that it was made for, or `code2lora train keys`",
            )
        learner = build_memory_learner(config.learner, decoder.config, reader, seed=config.seed)
        width = reader.width
    else:
        snapshot_width, diff_width = _widths(training)
        learner = build_frozen_learner(
            config.learner, decoder.config, snapshot_width, diff_width, seed=config.seed
        )
        width = diff_width // 2  # both recipes join two vectors of a diff
    encoder = EncoderConfig(
        id=RELEASED_ENCODER if directory is None else directory.resolve().name,
        width=width,
        recipe=reading,
        fingerprint=fingerprint,
    )
    return Material(
        training,
        validation,
        learner.to(decoder.model.device),
        FrozenEncoder(encoder, directory),
    )


def monitor_settings(recipe: TrainingRecipe) -> EvaluateConfig:
    """Return what is looked at while training: the evaluation, made cheap."""
    return dataclasses.replace(
        recipe.evaluate,
        file_items=recipe.fit.monitor_items,
        commit_items=recipe.fit.monitor_items,
        wrong=1,
        resamples=1,
    )


def _reading(recipe: TrainingRecipe) -> Recipe:
    mine = recipe.mine
    return Recipe(
        diff="paper",
        snapshot="paper",
        rules=mine.rules,
        snapshot_rules=mine.snapshot_rules,
        stream=mine.stream,
    )


def _widths(training: Sequence[RepositoryData]) -> tuple[int, int]:
    """Return the lengths of a snapshot's and of a diff's features."""
    for data in training:
        if isinstance(data.features, Features):
            snapshot = next(iter(data.features.snapshots.values()))
            return len(snapshot), data.features.diffs.shape[1]
    raise UserError("there are no training repositories", hint="mine some, and embed them")


def _check(recipe: TrainingRecipe, features: object) -> None:
    """Raise UserError unless a recipe can be trained on such features."""
    frozen = recipe.fit.learner.encoder == "frozen"
    if frozen != (features is not None):
        raise UserError(
            f"the recipe's encoder is {recipe.fit.learner.encoder!r}, but features were "
            + ("not given" if frozen else "given"),
            hint="frozen encoders need `--features DIRECTORY` (`code2lora train embed`), a `lines` "
            "encoder is trained here, as by `--recipe mini-gru`",
        )
    if recipe.fit.windows.nearest == 0 and recipe.mine.rules != "paper":
        raise UserError(
            f"windows.nearest is 0, but diffs by the rules {recipe.mine.rules!r} may tell the tests"
            " that are asked for",
            hint='set mine.rules = "paper", or fit.windows.nearest = 1',
        )
    is_memory = recipe.fit.learner.family == "memory"
    adds_up = isinstance(features, Path) and reader_kind(features) == "gradients"
    if is_memory != adds_up:
        raise UserError(
            f"the recipe's family is {recipe.fit.learner.family!r}, but the features are "
            + ("" if adds_up else "not ")
            + "the base model's gradients",
            hint="the family `memory` needs them, and they need it; see `code2lora train keys`",
        )
