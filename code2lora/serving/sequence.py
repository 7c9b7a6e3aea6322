"""One completion under way: the tokens it has, those it still has to read, and its text."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from code2lora.serving.completion import (
    AdapterIdentity,
    Completion,
    CompletionRequest,
    FinishReason,
    Piece,
    TokenChance,
)
from code2lora.serving.kvcache import KvCache
from code2lora.serving.model import BaseModel
from code2lora.serving.prompt_scores import PromptScores, most_likely
from code2lora.serving.sampling import Sampler
from code2lora.serving.text import IndentFilter, StopFilter, TextDecoder


class Sequence:
    """Takes one token after another until something ends it. For the scheduler's thread alone."""

    def __init__(
        self,
        model: BaseModel,
        request: CompletionRequest,
        prompt: list[int],
        n_new: int,
        *,
        index: int = 0,
        on_piece: Callable[[int, Piece], None] | None = None,
    ) -> None:
        """Begin after `prompt`, to produce at most `n_new` tokens.

        index: which of the request's completions this is
        """
        greedy = request.greedy_first and index == 0
        self.index = index
        self.ids = list(prompt)
        """Prompt and produced tokens."""
        self.cache: KvCache | None = None
        """What has been read of them; None before anything has."""
        self.finish_reason: FinishReason | None = None
        """Why it has ended; None while it goes on."""
        self.n_cached = 0
        """Tokens that were not read but remembered."""
        self.prompt_scores: PromptScores | None = None
        """What to tell of the prompt's tokens; the completions of one prompt share it."""
        if request.score_prompt and index == 0:
            self.prompt_scores = PromptScores(model, request, prompt)
        self._model = model
        self._request = request
        self.n_prompt = len(prompt)
        """Of `ids`, those of the prompt."""
        self._n_new = n_new
        self._n_taken = 0
        self._sampler = Sampler(
            temperature=0.0 if greedy else request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=None if request.seed is None else request.seed + index,
        )
        self._writer = _Writer(model, request, prompt[-1:], self._emit)
        self._on_piece = on_piece
        self._first_s: float | None = None
        self._is_prompt_told = False

    @property
    def n_unread(self) -> int:
        """How many tokens have to be read before the next can be picked."""
        return len(self.ids) - (self.cache.length if self.cache is not None else 0)

    @property
    def n_room(self) -> int:
        """Tokens that it may come to hold; its cache is made for them."""
        return self.n_prompt + min(self._n_new, 128)

    @property
    def n_tokens_at_most(self) -> int:
        """Tokens of the longest text that it may end with, the prompt included."""
        return self.n_prompt + self._n_new

    def n_scores(self, n: int) -> int:
        """Return after how many of its next `n` tokens it wants the model's scores."""
        read = len(self.ids) - self.n_unread
        return n if self.prompt_scores is not None and read < self.n_prompt else 1

    def take(self, logits: Tensor, best: float, likeliest: int) -> None:
        """Pick the next token from logits (V,), whose highest is `best`, that of `likeliest`.

        Raises UserError when they are not numbers.
        """
        if self.prompt_scores is not None and not self._is_prompt_told:
            self._is_prompt_told = True
            self._emit(Piece("", self.prompt_scores.tokens()))
        if self._n_new == 0:  # the prompt was only to be read
            self.finish_reason = "length"
            return
        token = self._sampler.pick(logits, best, likeliest)
        now_s = time.perf_counter()
        self._first_s = self._first_s or now_s
        if token in self._model.end_ids:
            self.finish_reason = "stop"
            if self.prompt_scores is not None:  # who scores expects a token wherever one was asked
                self._writer.tell(token, logits)
            return
        self.ids.append(token)
        self._n_taken += 1
        if self._writer.push(token, logits):
            self.finish_reason = "stop"
        elif self._n_taken == self._n_new or self._overdue(now_s):
            self.finish_reason = "length"

    def completion(
        self, began_s: float, adapter: AdapterIdentity | None, reason: FinishReason | None = None
    ) -> Completion:
        """End the text and return the whole.

        began_s: when it was asked for, by time.perf_counter
        reason: why it ends, if not by itself
        """
        text = self._writer.finish()
        first_s = self._first_s
        return Completion(
            text=text,
            finish_reason=self.finish_reason or reason or "cancelled",
            n_prompt_tokens=self.n_prompt,
            n_tokens=self._n_taken,
            first_token_ms=None if first_s is None else (first_s - began_s) * 1e3,
            total_ms=(time.perf_counter() - began_s) * 1e3,
            adapter=adapter,
            n_cached_tokens=self.n_cached,
            stop_text=self._writer.stop,
            tokens=self._writer.tokens,
            prompt_tokens=self._told_of_prompt(),
            index=self.index,
        )

    def _told_of_prompt(self) -> tuple[TokenChance, ...]:
        told = self.prompt_scores if self._is_prompt_told else None
        return () if told is None else told.tokens()

    def _overdue(self, now_s: float) -> bool:
        limit_ms = self._request.predict_limit_ms
        if limit_ms is None or self._first_s is None or not self._writer.has_newline:
            return False
        return (now_s - self._first_s) * 1e3 > limit_ms

    def _emit(self, piece: Piece) -> None:
        if self._on_piece is not None:
            self._on_piece(self.index, piece)


