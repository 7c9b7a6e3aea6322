"""Say which repository is whose wrong one, and what an adapter owes to telling them apart.

A = adapters, N = rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def partners(n_windows: int) -> list[list[int]]:
    """Return the places of a step in groups of two, one of three where the number is odd.

    Repositories of a group are each other's wrong ones. Which process takes a group changes no
    loss. A window that is alone has none.
    """
    groups = [list(range(start, start + 2)) for start in range(0, n_windows - 1, 2)]
    if n_windows % 2:
        groups = [*groups[:-1], [*(groups[-1] if groups else []), n_windows - 1]]
    return groups


def wrong_adapters(group_of: Tensor, repository_of: Tensor, adapter_of: Tensor) -> Tensor:
    """Return (N,): for each row an adapter of the next repository in its group, or -1.

    group_of, repository_of: (A,) each adapter's
    adapter_of: (N,) each row's own adapter
    The adapter has the same place among its repository's adapters, as far as there are so many.
    """
    wrong = torch.full_like(repository_of, -1)
    for group in group_of.unique().tolist():
        mine = torch.nonzero(group_of == group)[:, 0]
        repositories = list(dict.fromkeys(repository_of[mine].tolist()))
        members = [torch.nonzero(repository_of == each)[:, 0] for each in repositories]
        for i, own in enumerate(members if len(members) > 1 else []):
            other = members[(i + 1) % len(members)]
            wrong[own] = other[torch.arange(len(own)).clamp(max=len(other) - 1)]
    return wrong[adapter_of]


def hinge(own: Tensor, wrong: Tensor, margin: float) -> Tensor:
    """Return (N,): max(0, margin + own - wrong), zero where own is better by the margin.

    own, wrong: (N,) nats per token of the same rows under their own and another adapter
    """
    return (margin + own - wrong).clamp(min=0)
