"""Train every weight of a decoder on items, a few rows in memory at a time.

N = rows, T = tokens, C = asked tokens, D = hidden width, V = size of the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from code2lora.training.fitting.items import IGNORED, Item, collate
from code2lora.training.fitting.objective import checkpoint_layers, row_weight
from code2lora.training.fitting.token_losses import token_nll
from code2lora.training.pretraining.decoder import head_loss


class FullTuning:
    """A `Trainee`: a decoder of its own, a copy of the base."""

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        rows_per_pass: int,
        autocast: bool,
        checkpoint_activations: bool = False,
        length_power: float = 1.0,
    ) -> None:
        """base: copied; it stays as it is. autocast: take matrix products in bfloat16.

        length_power: see `FitConfig`
        """
        self.model = copy.deepcopy(base)
        nn.Module.float(self.model).requires_grad_(True).train()
        if checkpoint_activations:
            checkpoint_layers(self.model)
        # Tied weights are named once.
        self.trained: Mapping[str, nn.Parameter] = dict(self.model.named_parameters())
        self._rows_per_pass = rows_per_pass
        self._autocast = autocast
        self._length_power = length_power

    def learn(self, items: Sequence[Item]) -> float:
        """See `Trainee`."""
        self.model.train()
        n_tokens = torch.tensor([item.n_asked for item in items])
        weight = row_weight(n_tokens, self._length_power)
        per_token = weight / n_tokens.clamp(min=1)
        total = 0.0
        for tokens, labels, rows in self._passes(items):
            hidden, wanted, row_of = self._asked(tokens, labels)
            factors = per_token[rows].to(row_of.device)[row_of]  # (C,)
            # The mean over a pass counts as much as the pass has of the step's weight.
            mean = head_loss(hidden, self._head(), wanted, factors)
            loss = mean * (len(wanted) / float(weight.sum()))
            torch.autograd.backward(loss)
            total += loss.item()
        return total

    @torch.no_grad()
    def nll(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """See `Trainee`."""
        self.model.train(False)
        nll = torch.zeros(len(items))
        n_tokens = torch.tensor([item.n_asked for item in items])
        for tokens, labels, rows in self._passes(items):
            hidden, wanted, row_of = self._asked(tokens, labels)
            losses = token_nll(hidden, self._head(), wanted)
            nll[rows] = torch.zeros(len(rows)).index_add(0, row_of.cpu(), losses.cpu())
        return nll, n_tokens

    def _passes(self, items: Sequence[Item]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (tokens, labels, rows); rows of a pass are of about the same length."""
        order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
        for start in range(0, len(order), self._rows_per_pass):
            rows = order[start : start + self._rows_per_pass]
            tokens, labels = collate([items[i] for i in rows])
            device = self.model.device
            yield tokens.to(device), labels.to(device), torch.tensor(rows)

    def _asked(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is asked: hidden (C, D), the tokens (C,), and each one's row (C,)."""
        asked = labels[:, 1:] != IGNORED
        kind = self.model.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self._autocast):
            hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        dtype = torch.bfloat16 if self._autocast else torch.float32
        return hidden[:, :-1][asked].to(dtype), labels[:, 1:][asked], asked.nonzero()[:, 0]

    def _head(self) -> Tensor:
        weight: Tensor = self.model.lm_head.weight
        return weight
