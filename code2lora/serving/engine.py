"""Turn prompts into completions with one loaded model and any number of adapters.

Every forward pass names the adapter that it runs with, under one lock: requests with different
adapters can be in progress at once and none ever sees another's weights. Adapters and key-value
caches live in memory only; nothing is written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from code2lora.adapters.load import load
from code2lora.hypernetwork.inject import LoraSlots
from code2lora.hypernetwork.lora import Lora
from code2lora.serving.adapter_cache import AdapterCache, LoadedAdapter
from code2lora.serving.completion import (
    AdapterIdentity,
    Completion,
    CompletionRequest,
    FinishReason,
    Score,
)
from code2lora.serving.model import BaseModel
from code2lora.serving.prompt import build_prompt, well_formed
from code2lora.serving.sampling import Sampler
from code2lora.serving.text import StopFilter, TextDecoder

PREFILL_TOKENS = 512
"""The prompt is read in pieces of this many tokens, so that a cancelled request ends soon."""

ADAPTER_BYTES = 256 * 2**20


class Engine:
    """A base model that completes code with the adapter it is told to use. Thread-safe."""

    def __init__(
        self,
        model: BaseModel,
        *,
        context_tokens: int | None = None,
        adapter_bytes: int = ADAPTER_BYTES,
    ) -> None:
        """Take over `model`; it gets hooks and must not be run by others.

        context_tokens: a shorter window than the model's own, to bound time and memory
        adapter_bytes: device memory for recently used adapters

        Raises UserError when the model lacks a projection that adapters need.
        """
        self.model = model
        self.context_tokens = min(context_tokens or model.context_tokens, model.context_tokens)
        self._slots = LoraSlots(model.module)
        self._in_use: LoadedAdapter | None = None
        self._lock = threading.Lock()
        self._adapters = AdapterCache(self._read, max_bytes=adapter_bytes)

    def adapter(self, path: Path) -> LoadedAdapter:
        """Return the adapter in an immutable directory, from memory if it was used lately.

        Raises UserError when it is missing, damaged or was made for another base model.
        """
        return self._adapters.get(path)

    def place(self, identity: AdapterIdentity, lora: Lora) -> LoadedAdapter:
        """Return an adapter made of weights at hand, moved to the model's device and dtype."""
        return LoadedAdapter(identity, lora.to(self.model.device, self.model.dtype))

    def complete(
        self,
        request: CompletionRequest,
        adapter: LoadedAdapter | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Completion:
        """Return the completion of a prompt; `adapter` None means the base model alone.

        on_text: gets every piece of text at once; the pieces joined are the result's text
        cancelled: asked before every forward pass; True ends the completion

        Raises UserError when the request cannot be met (FIM without FIM tokens, empty prompt) or
        the adapter does not fit the model.
        """
        started = time.perf_counter()
        prompt, n_new = build_prompt(self.model, request, context_tokens=self.context_tokens)
        writer = _Writer(self.model, request.stop, prompt[-1:], on_text)
        first_ms: float | None = None
        n_tokens, reason = 0, _LENGTH
        for token in self._tokens(prompt, n_new, request, adapter, cancelled):
            if token is None:
                reason = _CANCELLED
                break
            first_ms = _ms_since(started) if first_ms is None else first_ms
            if token in self.model.end_ids:
                reason = _STOP
                break
            n_tokens += 1
            if writer.push(token):
                break
        text = writer.finish()
        return Completion(
            text=text,
            finish_reason=_STOP if writer.stopped else reason,
            n_prompt_tokens=len(prompt),
            n_tokens=n_tokens,
            first_token_ms=first_ms,
            total_ms=_ms_since(started),
            adapter=adapter.identity if adapter else None,
        )

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
        ids = given[-(self.context_tokens - len(wanted)) :] + wanted
        logits = self._forward(ids, adapter, n_logits=len(wanted) + 1)[:-1]  # (n, V)
        losses = torch.nn.functional.cross_entropy(
            logits.float(), torch.tensor(wanted, device=logits.device), reduction="sum"
        )
        return Score(nll=float(losses), n_tokens=len(wanted))

    def close(self) -> None:
        """Take the hooks out of the model."""
        with self._lock:
            self._slots.remove()

    def _tokens(
        self,
        prompt: list[int],
        n_new: int,
        request: CompletionRequest,
        adapter: LoadedAdapter | None,
        cancelled: Callable[[], bool] | None,
    ) -> Iterator[int | None]:
        """Yield up to `n_new` tokens, one forward pass each; None where the caller cancelled."""
        sampler = Sampler(temperature=request.temperature, top_p=request.top_p, seed=request.seed)
        module: Any = self.model.module
        cache = DynamicCache(config=module.config)
        unread = prompt
        for _ in range(n_new):
            while unread:
                if cancelled is not None and cancelled():
                    yield None
                    return
                logits = self._forward(unread[:PREFILL_TOKENS], adapter, cache=cache)
                unread = unread[PREFILL_TOKENS:]
            token = sampler.pick(logits[-1])
            yield token
            unread = [token]

    def _forward(
        self,
        ids: list[int],
        adapter: LoadedAdapter | None,
        *,
        cache: DynamicCache | None = None,
        n_logits: int = 1,
    ) -> Tensor:
        """Return the last logits (n_logits, V) of one forward pass, with this adapter and no other.

        With a cache, `ids` follow what it holds and are added to it.
        """
        module: Any = self.model.module
        with self._lock, torch.inference_mode():
            if adapter is not self._in_use:
                self._slots.set(adapter.lora if adapter else None)
                self._in_use = adapter
            output = module(
                input_ids=torch.tensor([ids], device=self.model.device),
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=n_logits,
            )
            logits: Tensor = output.logits[0]
            return logits

    def _read(self, path: Path) -> LoadedAdapter:
        lora, origin = load(path)
        return self.place(AdapterIdentity(origin.repository, origin.commit, path.name), lora)


_STOP: FinishReason = "stop"
_LENGTH: FinishReason = "length"
_CANCELLED: FinishReason = "cancelled"


class _Writer:
    """Collects the text of one completion and passes on the pieces that are safe to show."""

    def __init__(
        self,
        model: BaseModel,
        stops: Sequence[str],
        context: list[int],
        on_text: Callable[[str], None] | None,
    ) -> None:
        self._decoder = TextDecoder(model.decode, context)
        self._stops = StopFilter(stops)
        self._on_text = on_text
        self._pieces: list[str] = []

    @property
    def stopped(self) -> bool:
        return self._stops.stopped

    def push(self, token: int) -> bool:
        """Take a token; tell whether a stop string has ended the text."""
        self._show(self._stops.push(self._decoder.push(token)))
        return self.stopped

    def finish(self) -> str:
        """Return the whole text."""
        self._show(self._stops.finish())
        return "".join(self._pieces)

    def _show(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            if self._on_text is not None:
                self._on_text(piece)


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000.0
