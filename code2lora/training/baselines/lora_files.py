"""Write a trained LoRA as a directory that PEFT loads, and read it back.

Writes  <path>/adapter_config.json, <path>/adapter_model.safetensors, as a whole

The weights are float32: a LoRA that is to be compared is not rounded first.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from code2lora.adapters.layout import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterMetadata,
    dump_json,
    peft_config,
    read_json,
    tensor_name,
)
from code2lora.errors import UserError
from code2lora.hypernetwork.config import BaseConfig
from code2lora.hypernetwork.lora import Lora


def write_lora(path: Path, lora: Lora, base: BaseConfig) -> None:
    """Write one adapter, without a batch axis; a directory that is there is replaced whole."""
    temporary = path.with_name(f".tmp-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    origin = AdapterMetadata(
        repository="",
        commit="",
        state_sha256="",
        checkpoint="",
        base_model=base.id,
        base_revision=base.revision,
        base_fingerprint=base.fingerprint,
    )
    config = peft_config(origin, lora.rank, lora.alpha) | {"target_modules": sorted(lora.a)}
    (temporary / CONFIG_FILE).write_bytes(dump_json(config))
    save_file(_layer_tensors(lora, base.n_layers), temporary / WEIGHTS_FILE, {"format": "pt"})
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)


def read_lora(path: Path) -> Lora:
    """Return the adapter in a directory: float32, on the CPU, a pair for each layer.

    Raises UserError when a file is missing or damaged.
    """
    config = read_json(path / CONFIG_FILE)
    try:
        tensors = load_file(path / WEIGHTS_FILE)
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        targets = [str(target) for target in config["target_modules"]]
        n_layers = len(tensors) // (2 * len(targets))
        a = {t: _stack(tensors, n_layers, t, "A") for t in targets}
        b = {t: _stack(tensors, n_layers, t, "B") for t in targets}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the adapter in {path} is damaged: {error}", hint="remove it and train it again"
        ) from error
    return Lora(a=a, b=b, rank=rank, alpha=alpha)


def _layer_tensors(lora: Lora, n_layers: int) -> dict[str, Tensor]:
    return {
        tensor_name(layer, target, side): weights[layer if len(weights) > 1 else 0]
        .detach()
        .to("cpu", torch.float32, copy=True)
        .contiguous()
        for side, stacked in (("A", lora.a), ("B", lora.b))
        for target, weights in stacked.items()
        for layer in range(n_layers)
    }


def _stack(tensors: dict[str, Tensor], n_layers: int, target: str, side: str) -> Tensor:
    return torch.stack([tensors[tensor_name(i, target, side)] for i in range(n_layers)])
