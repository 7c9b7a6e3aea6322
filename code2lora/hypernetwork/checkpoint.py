"""Read and write checkpoints: a directory with `config.json` and `model.safetensors`.

A checkpoint is refused, with a message that says why, when it is truncated, when it does not fit
the encoder or the base model beside it, or when it asks for something this package does not have.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from code2lora.errors import UserError
from code2lora.hypernetwork.config import CheckpointConfig, decoder_dims
from code2lora.hypernetwork.encoder import Encoder, load_encoder
from code2lora.hypernetwork.gru_family import GruFamily
from code2lora.hypernetwork.heads import build_head
from code2lora.hypernetwork.identity import (
    WEIGHTS_FILE,
    base_fingerprint,
    encoder_fingerprint,
    fingerprint,
    read_config,
    write_config,
)
from code2lora.hypernetwork.memory_family import MemoryFamily
from code2lora.hypernetwork.models import ModelPaths
from code2lora.hypernetwork.static_family import StaticFamily

_FETCH_AGAIN = "fetch or copy the model again"

AnyFamily = GruFamily | StaticFamily | MemoryFamily


@dataclass(frozen=True)
class LoadedFamily:
    """A family ready for use, and what identifies it."""

    family: AnyFamily
    config: CheckpointConfig
    fingerprint: str
    """Hex sha256 of the checkpoint; states and adapters are keyed by it."""
    encoder_fingerprint: str
    """Hex sha256 of encoder and recipe; cached features are keyed by it."""


def build_family(config: CheckpointConfig, encoder: Encoder) -> AnyFamily:
    """Return a freshly initialised family behind an encoder.

    Raises UserError when the encoder's width, the GRU's and the head's do not fit together.
    """
    recipe, width = config.encoder.recipe, encoder.width
    if width != config.encoder.width:
        raise UserError(
            f"the encoder gives vectors of width {width}, "
            f"but the checkpoint expects {config.encoder.width}",
            hint=f"use the encoder it was trained with: {config.encoder.id}",
        )
    diff_width, snapshot_width = recipe.diff_width(width), recipe.snapshot_width(width)
    head = build_head(config.head, config.base)
    if config.memory is not None:
        _expect_width("memory.width", config.memory.width, width)
        _expect_width("head.context_width", config.head.context_width, width)
        if recipe.diff != "gradients":
            raise UserError(f"the family 'memory' needs gradients, but it reads {recipe.diff!r}")
        return MemoryFamily(encoder, config.memory, head)
    if config.gru is None:
        _expect_width("head.context_width", config.head.context_width, snapshot_width)
        return StaticFamily(encoder, head, snapshot_width)
    _expect_width("gru.diff_width", config.gru.diff_width, diff_width)
    _expect_width("gru.snapshot_width", config.gru.snapshot_width, snapshot_width)
    _expect_width("head.context_width", config.head.context_width, config.gru.hidden_width)
    return GruFamily(encoder, config.gru, head)


def save_checkpoint(path: Path, config: CheckpointConfig, weights: Mapping[str, Tensor]) -> str:
    """Write a checkpoint directory and return its fingerprint.

    weights: `family.state_dict()`. The weights are in place before the configuration, so a
    directory with a configuration is whole.
    """
    path.mkdir(parents=True, exist_ok=True)
    temporary = path / (WEIGHTS_FILE + ".tmp")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, path / WEIGHTS_FILE)
    write_config(path, config)
    return fingerprint(path)


def load_family(paths: ModelPaths, device: torch.device | str = "cpu") -> LoadedFamily:
    """Return the family of a model, with encoder, weights and base model checked.

    Raises UserError that says which part is damaged or does not fit.
    """
    config = read_config(paths.hypernetwork)
    check_base(config, paths.base)
    recipe = config.encoder.recipe
    encoder_print = encoder_fingerprint(paths.encoder, recipe)
    if config.encoder.fingerprint not in (None, encoder_print):
        raise UserError(
            f"the encoder in {paths.encoder} is not the one that the checkpoint was trained with",
            hint=f"fetch the model again; it needs {config.encoder.id}",
        )
    encoder = load_encoder(paths.encoder, recipe, device, base=paths.base)
    family = _load_weights(config, encoder, paths.hypernetwork / WEIGHTS_FILE, device)
    family.eval().requires_grad_(False)
    return LoadedFamily(family, config, fingerprint(paths.hypernetwork), encoder_print)


def check_base(config: CheckpointConfig, base: Path) -> None:
    """Raise UserError unless a decoder directory is the base model of a checkpoint."""
    file = base / "config.json"
    try:
        n_layers, dims = decoder_dims(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}", hint=_FETCH_AGAIN) from error
    same_shape = (n_layers, dims) == (config.base.n_layers, config.base.dims)
    expected = config.base.fingerprint
    if not same_shape or expected not in (None, base_fingerprint(base)):
        detail = "other weights" if same_shape else "other dimensions"
        raise UserError(
            f"the checkpoint is for base model {config.base.id}, but {base} has {detail}",
            hint=f"use {config.base.id}, or a checkpoint made for this base model",
        )


def _load_weights(
    config: CheckpointConfig, encoder: Encoder, file: Path, device: torch.device | str
) -> AnyFamily:
    """Return the family with a checkpoint's tensors, which are checked by name and shape."""
    with torch.device("meta"):  # nothing is drawn that would be overwritten
        family = build_family(config, encoder)
    try:
        weights = load_file(file)
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing", hint=_FETCH_AGAIN) from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is damaged: {error}", hint=_FETCH_AGAIN) from error
    _check_tensors(family, weights, file)
    # Copied, because the file's tensors lie where the file puts them, and the last bits of a
    # product can depend on the alignment of its operands.
    family.to_empty(device=device)
    family.load_state_dict(weights)
    return family


def _check_tensors(family: nn.Module, weights: Mapping[str, Tensor], file: Path) -> None:
    expected = family.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            raise UserError(f"{file} lacks the tensor {name}", hint=_FETCH_AGAIN)
        if name not in expected:
            raise UserError(f"{file} holds an unknown tensor {name}", hint=_FETCH_AGAIN)
        if weights[name].shape != expected[name].shape:
            raise UserError(
                f"{file}: {name} has shape {tuple(weights[name].shape)}, "
                f"but its configuration says {tuple(expected[name].shape)}",
                hint=_FETCH_AGAIN,
            )
        if weights[name].dtype != torch.float32:
            raise UserError(f"{file}: {name} is {weights[name].dtype}, expected torch.float32")


def _expect_width(key: str, value: int, expected: int) -> None:
    if value != expected:
        raise UserError(f"the checkpoint's {key} is {value}, expected {expected}")
