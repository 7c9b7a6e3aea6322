"""Which worktrees want a look, which replays go on, what is to be scored, and what is under way.

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


@dataclass(frozen=True)
class Ready:
    """What is to begin now."""

    worktrees: list[tuple[int, Due]]
    replay: str | None = None
    """Repository whose replay goes on."""
    scoring: int | None = None
    """Worktree whose newest commits are to be scored."""


class Board:
    """Thread-safe. A worktree is looked at by one thread at a time.

    Replays wait for refreshes, scoring waits for both, and one replay or scoring goes on at a time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._due: dict[int, Due] = {}
        self._busy: set[int] = set()
        self._replays: dict[str, float] = {}
        self._scorings: dict[int, float] = {}
        self._behind = False
        """Whether a replay or scoring is under way."""

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

    def mark_scoring(self, worktree_id: int, delay_s: float) -> None:
        """Want a worktree's newest commits scored after a delay, which begins again each time."""
        with self._lock:
            self._scorings[worktree_id] = time.monotonic() + delay_s

    def take(self) -> Ready:
        """Return what is to begin now; it is under way from now on."""
        now_s = time.monotonic()
        with self._lock:
            ready = [(w, d) for w, d in self._due.items() if self._ready(w, d, now_s)]
            for worktree_id, _ in ready:
                del self._due[worktree_id]
                self._busy.add(worktree_id)
            replay = scoring = None
            if not self._behind and not self._busy:
                replay = next((r for r, at_s in self._replays.items() if at_s <= now_s), None)
                if replay is None:
                    scoring = next((w for w, at_s in self._scorings.items() if at_s <= now_s), None)
                if scoring is not None:
                    del self._scorings[scoring]
                self._behind = replay is not None or scoring is not None
            return Ready(ready, replay, scoring)

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
            self._behind = False
            self._replays.pop(repository_id, None)
            if again_in_s is not None:
                self._replays[repository_id] = time.monotonic() + again_in_s

    def finish_scoring(self, worktree_id: int, *, again_in_s: float | None) -> None:
        """End a slice of scoring; another after a delay, unless that is None."""
        with self._lock:
            self._behind = False
            if again_in_s is not None:
                self._scorings.setdefault(worktree_id, time.monotonic() + again_in_s)

    def next_s(self) -> float | None:
        """Return when something is due; None when nothing is. What cannot start does not count."""
        with self._lock:
            times = [due.at_s for worktree, due in self._due.items() if worktree not in self._busy]
            if not self._behind and not self._busy:
                times.extend(self._replays.values())
                times.extend(self._scorings.values())
            return min(times, default=None)

    def _ready(self, worktree_id: int, due: Due, now_s: float) -> bool:
        return due.at_s <= now_s and worktree_id not in self._busy
