"""Generated LoRA weights, and the names of the modules that they adapt.

Shapes used everywhere: L = layers, or 1 where all layers share one pair; R = rank; A is
(L, R, d_in), B is (L, d_out, R). A leading N is the batch of repositories (training only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that reading a configuration does not import torch
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Lora:
    """One adapter, or a batch of N adapters: `y += alpha / R * (x A^T) B^T`."""

    a: dict[str, Tensor]
    """Module type -> ([N,] L|1, R, d_in)."""
    b: dict[str, Tensor]
    """Module type -> ([N,] L|1, d_out, R)."""
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """alpha / rank, the factor on the product."""
        return self.alpha / self.rank

    def layer(self, target: str, index: int) -> tuple[Tensor, Tensor]:
        """Return (A, B) of one module in one layer, sharing storage.

        A is ([N,] R, d_in), B is ([N,] d_out, R).
        """
        a, b = self.a[target], self.b[target]
        i = 0 if a.shape[-3] == 1 else index
        return a.select(-3, i), b.select(-3, i)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Lora:
        """Return the same adapter on another device and in another dtype."""
        return Lora(
            a={t: v.to(device=device, dtype=dtype) for t, v in self.a.items()},
            b={t: v.to(device=device, dtype=dtype) for t, v in self.b.items()},
            rank=self.rank,
            alpha=self.alpha,
        )

    def detach(self) -> Lora:
        """Return the same adapter cut from the autograd graph."""
        return Lora(
            a={t: v.detach() for t, v in self.a.items()},
            b={t: v.detach() for t, v in self.b.items()},
            rank=self.rank,
            alpha=self.alpha,
        )
