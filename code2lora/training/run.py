"""The stages of training a hypernetwork, each one call: what `code2lora train` runs.

    mine       repositories            -> <mined>/<repository>/
    fit        mined, base             -> <out>/run/, <out>/encoder/, <out>/hypernetwork/
    evaluate   <out>, mined, base      -> <out>/evaluation.json, <out>/report/, metrics in the
                                          checkpoint

Every stage goes on where it was cut off.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from code2lora.errors import UserError
from code2lora.hypernetwork.config import BaseConfig, decoder_dims
from code2lora.hypernetwork.identity import base_fingerprint
from code2lora.training.data import mining
from code2lora.training.data.leakage import read_leaks
from code2lora.training.data.mining import Mined, Repository
from code2lora.training.data.shards import Shard, read_shards
from code2lora.training.evaluation.evaluate import prepare
from code2lora.training.evaluation.findings import Findings
from code2lora.training.evaluation.stage import Measuring, measure
from code2lora.training.fitting.fit import FitRun
from code2lora.training.fitting.fit import fit as fit_run
from code2lora.training.fitting.items import ItemBuilder
from code2lora.training.fitting.material import gather, monitor_settings
from code2lora.training.fitting.objective import freeze
from code2lora.training.fitting.schedule import FitProgress, FitResult
from code2lora.training.pretraining.ranks import rank
from code2lora.training.publish import generic_states, publish
from code2lora.training.recipe import Recipe as TrainingRecipe


@dataclass(frozen=True)
class Decoder:
    """A base decoder with what else its directory says."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    config: BaseConfig
    path: Path

    @property
    def end_id(self) -> int | None:
        """The token that ends a text, where the configuration names it."""
        found: int | list[int] | None = self.model.config.eos_token_id
        return found[0] if isinstance(found, list) else found


def load_decoder(
    path: Path, *, name: str, device: torch.device | str = "cpu", bf16: bool = True
) -> Decoder:
    """Return the decoder in a directory, on a device.

    name: what checkpoints and adapters will call it
    bf16: hold the weights in bfloat16 where that is fast; on the CPU they are float32
    Raises UserError when it is missing or damaged.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"there is no base model at {path}: tokenizer.json is missing",
            hint="train one with `code2lora train base`, or give the path of another",
        )
    device = torch.device(device)
    on_cpu = device.type == "cpu"
    # Attention by plain products is the fastest of the kinds that have a backward pass on a CPU.
    try:
        tokenizer = _read_tokenizer(file)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.bfloat16 if bf16 and not on_cpu else torch.float32,
            attn_implementation="eager" if on_cpu else "sdpa",
            local_files_only=True,
        )
        n_layers, dims = decoder_dims(model.config.to_dict())
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        why = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the base model at {path} cannot be read: {why}",
            hint="train it again, fetch it again, or give the path of another",
        ) from error
    nn.Module.to(model, device)
    config = BaseConfig(id=name, n_layers=n_layers, dims=dims, fingerprint=base_fingerprint(path))
    return Decoder(model, tokenizer, config, path)


def _read_tokenizer(file: Path) -> Tokenizer:
    """Return a tokenizer. Raises ValueError when the file is damaged."""
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no kind of its own
        raise ValueError(f"{file.name}: {error}") from error


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
    """Return the training and the validation repositories of a folder; their splits decide.

    Those that are for tests are left alone. Raises UserError when there is nothing mined.
    """
    shards = list(read_shards(mined))
    training = [shard for shard in shards if shard.split == "train"]
    return training, [shard for shard in shards if shard.split == "cr_val"]


def fit(
    recipe: TrainingRecipe,
    mined: Path,
    decoder: Decoder,
    out_dir: Path,
    *,
    features: Path | Literal["released"] | None = None,
    begun: Callable[[str, float], None] | None = None,
    progress: Callable[[FitProgress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> FitResult:
    """Train encoder and hypernetwork and write both below a folder; resume a run that lies there.

    The learner is trained where the decoder is. Of several processes that call this, the first
    writes. Nothing is written but a checkpoint to go on from when the run is asked to stop.
    features: the directory of the frozen encoder that read the repositories (`train embed`), or
        `released` for the vectors that an imported data set came with; None trains an encoder
    begun: called with the name of each repository that is read, and the share that is done
    Raises UserError when there are too few repositories, or a run of other settings is in the way.
    """
    config = recipe.fit
    shards = split(mined)
    material = gather(recipe, shards, decoder, features, begun=_counted(begun, shards))
    builder = ItemBuilder(decoder.tokenizer, config.items, end_id=decoder.end_id)
    watched = monitor_settings(recipe)
    base = freeze(
        decoder.model,
        autocast=config.autocast_bf16,
        n_lanes=config.n_lanes,
        rows_per_pass=config.rows_per_pass,
        checkpointing=config.checkpointing,
    )
    run = FitRun(
        config,
        out_dir / "run",
        learner=material.learner,
        base=base,
        builder=builder,
        repositories=material.training,
        monitor=prepare(material.validation, builder, watched, read_leaks(mined)),
        monitor_config=watched,
    )
    result = fit_run(run, progress=progress, stop=stop)
    if result.finished and rank() == 0:
        publish(
            material.learner,
            config.learner,
            decoder.config,
            out_dir,
            base_dir=decoder.path,
            generic=generic_states(material.learner, material.training),
            metrics={},
            frozen=material.encoder,
        )
    return result


def evaluate(
    recipe: TrainingRecipe,
    mined: Path,
    decoder: Decoder,
    out_dir: Path,
    measuring: Measuring | None = None,
    *,
    progress: Callable[[float, str], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Findings:
    """Measure a fitted model and the rows beside it; see `evaluation.stage`."""
    shards = list(read_shards(mined))
    asked = Measuring() if measuring is None else measuring
    leaks = read_leaks(mined)
    return measure(recipe, shards, leaks, decoder, out_dir, asked, progress=progress, stop=stop)


def _counted(
    begun: Callable[[str, float], None] | None, shards: tuple[list[Shard], list[Shard]]
) -> Callable[[str], None] | None:
    if begun is None:
        return None
    numbers = itertools.count()
    total = max(1, sum(map(len, shards)))
    return lambda name: begun(name, next(numbers) / total)
