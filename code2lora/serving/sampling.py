"""Turn the model's scores for the next token into one token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from code2lora.errors import UserError

_GREEDY_BELOW = 1e-5  # division by less overflows float32, and no other token would win anyway


def not_finite() -> UserError:
    """Return what is wrong when scores are no numbers."""
    return UserError(
        "the model's output is not finite",
        hint="ask for the base model; if that works, the adapter is damaged: `code2lora refresh`",
    )


class Sampler:
    """Picks tokens for one completion; equal seeds pick alike on every device."""

    def __init__(
        self, *, temperature: float, top_p: float = 1.0, top_k: int = 0, seed: int | None = None
    ) -> None:
        self._temperature = temperature
        self._top_p = top_p
        self._top_k = top_k
        self._random: torch.Generator | None = None
        if temperature >= _GREEDY_BELOW:
            self._random = torch.Generator()
            if seed is None:
                self._random.seed()
            else:
                self._random.manual_seed(seed % 2**63)

    def pick(self, logits: Tensor, best: float, likeliest: int) -> int:
        """Return a token id from logits (V,), whose highest is `best`, that of `likeliest`.

        Raises UserError when they are not numbers.
        """
        if not math.isfinite(best):
            raise not_finite()
        if self._random is None:
            return likeliest
        return self._sample((logits - best).float().cpu(), self._random)

    def _sample(self, logits: Tensor, random: torch.Generator) -> int:
        probabilities, tokens = torch.softmax(logits / self._temperature, dim=-1).sort(
            descending=True
        )
        before = probabilities.cumsum(0) - probabilities
        outside = before >= self._top_p
        if self._top_k:
            outside[self._top_k :] = True
        outside[0] = False
        weights = probabilities.masked_fill(outside, 0.0)
        return int(tokens[torch.multinomial(weights, 1, generator=random)])
