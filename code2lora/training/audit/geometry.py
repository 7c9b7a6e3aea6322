"""Turn adapters into how far apart they lie: angles between their weight changes, and their spread.

A weight change is delta W = alpha / R * B A of every adapted module, in every layer, as one long
vector. It is never made: an inner product needs the small products of the factors alone,

    <B1 A1, B2 A2> = sum over the entries of (B1^T B2) * (A1 A2^T),

so a model of any size costs rank times width, and not width squared.

N = adapters, L = layers, R = rank. Sums are taken in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from code2lora.hypernetwork.lora import Lora

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Geometry:
    """How the adapters of some repositories lie to each other."""

    names: tuple[str, ...]
    cosine: Floats
    """(N, N), between weight changes; 0 beside an adapter that changes nothing."""
    residual_ratio: Floats
    """(N,) ||own - mean|| / ||own||, the mean taken over these adapters; 0 when all are the same.

    Two adapters that share nothing have sqrt(1/2), many have almost 1.
    """
    participation_ratio: float
    """How many directions the centred changes fill: 1 when they lie on a line, at most N - 1.

    0 when all adapters are the same.
    """

    @property
    def mean_cosine(self) -> float:
        """Over all pairs of two adapters."""
        n = len(self.names)
        return float((self.cosine.sum() - np.trace(self.cosine)) / max(1, n * (n - 1)))

    @property
    def mean_residual(self) -> float:
        """Over all adapters."""
        return float(self.residual_ratio.mean())


def gram(loras: Sequence[Lora], *, n_layers: int) -> Floats:
    """Return (N, N): the inner products of the adapters' weight changes.

    loras: adapters without a batch axis, for the same modules; ranks may differ
    n_layers: of the decoder; a pair that all layers share counts in each of them
    """
    total = torch.zeros(len(loras), len(loras), dtype=torch.float64)
    for target in loras[0].a:
        n_pairs = max(max(len(lora.a[target]), len(lora.b[target])) for lora in loras)
        for layer in range(n_pairs):
            part = _gram_of_pairs([lora.layer(target, layer) for lora in loras])
            total += part.to(total.device) * (n_layers if n_pairs == 1 else 1)
    scales = torch.tensor([lora.scale for lora in loras], dtype=torch.float64)
    found: Floats = (total * scales[:, None] * scales[None]).numpy()
    return found


def geometry(names: Sequence[str], products: Floats) -> Geometry:
    """Return the geometry of adapters from their inner products, see `gram`."""
    norms = np.sqrt(np.clip(np.diag(products), 0.0, None))
    lengths = norms[:, None] * norms[None]
    cosine = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
    means = products.mean(0)
    centred = products - means[:, None] - means[None] + means.mean()
    # What is left of equal adapters is rounding of the products, and no distance.
    rounding = 1e-12 * max(float(np.abs(products).max()), np.finfo(np.float64).tiny)
    distances = np.sqrt(np.where(np.diag(centred) > rounding, np.diag(centred), 0.0))
    spread = np.clip(np.linalg.eigvalsh(centred), 0.0, None)
    return Geometry(
        names=tuple(names),
        cosine=cosine,
        residual_ratio=np.divide(distances, norms, out=np.zeros_like(norms), where=norms > 0),
        participation_ratio=(
            float(spread.sum() ** 2 / np.square(spread).sum()) if distances.any() else 0.0
        ),
    )


def _gram_of_pairs(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return (N, N) inner products of B A for pairs A (R, d_in), B (d_out, R)."""
    a = torch.cat([a for a, _ in pairs]).double()  # (sum of R, d_in)
    b = torch.cat([b.t() for _, b in pairs]).double()  # (sum of R, d_out)
    blocks = (a @ a.t()) * (b @ b.t())  # block (i, j) sums up to <B_i A_i, B_j A_j>
    owner = torch.repeat_interleave(
        torch.arange(len(pairs)), torch.tensor([len(a) for a, _ in pairs])
    ).to(blocks.device)
    sums = blocks.new_zeros(len(pairs), len(blocks)).index_add(0, owner, blocks)
    return blocks.new_zeros(len(pairs), len(pairs)).index_add(1, owner, sums)
