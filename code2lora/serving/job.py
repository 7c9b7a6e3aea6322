"""Hand what threads produce to the event loop that waits for it, and its going away to them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from types import TracebackType


class Job:
    """One request's work in other threads. Leaving its block ends it."""

    def __init__(self) -> None:
        """Belong to the running loop."""
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[object] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._unqueue: Callable[[], object] = lambda: None

    def start(self, executor: Executor, work: Callable[[], None]) -> None:
        """Have `work` done by a thread; what it raises is raised by `next_event`."""

        def run() -> None:
            try:
                if not self.cancelled():
                    work()
            except Exception as error:
                self.post(error)

        self._unqueue = executor.submit(run).cancel

    def post(self, event: object) -> None:
        """Hand an event to the loop; called by the work, in its threads."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:
            if not self._loop.is_closed():  # closed: the server ends, and nobody listens
                raise

    def cancelled(self) -> bool:
        """Tell the work whether to stop."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ask the work to stop, or not to begin; `next_event` returns None at last."""
        self._cancelled.set()
        self._unqueue()
        self._events.put_nowait(None)

    async def next_event(self) -> object:
        """Return the next event; None after `cancel`. Raises what the work raised."""
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()
