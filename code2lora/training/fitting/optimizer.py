"""The optimizer of a fit: which rate and decay each parameter has, and how the rates change."""

from __future__ import annotations

import torch
from torch import nn

from code2lora.training.fitting.inputs import LexicalInputs
from code2lora.training.fitting.learner import Learner
from code2lora.training.fitting.schedule import FitConfig


def build_optimizer(learner: Learner, config: FitConfig) -> torch.optim.AdamW:
    """Return AdamW over everything that learns; matrices of the family decay, the rest does not."""
    table = learner.inputs.table if isinstance(learner.inputs, LexicalInputs) else None
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in learner.parameters():
        if parameter is not table:
            (matrices if parameter.dim() > 1 else vectors).append(parameter)
    rate = config.learning_rate
    groups = [
        {"params": matrices, "peak": rate, "weight_decay": config.weight_decay},
        {"params": vectors, "peak": rate, "weight_decay": 0.0},
    ]
    if table is not None:
        peak = config.encoder_learning_rate
        groups.append({"params": [table], "peak": peak, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=rate, fused=learner.device.type == "cuda")


def set_rates(
    optimizer: torch.optim.Optimizer, config: FitConfig, step: int, share: float
) -> float:
    """Warm-up, then level, then linear to the final rate; return the rate of GRU and head.

    share: of the budget that is spent, 0 to 1
    """
    decay = max(0.0, share - config.stable_share) / max(1e-9, 1 - config.stable_share)
    factor = 1 - decay * (1 - config.final_rate_share)
    factor *= min(1.0, (step + 1) / max(1, config.warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]
    return factor * config.learning_rate
