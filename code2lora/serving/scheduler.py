"""Let requests share the decoder: one thread reads a bit of every request in each pass.

A request joins between two passes and leaves between two passes, with the adapter that it came
with: others can come and go with other adapters, and a newer generation of its own. Prompts are
read in pieces, so that those who already get tokens never wait long for one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch

from code2lora.errors import UserError
from code2lora.serving.adapter_cache import LoadedAdapter
from code2lora.serving.completion import Completion
from code2lora.serving.decoder import Decoder, Segment
from code2lora.serving.kvcache import KvCache, PrefixCache
from code2lora.serving.sequence import Sequence as Completing

T = TypeVar("T")

PREFILL_TOKENS = 512
"""Most tokens of prompts that one pass reads."""

_ALONE_S = 0.25
"""A pass that only reads prompts takes about this long: so soon a newcomer or a cancel is seen."""
_BESIDE_S = 0.04
"""The same where others wait for their next token."""
_SCORED = 2**24
"""Scores that one pass keeps of prompts whose every token is scored."""
_FIRST_PIECE = 64
_LEAST_PIECE = 16

_log = logging.getLogger(__name__)


class Ticket:
    """One request: its sequences, its adapter, and whom to tell."""

    def __init__(
        self,
        sequences: Sequence[Completing],
        adapter: LoadedAdapter | None,
        *,
        on_done: Callable[[list[Completion] | Exception], None],
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        """Wrap the sequences of one prompt.

        on_done: gets the completions, in order, or what went wrong; called in the scheduler's
            thread, once
        cancelled: asked before every pass
        """
        self.sequences = list(sequences)
        self.adapter = adapter
        self.on_done = on_done
        self.began_s = time.perf_counter()
        self._asks_cancelled = cancelled
        self._cancelled = threading.Event()

    @property
    def n_tokens_at_most(self) -> int:
        """Tokens that its sequences may come to hold together."""
        return sum(sequence.n_tokens_at_most for sequence in self.sequences)

    def cancel(self) -> None:
        """End it before the next pass; what it has so far is its result."""
        self._cancelled.set()

    def is_cancelled(self) -> bool:
        """Tell whether somebody has ended it."""
        if self._asks_cancelled is not None and self._asks_cancelled():
            self._cancelled.set()
        return self._cancelled.is_set()


@dataclass(slots=True)
class Stats:
    """Counts since the start; written by the scheduler's thread alone."""

    n_passes: int = 0
    n_prompt_tokens: int = 0
    n_cached_tokens: int = 0
    """Of the prompt tokens, those that were remembered."""
    n_prefix_hits: int = 0
    n_requests: int = 0
    n_tokens: int = 0
    n_cancelled: int = 0
    busy_s: float = 0.0
    widest_pass: int = 0
    """Most sequences that one pass has read."""


