"""Turn the paper's released `.pt` checkpoints into checkpoint directories of our own.

Reads   a torch archive, with `weights_only=True`: only tensors and plain containers.
Writes  `config.json` and `model.safetensors`.

Two layouts are known. The evolution checkpoints hold a GRU and a head; the static ones hold a
head alone. The evolution checkpoints were trained on the commits that change assertions alone,
so their states advance on those.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from code2lora.errors import UserError
from code2lora.hypernetwork.checkpoint import save_checkpoint
from code2lora.hypernetwork.config import (
    BaseConfig,
    CheckpointConfig,
    EncoderConfig,
    GruConfig,
    HeadConfig,
)

_DEFAULT_ALPHA = 32.0
"""What the released training used when its arguments do not say."""
_EVOLUTION_KEYS = {"gru_state", "head_state", "head_config", "gru_config"}
_STATIC_KEYS = {"state_dict", "config"}


def convert_released(
    archive: Path, destination: Path, *, base: BaseConfig, encoder: EncoderConfig
) -> str:
    """Write a released checkpoint as a directory of ours and return its fingerprint.

    base, encoder: what the checkpoint was trained with, which the archive does not name. Its own
    module dimensions are checked against `base`.
    Raises UserError when the file is damaged, has another layout or is for another base model.
    """
    content = _load(archive)
    try:
        if content.keys() >= _EVOLUTION_KEYS:
            config, weights = _evolution(content, base, encoder)
        elif content.keys() >= _STATIC_KEYS:
            config, weights = _static(content, base, encoder)
        else:
            raise UserError(
                f"{archive} holds {', '.join(sorted(map(str, content)))}, "
                "which is not a released checkpoint layout"
            )
    except KeyError as error:
        raise UserError(f"{archive} lacks {error}, which released checkpoints have") from error
    return save_checkpoint(destination, config, weights)


def _load(archive: Path) -> dict[str, Any]:
    try:
        content = torch.load(archive, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{archive} cannot be read as a released checkpoint: {reason}",
            hint="download it again; files that need more than tensors are never loaded",
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{archive} holds a {type(content).__name__}, expected a dictionary")
    return content


def _evolution(
    content: Mapping[str, Any], base: BaseConfig, encoder: EncoderConfig
) -> tuple[CheckpointConfig, dict[str, Tensor]]:
    step_input = content.get("per_step_input", "diff")
    if step_input != "diff":
        raise UserError(f"the checkpoint's GRU reads {step_input!r}, but only 'diff' is known")
    sizes = content["gru_config"]
    gru = GruConfig(
        diff_width=sizes["diff_input_dim"],
        snapshot_width=sizes["repo_state_dim"],
        hidden_width=sizes["hidden_dim"],
    )
    config = CheckpointConfig(
        family="gru",
        base=_checked(base, content["head_config"]),
        encoder=replace(encoder, recipe=replace(encoder.recipe, stream="assertions")),
        gru=gru,
        head=_head(content["head_config"], content.get("args")),
    )
    weights = _prefixed("gru", content["gru_state"]) | _head_weights(
        config.head, content["head_state"]
    )
    weights |= _no_centring("diff", gru.diff_width)
    weights |= _no_centring("snapshot", gru.snapshot_width)
    return config, weights


def _static(
    content: Mapping[str, Any], base: BaseConfig, encoder: EncoderConfig
) -> tuple[CheckpointConfig, dict[str, Tensor]]:
    config = CheckpointConfig(
        family="static",
        base=_checked(base, content["config"]),
        encoder=encoder,
        head=_head(content["config"], content.get("args")),
    )
    weights = _head_weights(config.head, content["state_dict"])
    width = config.head.context_width
    return config, weights | _no_centring("snapshot", width)


def _head(sizes: Mapping[str, Any], arguments: object) -> HeadConfig:
    alpha = arguments.get("alpha", _DEFAULT_ALPHA) if isinstance(arguments, Mapping) else None
    return HeadConfig(
        kind="paper",
        context_width=sizes["input_dim"],
        trunk_width=sizes["hidden_dim"],
        rank=sizes["rank"],
        alpha=float(_DEFAULT_ALPHA if alpha is None else alpha),
        n_tasks=sizes.get("num_tasks") or 0,
        task_width=sizes.get("task_dim") or 0 if sizes.get("num_tasks") else 0,
    )


def _checked(base: BaseConfig, sizes: Mapping[str, Any]) -> BaseConfig:
    """Return `base` if its dimensions are those the checkpoint was trained for."""
    dims = {target: (int(d[0]), int(d[1])) for target, d in sizes["type_dims"].items()}
    if dims != base.dims:
        raise UserError(
            f"the checkpoint is for modules {json.dumps(dims, sort_keys=True)}, "
            f"but {base.id} has {json.dumps(base.dims, sort_keys=True)}",
            hint="name the base model that the checkpoint was trained for",
        )
    return base


def _head_weights(config: HeadConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # The released heads know no mean repository: the generic adapter is that of a zero context.
    return _prefixed("head", weights) | {"head.mean_context": torch.zeros(config.context_width)}


def _prefixed(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor.float() for name, tensor in weights.items()}


def _no_centring(name: str, width: int) -> dict[str, Tensor]:
    return {f"{name}_mean": torch.zeros(width), f"{name}_scale": torch.ones(width)}
