"""Read an adapter directory back into LoRA weights, after checking that it is what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from code2lora.adapters.layout import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterMetadata,
    WeightsInfo,
    read_json,
    read_metadata,
    tensor_name,
)
from code2lora.errors import UserError
from code2lora.hypernetwork.config import BaseConfig
from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.projections import TARGETS

_PUBLISH_AGAIN = "`code2lora refresh` publishes it again"


def load(path: Path, base: BaseConfig | None = None) -> tuple[Lora, AdapterMetadata]:
    """Return the weights of an adapter directory, in the file's dtype, and where they come from.

    Shared layers come back as one pair: A (1, R, d_in), else (L, R, d_in).
    base: the base model to use it with; another one is refused.
    Raises UserError when a file is missing or damaged, when names or shapes are not those of the
    configuration, or when the adapter was made for another base model.
    """
    metadata, info = read_metadata(path)
    if base is not None:
        _check_base(metadata, info, base)
    config = read_json(path / CONFIG_FILE)
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        targets = config["target_modules"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / CONFIG_FILE} has no usable {error}") from error
    if targets != list(TARGETS):
        raise UserError(
            f"{path / CONFIG_FILE} adapts {targets}, expected {list(TARGETS)}",
            hint=_PUBLISH_AGAIN,
        )
    a, b = _read_weights(path / WEIGHTS_FILE, info, rank)
    lora = Lora(a=a, b=b, rank=rank, alpha=alpha)
    if base is not None:
        _check_dims(lora, metadata, base)
    return lora, metadata


def _read_weights(
    file: Path, info: WeightsInfo, rank: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    expected = {
        tensor_name(i, t, side) for i in range(info.n_layers) for t in TARGETS for side in "AB"
    }
    try:
        with safe_open(file, framework="pt") as archive:
            names = set(archive.keys())
            if names != expected:
                first = min(names ^ expected)
                verb = "holds an unknown" if first in names else "lacks the"
                raise UserError(f"{file} {verb} tensor {first}", hint=_PUBLISH_AGAIN)
            a = {t: _stack(archive, file, info, t, "A", rank) for t in TARGETS}
            b = {t: _stack(archive, file, info, t, "B", rank) for t in TARGETS}
    except FileNotFoundError as error:
        raise UserError(
            f"{file.parent} is not an adapter directory: {file.name} is missing"
        ) from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is damaged: {error}", hint=_PUBLISH_AGAIN) from error
    return a, b


def _stack(
    archive: Any, file: Path, info: WeightsInfo, target: str, side: str, rank: int
) -> Tensor:
    """Return one side of a module type, ([1 or L], ...), with its rank axis checked."""
    n = 1 if info.shared_layers else info.n_layers
    layers = [archive.get_tensor(tensor_name(i, target, side)) for i in range(n)]
    axis = 0 if side == "A" else 1
    for i, tensor in enumerate(layers):
        if tensor.dim() != 2 or tensor.shape[axis] != rank or tensor.shape != layers[0].shape:
            raise UserError(
                f"{file}: {tensor_name(i, target, side)} has shape {tuple(tensor.shape)}, "
                f"which is not of rank {rank} or not that of layer 0",
                hint=_PUBLISH_AGAIN,
            )
    return torch.stack(layers)


def _check_base(metadata: AdapterMetadata, info: WeightsInfo, base: BaseConfig) -> None:
    prints = {metadata.base_fingerprint, base.fingerprint} - {None}
    if metadata.base_model != base.id or info.n_layers != base.n_layers or len(prints) > 1:
        _refuse(metadata, base, " with other weights" if metadata.base_model == base.id else "")


def _check_dims(lora: Lora, metadata: AdapterMetadata, base: BaseConfig) -> None:
    dims = {t: (lora.a[t].shape[-1], lora.b[t].shape[-2]) for t in TARGETS}
    if dims != base.dims:
        _refuse(metadata, base, " with other dimensions")


def _refuse(metadata: AdapterMetadata, base: BaseConfig, detail: str) -> None:
    raise UserError(
        f"the adapter was made for {metadata.base_model}, but the base model is {base.id}{detail}",
        hint="`code2lora refresh` makes one for the model in use",
    )