class _Writer:
    """Collects the text of one completion and passes on the pieces that are safe to show."""

    def __init__(
        self,
        model: BaseModel,
        request: CompletionRequest,
        context: list[int],
        emit: Callable[[Piece], None],
    ) -> None:
        self._model = model
        self._decoder = TextDecoder(model.decode, context)
        self._indent = IndentFilter(request.min_indent)
        self._stops = StopFilter(request.stop)
        self._n_top = request.logprobs
        self._emit = emit
        self._pieces: list[str] = []
        self._n_decoded = 0
        self._n_shown = 0
        self._told: list[TokenChance] = []
        self._pending: list[TokenChance] = []
        self.has_newline = False

    @property
    def stop(self) -> str | None:
        return self._stops.stop

    @property
    def stopped(self) -> bool:
        return self._stops.stopped or self._indent.stopped

    @property
    def tokens(self) -> tuple[TokenChance, ...]:
        """The tokens whose text has been shown."""
        return tuple(self._told)

    def push(self, token: int, logits: Tensor) -> bool:
        """Take a token; tell whether the text has ended."""
        self.tell(token, logits)
        decoded = self._decoder.push(token)
        self._n_decoded += len(decoded)
        self.has_newline = self.has_newline or "\n" in decoded
        self._show(self._stops.push(self._indent.push(decoded)))
        return self.stopped

    def tell(self, token: int, logits: Tensor) -> None:
        """Note how likely a token was, if that was asked for."""
        if self._n_top is not None:
            self._pending.append(self._chance(token, logits, self._n_top))

    def finish(self) -> str:
        """Return the whole text."""
        self._show(self._stops.push(self._indent.finish()))
        self._show(self._stops.finish(), last=True)
        return "".join(self._pieces)

    def _show(self, text: str, *, last: bool = False) -> None:
        if text:
            self._pieces.append(text)
            self._n_shown += len(text)
        if not text and not last:
            return
        whole = last and not self.stopped
        n = sum(whole or token.offset < self._n_shown for token in self._pending)
        told, self._pending = tuple(self._pending[:n]), self._pending[n:]
        self._told.extend(told)
        if text or told:
            self._emit(Piece(text, told))

    def _chance(self, token: int, logits: Tensor, n_top: int) -> TokenChance:
        chances = logits.float().log_softmax(-1)
        values, ids = most_likely(chances, n_top)
        top = zip(ids.tolist(), values.tolist(), strict=True)
        return TokenChance(
            text=self._model.decode([token]),
            offset=self._n_decoded,
            logprob=float(chances[token]),
            top=tuple((self._model.decode([i]), value) for i, value in top),
        )
