"""Wake the supervisor when a hook appends to the inbox or a reflog records a HEAD update.

The reflog tells of tools that run no hooks (reset, libgit2, jj). Watches are never recursive and
never on a working tree: one on the inbox and one on each worktree's `logs` directory, which sees
exactly one event for each update of HEAD.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import ObservedWatch

from code2lora.daemon.inbox import POKES
from code2lora.state_store.records import Worktree

_WRITES = frozenset({"modified", "closed", "created", "moved"})


class _Notify(FileSystemEventHandler):
    """Call back when a file of the given name is written in the watched directory."""

    def __init__(self, name: str, callback: Callable[[], None]) -> None:
        self._name = name
        self._callback = callback

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Filter by name and kind; opening and reading a file are events too."""
        names = {os.path.basename(event.src_path), os.path.basename(event.dest_path)}
        if event.event_type in _WRITES and {self._name, os.fsencode(self._name)} & names:
            self._callback()


class Watcher:
    """The watches of one supervisor. Callbacks come from the observer's thread."""

    def __init__(
        self, inbox: Path, on_poke: Callable[[], None], on_reflog: Callable[[int], None]
    ) -> None:
        self._on_reflog = on_reflog
        self._reflogs: dict[int, tuple[Path, ObservedWatch]] = {}
        self._lock = threading.RLock()
        self._observer = Observer()
        self._observer.schedule(_Notify(POKES, on_poke), str(inbox))
        self._observer.start()

    def watch_only(self, worktrees: Iterable[Worktree]) -> None:
        """Watch the reflogs of exactly these worktrees."""
        wanted = {worktree.id: worktree for worktree in worktrees}
        with self._lock:
            for worktree_id in set(self._reflogs) - set(wanted):
                _, watch = self._reflogs.pop(worktree_id)
                self._observer.unschedule(watch)
            for worktree in wanted.values():
                self.watch(worktree)

    def watch(self, worktree: Worktree) -> None:
        """Watch one worktree's reflog; again after its directory came, went or moved."""
        with self._lock:
            self._watch(worktree)

    def _watch(self, worktree: Worktree) -> None:
        place = _reflog_place(Path(worktree.git_dir))
        known = self._reflogs.get(worktree.id)
        if known is not None:
            if place is not None and known[0] == place[0]:
                return
            self._observer.unschedule(known[1])
            del self._reflogs[worktree.id]
        if place is None:
            return  # no reflog: hooks and the sweep remain
        directory, name = place
        worktree_id = worktree.id
        handler = _Notify(name, lambda: self._on_reflog(worktree_id))
        try:
            watch = self._observer.schedule(handler, str(directory))
        except OSError:
            return  # out of inotify watches, or just removed: hooks and the sweep remain
        self._reflogs[worktree.id] = (directory, watch)

    def close(self) -> None:
        """Stop watching."""
        self._observer.stop()
        self._observer.join()


def _reflog_place(git_dir: Path) -> tuple[Path, str] | None:
    """Return the directory to watch and the file in it that each HEAD update writes."""
    logs = git_dir / "logs"
    if logs.is_dir():
        return logs, "HEAD"
    # A reftable repository keeps reflogs in the table stack (git, reftable format).
    tables = git_dir / "reftable"
    return (tables, "tables.list") if tables.is_dir() else None
