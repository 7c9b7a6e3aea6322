"""Turn prompts into completions with one loaded model and any number of adapters.

Requests with different adapters are in progress at once, in one pass of the model, and none ever
sees another's weights. Adapters and key-value caches live in memory only; nothing is written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeVar

import torch

from code2lora.adapters.load import load
from code2lora.errors import UserError
from code2lora.hypernetwork.lora import Lora
from code2lora.serving.adapter_cache import AdapterCache, LoadedAdapter
from code2lora.serving.completion import (
    AdapterIdentity,
    Completion,
    CompletionRequest,
    Piece,
    Score,
)
from code2lora.serving.decoder import Decoder, Segment
from code2lora.serving.kvcache import KvCache
from code2lora.serving.model import BaseModel
from code2lora.serving.packing import pack
from code2lora.serving.prompt import build_prompt, well_formed
from code2lora.serving.scheduler import PREFILL_TOKENS, Scheduler, Stats, Ticket
from code2lora.serving.sequence import Sequence

T = TypeVar("T")

ADAPTER_BYTES = 256 * 2**20
PREFIX_BYTES = 256 * 2**20
ACTIVE_BYTES = 2 * 2**30
MERGED_BYTES = 96 * 2**20
MAX_ROWS = 16
"""Completions under way at once."""


class Engine:
    """A base model that completes code with the adapters it is told to use. Thread-safe."""

    def __init__(
        self,
        model: BaseModel,
        *,
        context_tokens: int | None = None,
        adapter_bytes: int = ADAPTER_BYTES,
        prefix_bytes: int = PREFIX_BYTES,
        active_bytes: int = ACTIVE_BYTES,
        merged_bytes: int = MERGED_BYTES,
        max_rows: int = MAX_ROWS,
    ) -> None:
        """Take over `model`, which must not be run by others.

        context_tokens: a shorter window than the model's own, to bound time and memory
        adapter_bytes: device memory for recently used adapters
        prefix_bytes: device memory for the keys and values of past prompts
        active_bytes: device memory for the keys and values of the requests under way
        merged_bytes: memory for copies of the model's weights with adapters added in; a model
            whose copy does not fit adds adapters in every pass
        max_rows: completions under way at once; further ones wait

        Raises UserError when the model is of a kind that is not known here.
        """
        self.model = model
        self.context_tokens = min(context_tokens or model.context_tokens, model.context_tokens)
        self._decoder = Decoder(
            model.module,
            context_tokens=self.context_tokens,
            device=model.device,
            merged_bytes=merged_bytes,
        )
        self._scheduler = Scheduler(
            self._decoder,
            max_rows=max_rows,
            prefix_bytes=prefix_bytes,
            active_bytes=active_bytes,
        )
        self._adapters = AdapterCache(max_bytes=adapter_bytes, evicted=self._scheduler.forget)

    # -- adapters -----------------------------------------------------------------------------

    def adapter(self, path: Path) -> LoadedAdapter:
        """Return the adapter in an immutable directory, from memory if it was used lately.

        Raises UserError when it is missing, damaged or was made for another base model.
        """

        def read() -> LoadedAdapter:
            began_s = time.perf_counter()
            lora, origin = load(path)
            identity = AdapterIdentity(origin.repository, origin.commit, path.name)
            return self._place(identity, lora, began_s)

        return self._adapters.get(path, read)

    def place(self, identity: AdapterIdentity, lora: Lora) -> LoadedAdapter:
        """Return an adapter made of weights at hand, on the model's device and in its dtype.

        Raises UserError when its shapes are not the model's.
        """
        return self._place(identity, lora, time.perf_counter())

    def placed(
        self, key: Hashable, make: Callable[[], tuple[AdapterIdentity, Lora]]
    ) -> LoadedAdapter:
        """Return the adapter that a key stands for, made and placed at first.

        key: must never stand for other weights
        """
        return self._adapters.get(key, lambda: self.place(*make()))

    def _place(self, identity: AdapterIdentity, lora: Lora, began_s: float) -> LoadedAdapter:
        decoder, model = self._decoder, self.model
        weights = pack(lora, decoder.dims, decoder.n_layers, model.device, model.dtype)
        return LoadedAdapter(identity, weights, (time.perf_counter() - began_s) * 1e3)

    # -- completions --------------------------------------------------------------------------

    def submit(
        self,
        request: CompletionRequest,
        adapter: LoadedAdapter | None = None,
        *,
        on_done: Callable[[list[Completion] | Exception], None],
        on_piece: Callable[[int, Piece], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Ticket:
        """Begin a request's completions and return at once with what can cancel them.

        adapter: None means the base model alone
        on_done: gets all completions, in order, or the UserError or bug that ended them
        on_piece: gets every piece of text at once, with the number of the completion it is of
        cancelled: asked before every pass; True ends the request with what it has

        Both callbacks run in the engine's thread and must not block it. Raises UserError when the
        request cannot be met (FIM without FIM tokens, empty prompt).
        """
        if request.n > self._scheduler.max_rows:
            raise UserError(
                f"n is {request.n}, but {self._scheduler.max_rows} completions can be under way",
                hint="ask for fewer",
            )
        began_s = time.perf_counter()
        prompt, n_new = build_prompt(self.model, request, context_tokens=self.context_tokens)
        sequences = [
            Sequence(self.model, request, prompt, n_new, index=i, on_piece=on_piece)
            for i in range(request.n)
        ]
        ticket = Ticket(sequences, adapter, on_done=on_done, cancelled=cancelled)
        ticket.began_s = began_s
        self._scheduler.submit(ticket)
        return ticket

    def complete(
        self,
        request: CompletionRequest,
        adapter: LoadedAdapter | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Completion:
        """Return the one completion of a prompt; waits for it. Arguments as for `submit`."""
        assert request.n == 1, "several completions are submitted"
        ended = threading.Event()
        results: list[list[Completion] | Exception] = []

        def on_done(result: list[Completion] | Exception) -> None:
            results.append(result)
            ended.set()

        def on_piece(_: int, piece: Piece) -> None:
            if on_text is not None:
                on_text(piece.text)

        self.submit(request, adapter, on_done=on_done, on_piece=on_piece, cancelled=cancelled)
        ended.wait()
        result = results[0]
        if isinstance(result, Exception):
            raise result
        return result[0]

    def score(self, prefix: str, target: str, adapter: LoadedAdapter | None = None) -> Score:
        """Return how well the model predicts `target` after `prefix`, both plain text.

        Of a target longer than three quarters of the context window the rest is left out; the
        prefix loses its left part first.
        """
        wanted = self.model.encode_text(well_formed(target))
        wanted = wanted[: self.context_tokens - self.context_tokens // 4]
        if not wanted:
            return Score(nll=0.0, n_tokens=0)
        given = [*self.model.begin_ids, *self.model.encode_text(well_formed(prefix))]
        if not given:
            separator = self.model.separator_id
            given = [wanted[0] if separator is None else separator]
        given = given[-(self.context_tokens - len(wanted)) :]
        nll = self._scheduler.call(lambda: self._nll(given, wanted, adapter))
        return Score(nll=nll, n_tokens=len(wanted))

    def _nll(self, given: list[int], wanted: list[int], adapter: LoadedAdapter | None) -> float:
        """Return the summed loss of `wanted` after `given`; in the decoder's thread."""
        cache = KvCache(self._decoder.shape, len(given) + len(wanted))
        weights = None if adapter is None else adapter.weights
        ids = given + wanted[:-1]
        first = len(given) - 1  # the place whose scores are the first wanted token's
        total = 0.0
        for start in range(0, len(ids), PREFILL_TOKENS):
            piece = ids[start : start + PREFILL_TOKENS]
            n = min(len(piece), max(0, start + len(piece) - first))
            logits = self._decoder.read([Segment(piece, cache, weights, n_logits=n)])
            at = start + len(piece) - n - first
            targets = torch.tensor(wanted[at : at + n], device=logits.device, dtype=torch.int64)
            losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
            total += float(losses)
        return total

    def call(self, work: Callable[[Decoder], T]) -> T:
        """Return what `work` gives with the decoder, between two passes of the requests under way.

        They wait for it, so it should be short. Raises what `work` raises.
        """
        return self._scheduler.call(lambda: work(self._decoder))

    # -- what it is doing -----------------------------------------------------------------------

    @property
    def stats(self) -> Stats:
        """Counts since the start."""
        return self._scheduler.stats

    @property
    def max_rows(self) -> int:
        """Completions that can be under way at once."""
        return self._scheduler.max_rows

    @property
    def n_active(self) -> int:
        """Requests under way."""
        return self._scheduler.n_active

    @property
    def n_waiting(self) -> int:
        """Requests that wait for a place."""
        return self._scheduler.n_waiting

    @property
    def memory_bytes(self) -> dict[str, int]:
        """What the caches hold: `adapters`, `prefixes`, `merged`."""
        return {
            "adapters": self._adapters.size_bytes,
            "prefixes": self._scheduler.prefix_bytes,
            "merged": self._decoder.merged_bytes,
        }

    def close(self) -> None:
        """End every request as cancelled, and the engine's thread."""
        self._scheduler.close()
