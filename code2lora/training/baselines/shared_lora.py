"""LoRA weights that are trained themselves, rather than generated: one for all rows, or a bank.

N = adapters of the bank; shapes are those of `hypernetwork.lora`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from code2lora.hypernetwork.config import BaseConfig
from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.projections import TARGETS
from code2lora.training.fitting.items import Item, collate
from code2lora.training.fitting.objective import Frozen, row_nll, weighed


class LoraBank(nn.Module):
    """N adapters of one shape; each begins as the base itself, with B zero."""

    def __init__(
        self, base: BaseConfig, *, rank: int, alpha: float, seed: int, n_adapters: int = 1
    ) -> None:
        """Every adapter has the same initial weights, which the seed determines."""
        super().__init__()
        self.rank = rank
        self.alpha = alpha
        generator = torch.Generator().manual_seed(seed)
        a, b = {}, {}
        for target in TARGETS:
            d_in, d_out = base.dims[target]
            directions = torch.randn(base.n_layers, rank, d_in, generator=generator) / d_in**0.5
            a[target] = nn.Parameter(directions.repeat(n_adapters, 1, 1, 1))
            b[target] = nn.Parameter(torch.zeros(n_adapters, base.n_layers, d_out, rank))
        self.a = nn.ParameterDict(a)
        self.b = nn.ParameterDict(b)

    def lora(self) -> Lora:
        """Return the batch of all N adapters."""
        a, b = {t: self.a[t] for t in TARGETS}, {t: self.b[t] for t in TARGETS}
        return Lora(a=a, b=b, rank=self.rank, alpha=self.alpha)

    def one(self, index: int) -> Lora:
        """Return one adapter, without a batch axis."""
        a, b = {t: self.a[t][index] for t in TARGETS}, {t: self.b[t][index] for t in TARGETS}
        return Lora(a=a, b=b, rank=self.rank, alpha=self.alpha)


class SharedLora:
    """A `Trainee`: one LoRA over a frozen base, for the rows of every repository."""

    def __init__(self, bank: LoraBank, base: Frozen, *, length_power: float = 1.0) -> None:
        """bank: of a single adapter. length_power: see `FitConfig`."""
        self.bank = bank
        self._base = base
        self._length_power = length_power
        self.trained: Mapping[str, nn.Parameter] = dict(bank.named_parameters())

    def learn(self, items: Sequence[Item]) -> float:
        """See `Trainee`."""
        nll, n_tokens = row_nll(self._base, *collate(items), self.bank.one(0), None)
        target, weight = weighed(nll, n_tokens, self._length_power)
        loss = target.sum() / weight.sum()
        torch.autograd.backward(loss)
        return loss.item()

    @torch.no_grad()
    def nll(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """See `Trainee`."""
        return row_nll(self._base, *collate(items), self.bank.one(0), None)
