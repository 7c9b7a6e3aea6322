"""Make adapters out of adapters: sums and means of weight changes, as LoRA of a higher rank.

A sum of weight changes is one LoRA whose factors stand side by side, so no weight change is made:

    s B1 A1 + t B2 A2 = [s B1, t B2] [A1; A2]

L = layers, R = rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from code2lora.hypernetwork.lora import Lora


@dataclass(frozen=True)
class MeanAdapter:
    """The adapter whose weight change is the mean of others'."""

    lora: Lora
    n_adapters: int
    kept: float
    """Share of the mean's squared norm that its rank holds; 1 when it is exact."""


def mix(mean: Lora, own: Lora, weight: float) -> Lora:
    """Return the adapter of mean + weight * (own - mean): the weight changes, exactly.

    mean, own: adapters without a batch axis for the same modules; ranks may differ, and add up
    """
    return concatenate([mean, own], [1 - weight, weight])


def concatenate(loras: Sequence[Lora], weights: Sequence[float]) -> Lora:
    """Return the adapter whose weight change is the weighted sum of others', without batch axes."""
    rank = sum(lora.rank for lora in loras)
    a, b = {}, {}
    for target in loras[0].a:
        n_pairs = max(max(len(lora.a[target]), len(lora.b[target])) for lora in loras)
        a[target] = torch.cat([_layers(lora.a[target], n_pairs) for lora in loras], dim=-2)
        b[target] = torch.cat(
            [
                weight * lora.scale * _layers(lora.b[target], n_pairs)
                for lora, weight in zip(loras, weights, strict=True)
            ],
            dim=-1,
        )
    # Every summand's own scale went into its B, so the sum's is 1.
    return Lora(a=a, b=b, rank=rank, alpha=float(rank))


def mean_adapter(loras: Sequence[Lora], *, max_rank: int) -> MeanAdapter:
    """Return the mean of the weight changes of adapters without a batch axis.

    Adapters that share A have a mean of their own rank, which is exact. Others' ranks add up; a sum
    beyond `max_rank` is cut to its largest singular values, and `kept` tells what that leaves.
    """
    first = loras[0]
    if all(_share_a(first, lora) for lora in loras[1:]):
        b = {t: torch.stack([lora.b[t] for lora in loras]).mean(0) for t in first.b}
        lora = Lora(a=first.a, b=b, rank=first.rank, alpha=first.alpha)
        return MeanAdapter(lora, len(loras), 1.0)
    whole = concatenate(loras, [1 / len(loras)] * len(loras))
    if whole.rank <= max_rank:
        return MeanAdapter(whole, len(loras), 1.0)
    return _compressed(whole, max_rank, len(loras))


def _layers(tensor: Tensor, n: int) -> Tensor:
    """Return (n, ., .) for a tensor of n layers or of one that all share."""
    return tensor.expand(n, -1, -1)


def _share_a(first: Lora, other: Lora) -> bool:
    same_scale = (first.rank, first.alpha) == (other.rank, other.alpha)
    return same_scale and all(torch.equal(first.a[target], other.a[target]) for target in first.a)


def _compressed(whole: Lora, max_rank: int, n_adapters: int) -> MeanAdapter:
    """Return the best adapter of `max_rank` for one of a higher rank, module by module."""
    a, b = {}, {}
    kept = total = 0.0
    for target in whole.a:
        pairs = [_cut(*whole.layer(target, i), max_rank) for i in range(len(whole.a[target]))]
        a[target] = torch.stack([pair[0] for pair in pairs])
        b[target] = torch.stack([pair[1] for pair in pairs])
        kept += sum(pair[2] for pair in pairs)
        total += sum(pair[3] for pair in pairs)
    lora = Lora(a=a, b=b, rank=max_rank, alpha=float(max_rank))
    return MeanAdapter(lora, n_adapters, kept / total if total else 1.0)


def _cut(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Return A (rank, d_in), B (d_out, rank), and the squared norms of B A that stay and were.

    A module too small for the rank is filled up with zeros, because a LoRA has one rank.
    """
    q_a, r_a = torch.linalg.qr(a.double().t())  # (d_in, k), (k, R)
    q_b, r_b = torch.linalg.qr(b.double())
    u, s, vh = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    n = min(rank, len(s))
    small_a = a.new_zeros(rank, a.shape[1])
    small_b = b.new_zeros(b.shape[0], rank)
    small_a[:n] = (vh[:n] @ q_a.t()).to(a.dtype)
    small_b[:, :n] = (q_b @ (u[:, :n] * s[:n])).to(b.dtype)
    squares = s.square()
    return small_a, small_b, float(squares[:n].sum()), float(squares.sum())
