"""Have the engine complete the prompts of one call, a few at a time.

A list of hundreds, as evaluations send them, leaves places for those who ask for one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from code2lora.serving.adapter_cache import LoadedAdapter
from code2lora.serving.completion import Completion, CompletionRequest, Piece
from code2lora.serving.engine import Engine
from code2lora.serving.errors import ApiError

_SHARE = 2
"""A call with several prompts takes at most one in this many of the engine's places."""


class Prompts:
    """The requests of one call, all with one adapter. Thread-safe."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[CompletionRequest],
        adapter: LoadedAdapter | None,
        *,
        on_done: Callable[[list[Completion] | Exception], None],
        on_piece: Callable[[int, Piece], None],
        cancelled: Callable[[], bool],
        later: Callable[[Callable[[], None]], None],
    ) -> None:
        """Begin nothing yet.

        on_done: gets the completions of all prompts, in order, or the first error
        on_piece: gets every piece of text, with the number of its completion among all
        cancelled: asked before every pass
        later: has another thread do what the engine's must not wait for, and deals with its errors
        """
        self._engine = engine
        self._requests = requests
        self._adapter = adapter
        self._on_done = on_done
        self._on_piece = on_piece
        self._cancelled = cancelled
        self._later = later
        self._lock = threading.Lock()
        self._n_begun = 0
        self._results: dict[int, list[Completion]] = {}

    def begin(self) -> None:
        """Hand the first prompts to the engine. Raises UserError as `Engine.submit` does."""
        n = 1
        if len(self._requests) > 1:
            n = max(1, self._engine.max_rows // _SHARE // self._requests[0].n)
        for _ in range(n):
            self._next()

    def _next(self) -> None:
        with self._lock:
            number = self._n_begun
            if number == len(self._requests):
                return
            self._n_begun += 1
        request = self._requests[number]

        def on_piece(index: int, piece: Piece) -> None:
            self._on_piece(number * request.n + index, piece)

        self._engine.submit(
            request,
            self._adapter,
            on_done=partial(self._ended, number),
            on_piece=on_piece,
            cancelled=self._cancelled,
        )

    def _ended(self, number: int, result: list[Completion] | Exception) -> None:
        """Take one prompt's result; in the engine's thread."""
        if isinstance(result, Exception):
            self._on_done(result)
            return
        with self._lock:
            self._results[number] = result
            n_left = len(self._requests) - len(self._results)
        if n_left == 0:
            self._on_done([one for i in sorted(self._results) for one in self._results[i]])
        elif any(one.finish_reason == "cancelled" for one in result):
            self._on_done(ApiError(503, "the model is being unloaded", hint="ask again"))
        else:
            self._later(self._next)
