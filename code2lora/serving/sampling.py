"""Turn the model's scores for the next token into one token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from code2lora.errors import UserError

_GREEDY_BELOW = 1e-5  # division by less overflows float32, and no other token would win anyway


class Sampler:
    """Picks tokens for one completion; equal seeds pick alike on every device."""

    def __init__(self, *, temperature: float, top_p: float, seed: int | None) -> None:
        self._temperature = temperature
        self._top_p = top_p
        self._random = torch.Generator()
        if seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(seed % 2**63)

    def pick(self, logits: Tensor) -> int:
        """Return a token id from logits (V,). Raises UserError when they are not numbers."""
        best, token = logits.max(dim=-1)
        if not math.isfinite(best.item()):
            raise UserError(
                "the model's output is not finite",
                hint="ask for the base model; if that works, the adapter is damaged: "
                "`code2lora refresh`",
            )
        if self._temperature < _GREEDY_BELOW:
            return int(token)
        return self._sample((logits - best).float().cpu())

    def _sample(self, logits: Tensor) -> int:
        probabilities, tokens = torch.softmax(logits / self._temperature, dim=-1).sort(
            descending=True
        )
        before = probabilities.cumsum(0) - probabilities
        outside = before >= self._top_p
        outside[0] = False
        weights = probabilities.masked_fill(outside, 0.0)
        return int(tokens[torch.multinomial(weights, 1, generator=self._random)])
