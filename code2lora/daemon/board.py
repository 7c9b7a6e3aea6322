"""Which worktrees want a look and which replays go on, and what is under way.

In memory only: a sweep finds everything again. Times are on the monotonic clock, in seconds.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass


@dataclass
class Due:
    """A worktree that wants a look."""

    at_s: float
    attempts: int = 0
    """Failed refreshes in a row."""
    thorough: bool = False
    """Somebody asked for it, so the worker looks even when the adapter seems current."""


class Board:
    """Thread-safe. A worktree is looked at by one thread at a time; replays wait for refreshes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._due: dict[int, Due] = {}
        self._busy: set[int] = set()
        self._replays: dict[str, float] = {}
        self._replaying: str | None = None

    def mark(self, worktree_id: int, delay_s: float, *, thorough: bool = False) -> None:
        """Want a look after a delay; one that is wanted sooner stays, so a burst is one refresh."""
        at_s = time.monotonic() + delay_s
        with self._lock:
            due = self._due.setdefault(worktree_id, Due(at_s))
            due.at_s = min(due.at_s, at_s)
            due.thorough |= thorough

    def mark_replay(self, repository_id: str, delay_s: float = 0.0) -> None:
        """Want a repository's replay to go on after a delay."""
        with self._lock:
            self._replays[repository_id] = time.monotonic() + delay_s

    def take(self) -> tuple[list[tuple[int, Due]], str | None]:
        """Return the worktrees and the replay whose time has come; they are under way from now."""
        now_s = time.monotonic()
        with self._lock:
            ready = [(w, d) for w, d in self._due.items() if self._ready(w, d, now_s)]
            for worktree_id, _ in ready:
                del self._due[worktree_id]
                self._busy.add(worktree_id)
            replay = None
            if self._replaying is None and not self._busy:
                replay = next((r for r, at_s in self._replays.items() if at_s <= now_s), None)
                self._replaying = replay
            return ready, replay

    def finish(self, worktree_id: int, *, again_in_s: float | None, attempts: int) -> None:
        """End a look; another after a delay, with the failures so far, unless that is None."""
        with self._lock:
            self._busy.discard(worktree_id)
            if again_in_s is not None:
                due = self._due.setdefault(worktree_id, Due(time.monotonic() + again_in_s))
                due.attempts = max(due.attempts, attempts)

    def finish_replay(self, repository_id: str, *, again_in_s: float | None) -> None:
        """End a slice of a replay; another after a delay, unless that is None."""
        with self._lock:
            self._replaying = None
            self._replays.pop(repository_id, None)
            if again_in_s is not None:
                self._replays[repository_id] = time.monotonic() + again_in_s

    def next_s(self) -> float | None:
        """Return when something is due; None when nothing is. What cannot start does not count."""
        with self._lock:
            times = [due.at_s for worktree, due in self._due.items() if worktree not in self._busy]
            if self._replaying is None and not self._busy:
                times.extend(self._replays.values())
            return min(times, default=None)

    def _ready(self, worktree_id: int, due: Due, now_s: float) -> bool:
        return due.at_s <= now_s and worktree_id not in self._busy
