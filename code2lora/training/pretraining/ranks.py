"""Turn several training processes into one that decides, reports and writes.

Every function also works outside a process group, as a group of one, so callers need no cases.
"""

from __future__ import annotations

import torch
import torch.distributed as distributed
from torch import nn


def rank() -> int:
    """This process's number in the group, 0 outside one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def n_ranks() -> int:
    """The size of the process group, 1 outside one."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def agreed(value: float) -> float:
    """Rank 0's value, on every rank: clocks and signals differ, decisions must not."""
    if n_ranks() == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    distributed.broadcast(shared, src=0)
    return shared.item()


def summed(value: float) -> float:
    """The sum of the ranks' values, on every rank."""
    if n_ranks() == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    distributed.all_reduce(shared)
    return shared.item()


def sum_gradients(model: nn.Module) -> None:
    """Add up the ranks' gradients in one message; each rank's are of its rows over all rows."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    for gradient, part in zip(
        gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True
    ):
        gradient.copy_(part.view_as(gradient))
