"""Load a fitted model to measure it: with its encoder, or behind imported vectors without one.

A data set of the released layout comes with vectors of an encoder that need not be here. What was
fitted on them can be measured on them; to read a repository it needs the encoder.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from code2lora.errors import UserError
from code2lora.hypernetwork.checkpoint import LoadedFamily, build_family, check_base, load_family
from code2lora.hypernetwork.config import EncoderConfig
from code2lora.hypernetwork.identity import WEIGHTS_FILE, fingerprint, read_config
from code2lora.hypernetwork.models import ModelPaths


def load_fitted(paths: ModelPaths, device: torch.device | str) -> LoadedFamily:
    """Return the family of a fitted model.

    One that was fitted on imported vectors needs no encoder; its family then reads nothing, and its
    encoder's fingerprint is empty. Raises UserError when a part is missing, damaged or unfit.
    """
    config = read_config(paths.hypernetwork)
    if config.encoder.fingerprint is not None or paths.encoder.exists():
        return load_family(paths, device)
    check_base(config, paths.base)
    absent: Any = _Absent(config.encoder)
    family = build_family(config, absent)
    file = paths.hypernetwork / WEIGHTS_FILE
    try:
        family.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{file} is damaged: {error}", hint="fit the model again") from error
    family.to(device).train(False).requires_grad_(False)
    return LoadedFamily(family, config, fingerprint(paths.hypernetwork), "")


class _Absent:
    """Stands for an encoder of which only the vectors are here."""

    def __init__(self, config: EncoderConfig) -> None:
        self.recipe, self.width = config.recipe, config.width
