"""The stages of training a hypernetwork, each one call: what `code2lora train` runs.

    mine       repositories            -> <mined>/<repository>/
    fit        mined, base             -> <out>/run/, <out>/encoder/, <out>/hypernetwork/
    evaluate   <out>, mined, base      -> <out>/evaluation.json, metrics in the checkpoint

Every stage goes on where it was cut off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from code2lora.errors import UserError
from code2lora.hypernetwork.checkpoint import load_family, save_checkpoint
from code2lora.hypernetwork.config import BaseConfig, Recipe, decoder_dims
from code2lora.hypernetwork.encoder_lines import LinesEncoder
from code2lora.hypernetwork.gru_family import GruFamily
from code2lora.hypernetwork.identity import base_fingerprint
from code2lora.hypernetwork.models import ModelPaths
from code2lora.training.data import mining
from code2lora.training.data.dataset import load_repositories
from code2lora.training.data.mining import Mined, Repository
from code2lora.training.data.shards import Shard, read_shards
from code2lora.training.evaluation.evaluate import EvaluateConfig, prepare
from code2lora.training.evaluation.evaluate import evaluate as evaluate_learner
from code2lora.training.evaluation.report import Evaluation, write_evaluation
from code2lora.training.fitting.fit import FitRun
from code2lora.training.fitting.fit import fit as fit_run
from code2lora.training.fitting.items import ItemBuilder
from code2lora.training.fitting.learner import Learner, build_learner
from code2lora.training.fitting.objective import freeze
from code2lora.training.fitting.schedule import FitProgress, FitResult
from code2lora.training.publish import generic_states, publish
from code2lora.training.recipe import Recipe as TrainingRecipe
from code2lora.training.split import HELD_OUT_BUCKETS, VALIDATION_BUCKET, bucket


@dataclass(frozen=True)
class Decoder:
    """A base decoder with what else its directory says."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    config: BaseConfig
    path: Path


def load_decoder(path: Path, *, name: str) -> Decoder:
    """Return the decoder in a directory, in float32.

    name: what checkpoints and adapters will call it. Raises UserError when it is missing.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"there is no base model at {path}: tokenizer.json is missing",
            hint="train one with `code2lora train base`, or give the path of another",
        )
    # Attention by plain products is the fastest of the kinds that have a backward pass on a CPU.
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    n_layers, dims = decoder_dims(model.config.to_dict())
    config = BaseConfig(id=name, n_layers=n_layers, dims=dims, fingerprint=base_fingerprint(path))
    return Decoder(model, Tokenizer.from_file(str(file)), config, path)


def mine(
    recipe: TrainingRecipe,
    repositories: Sequence[Repository],
    out_dir: Path,
    *,
    workers: int = 1,
    progress: Callable[[Mined, int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[Mined]:
    """Mine repositories with a recipe's settings; see `mining.mine`."""
    return mining.mine(
        repositories, out_dir, recipe.mine, workers=workers, progress=progress, stop=stop
    )


def split(mined: Path) -> tuple[list[Shard], list[Shard]]:
    """Return the training and the validation repositories of a folder, by their buckets.

    Those of the test bucket are left alone. Raises UserError when there is nothing mined.
    """
    shards = list(read_shards(mined))
    training = [shard for shard in shards if bucket(shard.name) not in HELD_OUT_BUCKETS]
    validation = [shard for shard in shards if bucket(shard.name) == VALIDATION_BUCKET]
    return training, validation


def fit(
    recipe: TrainingRecipe,
    mined: Path,
    decoder: Decoder,
    out_dir: Path,
    *,
    progress: Callable[[FitProgress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> FitResult:
    """Train encoder and hypernetwork and write both below a folder; resume a run that lies there.

    Nothing is written but a checkpoint to go on from when the run is asked to stop.
    Raises UserError when there are too few repositories, or a run of other settings is in the way.
    """
    config = recipe.fit
    training, validation = (load_repositories(each, decoder.tokenizer) for each in split(mined))
    builder = ItemBuilder(decoder.tokenizer, config.items)
    reading = Recipe(diff="lines", snapshot="lines", rules=recipe.mine.rules)
    learner = build_learner(
        config.learner, decoder.config, decoder.tokenizer, reading, training, seed=config.seed
    )
    watched = _monitor_settings(recipe)
    base = freeze(decoder.model, autocast=config.autocast_bf16, n_lanes=config.n_lanes)
    run = FitRun(
        config,
        out_dir / "run",
        learner=learner,
        base=base,
        builder=builder,
        repositories=training,
        monitor=prepare(validation, builder, watched),
        monitor_config=watched,
    )
    result = fit_run(run, progress=progress, stop=stop)
    if result.finished:
        publish(
            learner,
            config.learner,
            decoder.config,
            out_dir,
            base_dir=decoder.path,
            generic=generic_states(learner, training),
            metrics={},
        )
    return result


def evaluate(
    recipe: TrainingRecipe,
    mined: Path,
    decoder: Decoder,
    out_dir: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure a fitted model on the validation repositories, as it was published.

    Writes `evaluation.json` and puts the headline figures into the checkpoint's configuration.
    Raises UserError when the model is missing or fewer than two repositories are there.
    """
    loaded = load_family(_paths(out_dir, decoder))
    family = loaded.family
    if not isinstance(family, GruFamily) or not isinstance(family.encoder, LinesEncoder):
        raise UserError(f"{out_dir} holds no model that this stage can measure")
    validation = load_repositories(split(mined)[1], decoder.tokenizer)
    builder = ItemBuilder(decoder.tokenizer, recipe.fit.items)
    cases = prepare(validation, builder, recipe.evaluate)
    if len(cases) < 2:
        raise UserError(
            f"{len(cases)} validation repositories, expected at least 2",
            hint=f"mine repositories of bucket {VALIDATION_BUCKET}",
        )
    found = evaluate_learner(
        Learner(family, family.encoder),
        freeze(decoder.model, autocast=recipe.fit.autocast_bf16, n_lanes=recipe.fit.n_lanes),
        cases,
        recipe.evaluate,
        progress=progress,
    )
    write_evaluation(found, out_dir / "evaluation.json")
    config = dataclasses.replace(loaded.config, metrics=dict(found.headline()))
    save_checkpoint(out_dir / "hypernetwork", config, family.state_dict())
    return found


def _monitor_settings(recipe: TrainingRecipe) -> EvaluateConfig:
    """Return what is looked at while training: the evaluation, made cheap."""
    return dataclasses.replace(
        recipe.evaluate,
        file_items=recipe.fit.monitor_items,
        commit_items=recipe.fit.monitor_items,
        wrong=1,
        resamples=1,
    )


def _paths(out_dir: Path, decoder: Decoder) -> ModelPaths:
    return ModelPaths(
        name=out_dir.name,
        base=decoder.path,
        encoder=out_dir / "encoder",
        hypernetwork=out_dir / "hypernetwork",
        card=out_dir / "MODEL_CARD.md",
    )
