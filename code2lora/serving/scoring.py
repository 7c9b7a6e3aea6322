"""Tell how well text is predicted by the base model and several adapters at once.

A row is asked as a continuation: the tokens above, then the wanted ones. Its variants, one for each
adapter, are read side by side in one pass, so that the base model's own work is shared. Passes are
short and stand between those of the requests under way, none of which waits for longer than one.
Nothing of it is remembered: no adapter is merged and no prefix kept on its account.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import cross_entropy

from code2lora.serving.adapter_cache import LoadedAdapter
from code2lora.serving.decoder import Decoder, Segment
from code2lora.serving.engine import Engine
from code2lora.serving.kvcache import KvCache
from code2lora.serving.packing import PackedLora
from code2lora.serving.prompt import well_formed

PREFIX_TOKENS = 128
"""Of the text above, at most; as in training."""
TARGET_TOKENS = 128
"""Of the wanted text, at most; the rest is not asked."""

_PASS_S = 0.05
"""A pass takes about this long."""
_FORGET = 0.97
"""Of the best rate, after each pass that does not reach it."""
_FIRST_PIECE = 16
_LEAST_PIECE = 16
_MOST_PIECE = 64
"""Tokens of a row in one pass; the scores of a token take as much memory as the vocabulary."""


@dataclass(frozen=True, slots=True)
class Losses:
    """What rows cost under each adapter."""

    n_tokens: int
    """Tokens asked; the same for all."""
    nats: tuple[float, ...]
    """Summed loss, in the order of the adapters."""


def score_rows(
    engine: Engine,
    rows: Sequence[tuple[str, str]],
    adapters: Sequence[LoadedAdapter | None],
    *,
    may_go_on: Callable[[], bool] = lambda: True,
) -> Losses | None:
    """Return what the rows cost, each (text above, wanted text), with every adapter.

    adapters: None means the base model alone
    may_go_on: asked before every pass, and may wait; False gives up

    None when given up.
    """
    reader = _Reader(engine, adapters)
    for above, wanted in rows:
        given, asked = _tokens(engine, above, wanted)
        if not reader.read(given, asked, may_go_on):
            return None
    return Losses(reader.n_tokens, tuple(reader.nats))


class _Reader:
    """Reads rows, a piece at a time, under every adapter."""

    def __init__(self, engine: Engine, adapters: Sequence[LoadedAdapter | None]) -> None:
        self.n_tokens = 0
        self.nats = [0.0] * len(adapters)
        self._engine = engine
        self._weights = [None if adapter is None else adapter.weights for adapter in adapters]
        self._size = _FIRST_PIECE
        self._rate = 0.0
        """Tokens of a row read in a second, in a pass that was let alone."""

    def read(self, given: list[int], asked: list[int], may_go_on: Callable[[], bool]) -> bool:
        """Add the loss of `asked` after `given`; False when that was given up."""
        ids = given + asked[:-1]
        targets = ids[1:] + asked[-1:]  # what follows each token
        caches: list[KvCache] = []
        start = 0
        while start < len(ids):
            if not may_go_on():
                return False
            end = min(start + self._size, len(ids))
            wanted = targets[max(start, len(given) - 1) : end]
            work = partial(_pass, caches, self._weights, len(ids), ids[start:end], wanted)
            began_s = time.perf_counter()
            losses = self._engine.call(work)
            self._resize(end - start, time.perf_counter() - began_s)
            self.nats = [total + loss for total, loss in zip(self.nats, losses, strict=True)]
            start = end
        self.n_tokens += len(asked)
        return True

    def _resize(self, n: int, took_s: float) -> None:
        """Let the next pass take about as long as one may, by the best rate of the last ones.

        Not by the last pass alone: on a busy machine most of its time may have been another's, and
        smaller pieces would only cost more.
        """
        self._rate = max(n / max(took_s, 1e-6), _FORGET * self._rate)
        fitting = int(self._rate * _PASS_S)
        self._size = max(_LEAST_PIECE, min(fitting, 2 * self._size, _MOST_PIECE))


def _pass(
    caches: list[KvCache],
    weights: Sequence[PackedLora | None],
    n_room: int,
    piece: Sequence[int],
    wanted: Sequence[int],
    decoder: Decoder,
) -> list[float]:
    """Read a piece under each adapter and return the losses of `wanted`, which end with it.

    In the decoder's thread. `caches`, empty at first, holds what was read of the row.
    """
    if not caches:
        caches.extend(KvCache(decoder.shape, n_room) for _ in weights)
    n = len(wanted)
    segments = [
        Segment(piece, cache, adapter, n_logits=n)
        for cache, adapter in zip(caches, weights, strict=True)
    ]
    logits = decoder.read(segments)  # (adapters * n, V)
    if not n:
        return [0.0] * len(weights)
    targets = torch.tensor(wanted, device=logits.device, dtype=torch.int64).repeat(len(weights))
    losses = cross_entropy(logits.float(), targets, reduction="none")
    summed: list[float] = losses.view(len(weights), n).double().sum(dim=1).tolist()
    return summed


def _tokens(engine: Engine, above: str, wanted: str) -> tuple[list[int], list[int]]:
    """Return (given, asked), which fit the context window together."""
    model, room = engine.model, engine.context_tokens
    asked = model.encode_text(well_formed(wanted))[: min(TARGET_TOKENS, room - room // 4)]
    if not asked:
        return [], []
    begin = list(model.begin_ids)
    n_above = min(PREFIX_TOKENS, room - len(asked) - len(begin))
    prefix = model.encode_text(well_formed(above))
    given = begin + prefix[max(0, len(prefix) - n_above) :]
    if not given:  # the beginning of a document
        given = [asked[0] if model.separator_id is None else model.separator_id]
    return given, asked
