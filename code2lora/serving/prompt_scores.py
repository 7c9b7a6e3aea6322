"""Gather how likely a model held each token of a prompt that is read piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor

from code2lora.serving.completion import CompletionRequest, TokenChance
from code2lora.serving.model import BaseModel
from code2lora.serving.sampling import not_finite
from code2lora.serving.text import TextDecoder

_TOP_LIMIT = 32
_LEAST = -9999.0
"""What is told for a token that is impossible: JSON has no infinity."""


def most_likely(chances: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return values and ids, (..., n), of the highest of log-probabilities (..., V)."""
    values, ids = chances.topk(min(n, _TOP_LIMIT, chances.shape[-1]), dim=-1)
    return values, ids


class PromptScores:
    """Log-probabilities of one prompt's tokens. For the scheduler's thread alone."""

    def __init__(self, model: BaseModel, request: CompletionRequest, ids: list[int]) -> None:
        """Score `ids`, which stand for the request's prompt."""
        self._model = model
        self._ids = ids
        self._text = request.prompt
        self._n_top = request.logprobs or 0
        self._own: list[float] = []
        self._top: list[list[tuple[int, float]]] = []
        self._tokens: tuple[TokenChance, ...] | None = None

    def add(self, logits: Tensor, start: int) -> None:
        """Take the scores (n, V) after the n tokens that begin with number `start`.

        Raises UserError when they are not numbers.
        """
        following = self._ids[start + 1 : start + 1 + len(logits)]
        chances = logits[: len(following)].float().log_softmax(-1)
        targets = torch.tensor(following, device=chances.device, dtype=torch.int64)[:, None]
        own = chances.gather(-1, targets)[:, 0]
        if bool(own.isnan().any()):
            raise not_finite()
        self._own += own.clamp(min=_LEAST).tolist()
        values, ids = most_likely(chances, self._n_top)
        for row, scores in zip(ids.tolist(), values.clamp(min=_LEAST).tolist(), strict=True):
            self._top.append(list(zip(row, scores, strict=True)))

    def tokens(self) -> tuple[TokenChance, ...]:
        """Return all tokens of the prompt, which has been read; the first was predicted by none."""
        if self._tokens is None:
            self._tokens = self._told()
        return self._tokens

    def _told(self) -> tuple[TokenChance, ...]:
        known = {i for row in self._top for i, _ in row} | set(self._ids)
        texts = {i: self._model.decode([i]) for i in known}
        offsets = self._offsets()
        told = [TokenChance(texts[self._ids[0]], 0, None, ())]
        rest = zip(self._ids[1:], offsets[1:], self._own, self._top, strict=True)
        for token, offset, logprob, row in rest:
            top = tuple((texts[i], value) for i, value in row)
            told.append(TokenChance(texts[token], offset, logprob, top))
        return tuple(told)

    def _offsets(self) -> list[int]:
        """Return where each token begins in the prompt's text."""
        begin = list(self._model.begin_ids)
        is_added = self._ids[: len(begin)] == begin and not self._text.startswith(
            self._model.decode(begin)
        )
        n_added = len(begin) if is_added else 0
        decoder = TextDecoder(self._model.decode, self._ids[:n_added])
        offsets, at = [0] * n_added, 0
        for token in self._ids[n_added:]:
            offsets.append(min(at, len(self._text)))
            at += len(decoder.push(token))
        return offsets