class Scheduler:
    """Owns the decoder. Its methods may be called from any thread."""

    def __init__(
        self, decoder: Decoder, *, max_rows: int, prefix_bytes: int, active_bytes: int
    ) -> None:
        """Let at most `max_rows` sequences be under way; further ones wait.

        active_bytes: room for the keys and values of those under way; one request may exceed it
        """
        self.max_rows = max_rows
        self.stats = Stats()
        self._decoder = decoder
        self._prefixes = PrefixCache(max_bytes=prefix_bytes)
        self._max_active_tokens = active_bytes // decoder.shape.token_bytes
        self._waiting: deque[Ticket] = deque()
        self._active: list[Ticket] = []
        self._work: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._tokens_per_s: float | None = None
        self._thread: threading.Thread | None = None

    @property
    def n_waiting(self) -> int:
        """Requests that have not joined yet."""
        return len(self._waiting)

    @property
    def n_active(self) -> int:
        """Requests under way."""
        return len(self._active)

    @property
    def prefix_bytes(self) -> int:
        """Memory that remembered prefixes hold."""
        return self._prefixes.size_bytes

    def submit(self, ticket: Ticket) -> None:
        """Let a request join when there is room. Raises AssertionError once closed."""
        assert len(ticket.sequences) <= self.max_rows, "more sequences than rows"
        self._put(lambda: self._waiting.append(ticket))

    def call(self, work: Callable[[], T]) -> T:
        """Return what `work` gives when the scheduler's thread does it between two passes."""
        result: Future[T] = Future()

        def run() -> None:
            try:
                result.set_result(work())
            except Exception as error:
                result.set_exception(error)

        self._put(lambda: self._work.append(run))
        return result.result()

    def forget(self, adapter: LoadedAdapter) -> None:
        """Give up what is remembered for an adapter, before the next pass."""

        def drop() -> None:
            self._prefixes.forget(adapter)
            self._decoder.forget(adapter.weights)

        self._put(lambda: self._work.append(drop))

    def close(self) -> None:
        """End every request as cancelled, then the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _put(self, change: Callable[[], None]) -> None:
        with self._changed:
            assert not self._closed, "the engine is closed"
            change()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
                self._thread.start()
            self._changed.notify()

    # -- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._active or self._work or self._closed):
                    self._changed.wait()
                work = list(self._work)
                self._work.clear()
                closed = self._closed
            with torch.inference_mode():
                for item in work:
                    item()
                if closed:
                    self._end_all()
                    return
                try:
                    self._turn()
                except Exception as error:  # as when memory runs out: nobody may wait for ever
                    _log.exception("the engine gives up what is under way")
                    for ticket in self._tickets():
                        self._fail(ticket, error)

    def _turn(self) -> None:
        """Let requests leave and join, then read one pass."""
        for ticket in self._tickets():
            if ticket.is_cancelled():
                self._end(ticket)
        self._admit()
        parts = self._share()
        if parts:
            self._pass(parts)

    def _tickets(self) -> list[Ticket]:
        with self._changed:
            return [*self._active, *self._waiting]

    def _end_all(self) -> None:
        for ticket in self._tickets():
            ticket.cancel()
            self._end(ticket)

    def _has_room(self, ticket: Ticket) -> bool:
        """Tell whether a request fits beside those under way."""
        n_rows = sum(len(active.sequences) for active in self._active)
        n_tokens = sum(active.n_tokens_at_most for active in self._active)
        fits = n_tokens + ticket.n_tokens_at_most <= self._max_active_tokens
        return n_rows + len(ticket.sequences) <= self.max_rows and (fits or not self._active)

    def _admit(self) -> None:
        while self._waiting and self._has_room(self._waiting[0]):
            ticket = self._waiting[0]
            first = ticket.sequences[0]
            if first.prompt_scores is None:  # scores are not remembered
                first.cache = self._prefixes.find(ticket.adapter, first.ids, first.n_room)
            if first.cache is None:
                first.cache = KvCache(self._decoder.shape, first.n_room)
            first.n_cached = first.cache.length
            self.stats.n_requests += 1
            self.stats.n_prompt_tokens += len(first.ids)
            self.stats.n_cached_tokens += first.n_cached
            self.stats.n_prefix_hits += first.n_cached > 0
            with self._changed:
                self._active.append(self._waiting.popleft())

    def _share(self) -> list[tuple[Ticket, Completing, int]]:
        """Return who reads how many tokens in the next pass."""
        decoding: list[tuple[Ticket, Completing, int]] = []
        reading: list[tuple[Ticket, Completing]] = []
        for ticket in self._active:
            for sequence in ticket.sequences:
                if sequence.cache is None or sequence.finish_reason is not None:
                    continue  # waits for the first to read their prompt, or has ended
                if sequence.n_unread == 1:
                    decoding.append((ticket, sequence, 1))
                else:
                    reading.append((ticket, sequence))
        budget = self._piece(beside=bool(decoding))
        # the oldest always goes on, and a short prompt does not wait for long ones
        shortest = sorted(reading[1:], key=lambda part: part[1].n_unread)
        scored = max(1, _SCORED // self._decoder.n_scores)
        parts = []
        for i, (ticket, sequence) in enumerate([*reading[:1], *shortest]):
            share = -(-budget // 2) if i == 0 and shortest else budget
            n = min(sequence.n_unread, share)
            if sequence.prompt_scores is not None:
                n = min(n, scored)
                scored -= n
            if n > 0:
                parts.append((ticket, sequence, n))
                budget -= n
        return decoding + parts

    def _piece(self, *, beside: bool) -> int:
        """Return how many prompt tokens the next pass may read."""
        if self._tokens_per_s is None:
            return min(_FIRST_PIECE, PREFILL_TOKENS)
        n = int(self._tokens_per_s * (_BESIDE_S if beside else _ALONE_S))
        return min(max(n, _LEAST_PIECE), PREFILL_TOKENS)

    def _pass(self, parts: list[tuple[Ticket, Completing, int]]) -> None:
        began_s = time.perf_counter()
        segments = [_segment(*part) for part in parts]
        try:
            scores = self._decoder.read(segments)
            ends = list(accumulate(segment.n_logits for segment in segments))
            logits = scores if len(scores) == len(parts) else scores[[end - 1 for end in ends]]
            best, likeliest = (values.tolist() for values in logits.max(dim=-1))
        except Exception as error:  # as when memory runs out
            _log.exception("a pass over %d sequences failed", len(parts))
            for ticket in dict.fromkeys(ticket for ticket, _, _ in parts):
                self._fail(ticket, error)
            return
        for row, (ticket, sequence, _) in enumerate(parts):
            if sequence.prompt_scores is not None and ticket in self._active:
                self._note(ticket, sequence, scores[ends[row] - segments[row].n_logits : ends[row]])
            if sequence.n_unread == 0 and ticket in self._active:
                self._take(ticket, sequence, logits[row], best[row], likeliest[row])
        self._measure(sum(n for _, _, n in parts), time.perf_counter() - began_s, len(parts))
        for ticket in dict.fromkeys(ticket for ticket, _, _ in parts):
            if ticket in self._active and all(s.finish_reason for s in ticket.sequences):
                self._end(ticket)

    def _note(self, ticket: Ticket, sequence: Completing, scores: torch.Tensor) -> None:
        """Give a prompt that is to be scored the scores (n, V) after the tokens just read."""
        assert sequence.cache is not None
        start = sequence.cache.length - len(scores)
        if sequence.prompt_scores is None or start >= sequence.n_prompt - 1:
            return
        try:
            sequence.prompt_scores.add(scores, start)
        except UserError as error:
            self._fail(ticket, error)

    def _take(
        self,
        ticket: Ticket,
        sequence: Completing,
        logits: torch.Tensor,
        best: float,
        likeliest: int,
    ) -> None:
        """Give a sequence its next token, and the first one's siblings theirs."""
        takers = [sequence]
        for other in ticket.sequences:
            if other.cache is None:  # the prompt has been read for all of them
                assert sequence.cache is not None
                other.cache = sequence.cache.head(sequence.cache.length, other.n_room)
                other.prompt_scores = sequence.prompt_scores
                takers.append(other)
        try:
            for taker in takers:
                taker.take(logits, best, likeliest)
        except Exception as error:
            if not isinstance(error, UserError):
                _log.exception("a token could not be taken")
            self._fail(ticket, error)

    def _measure(self, n_tokens: int, took_s: float, n_rows: int) -> None:
        stats = self.stats
        stats.n_passes += 1
        stats.busy_s += took_s
        stats.widest_pass = max(stats.widest_pass, n_rows)
        if n_tokens >= _LEAST_PIECE + n_rows:
            rate = n_tokens / took_s
            known = self._tokens_per_s
            self._tokens_per_s = rate if known is None else 0.7 * known + 0.3 * rate

    def _end(self, ticket: Ticket) -> None:
        """Let a request leave with what it has."""
        reader = ticket.sequences[0]
        cancelled = not all(sequence.finish_reason for sequence in ticket.sequences)
        identity = ticket.adapter.identity if ticket.adapter else None
        done = [s.completion(ticket.began_s, identity) for s in ticket.sequences]
        self._leave(ticket)
        if reader.cache is not None and reader.prompt_scores is None:
            self._prefixes.keep(ticket.adapter, reader.ids[: reader.cache.length], reader.cache)
        self.stats.n_cancelled += cancelled
        self.stats.n_tokens += sum(completion.n_tokens for completion in done)
        _tell(ticket, done)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        self._leave(ticket)
        _tell(ticket, error)

    def _leave(self, ticket: Ticket) -> None:
        with self._changed:
            if ticket in self._active:
                self._active.remove(ticket)
            elif ticket in self._waiting:
                self._waiting.remove(ticket)


def _segment(ticket: Ticket, sequence: Completing, n: int) -> Segment:
    assert sequence.cache is not None
    read = sequence.cache.length
    weights = None if ticket.adapter is None else ticket.adapter.weights
    ids = sequence.ids[read : read + n]
    return Segment(ids, sequence.cache, weights, n_logits=sequence.n_scores(n))


def _tell(ticket: Ticket, result: list[Completion] | Exception) -> None:
    try:
        ticket.on_done(result)
    except Exception:
        _log.exception("a client could not be told")
