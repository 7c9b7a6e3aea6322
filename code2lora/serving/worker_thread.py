"""Run blocking work for an event loop, one piece at a time in one thread.

One thread, because one model serves: more would only wait for its lock, and torch keeps a pool of
compute threads for every thread that calls it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from code2lora.serving.openai import ApiError


class Job:
    """One piece of work; posts events to the loop that started it. Leaving its block ends it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[object] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._unqueue: Callable[[], object] = lambda: None

    def post(self, event: object) -> None:
        """Hand an event to the loop; called by the work, in its thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

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


class WorkerThread:
    """A thread with a bounded queue."""

    def __init__(self, *, max_queued: int) -> None:
        """Let at most `max_queued` jobs wait for the one that runs."""
        self._places = threading.BoundedSemaphore(max_queued + 1)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="serving")

    def start(self, work: Callable[[Job], None]) -> Job:
        """Queue work and return its job at once; call from the event loop.

        Raises ApiError 429 when the queue is full.
        """
        if not self._places.acquire(blocking=False):
            raise ApiError(
                429,
                "too many requests are waiting",
                hint="ask again in a second",
                retry_after_s=1,
            )
        job = Job()

        def run() -> None:
            try:
                work(job)
            except Exception as error:
                job.post(error)

        future = self._pool.submit(run)
        future.add_done_callback(lambda _: self._places.release())
        job._unqueue = future.cancel
        return job
