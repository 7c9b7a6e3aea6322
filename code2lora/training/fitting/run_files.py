"""Write and find the checkpoints of a run that trains a set of named tensors.

Writes  <out>/checkpoint-<step>/run.safetensors, <out>/checkpoint-<step>/run.json

A checkpoint is renamed into place when complete and only then is its predecessor removed, so a
kill at any line costs at most the steps since the last one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from code2lora.errors import UserError


def write_checkpoint(
    out_dir: Path, step: int, tensors: Mapping[str, Tensor], content: Mapping[str, Any]
) -> None:
    """Write a checkpoint and remove those before it. content: JSON values."""
    final = out_dir / f"checkpoint-{step}"
    temporary = out_dir / f".tmp-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_tensors(temporary / "run.safetensors", tensors)
    (temporary / "run.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for older in checkpoints(out_dir):
        if older != final:
            shutil.rmtree(older)


def read_checkpoint(
    out_dir: Path, *, identity: Any = None
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the newest checkpoint's tensors and JSON values; None where there is none.

    identity: what its value of this name has to be, where one is given
    Raises UserError when it is damaged, or of another run.
    """
    found = checkpoints(out_dir)
    if not found:
        return None
    again = "give another output folder, or remove this one to begin again"
    try:
        content = json.loads((found[-1] / "run.json").read_text(encoding="utf-8"))
        tensors = load_file(found[-1] / "run.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{found[-1]} is damaged: {error}", hint=again) from error
    if identity is not None and content["identity"] != identity:
        raise UserError(f"{out_dir} was made with other settings or repositories", hint=again)
    return tensors, content


def checkpoints(out_dir: Path) -> list[Path]:
    """Return complete checkpoints, oldest first."""
    found = [path for path in out_dir.glob("checkpoint-*") if (path / "run.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(plain, temporary)
    os.replace(temporary, path)


def training_tensors(
    trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return the parameters and what the optimizer remembers of each."""
    tensors: dict[str, Tensor] = {f"weights.{k}": v.detach() for k, v in trained.items()}
    for name, parameter in trained.items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    return tensors


@torch.no_grad()
def load_training_tensors(
    tensors: Mapping[str, Tensor],
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put back what `training_tensors` returned, on the device of the parameters."""
    for name, parameter in trained.items():
        parameter.copy_(tensors[f"weights.{name}"])
        state: dict[str, Tensor] = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors.get(f"optimizer.{key}.{name}")
            if value is not None:
                # AdamW keeps its step counter on the CPU.
                state[key] = value if key == "step" else value.to(parameter.device)
        if state:
            optimizer.state[parameter] = state
