"""Watch for pokes, decide which worktrees are due, and have the model worker refresh them.

Reads   the inbox, the reflogs of registered worktrees, the state store, git's HEAD.
Writes  the state store (switches to adapters that exist already, events, failures).

The supervisor imports no torch. It owns the listening Unix socket and lends it to the worker, which
starts when somebody connects (the supervisor itself, to refresh, or a client, to complete) and ends
when idle. What it remembers in memory is only which worktrees are due: a kill at any point costs
one sweep, which finds every worktree whose HEAD is not live.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from apscheduler.schedulers.background import BackgroundScheduler
from filelock import Timeout

from code2lora.adapters.prune import sweep_temporary
from code2lora.daemon.control import supervisor_lock
from code2lora.daemon.inbox import Poke, drain
from code2lora.daemon.looking import Look, look, worktree_of
from code2lora.daemon.platform import notify_service_manager
from code2lora.daemon.pruning import prune_repository
from code2lora.daemon.watching import Watcher
from code2lora.daemon.worker_process import WorkerProcess
from code2lora.errors import UserError
from code2lora.hypernetwork.identity import fingerprint
from code2lora.hypernetwork.models import resolve_model
from code2lora.serving.client import WorkerClient
from code2lora.settings import Settings
from code2lora.state_store import Store

log = logging.getLogger(__name__)

_LOCK_WAIT_S = 2.0
_REFRESH_TIMEOUT_S = 1800.0
_BACKFILL_SLICE_S = 1.0
_REBASE_QUIET_S = 1.0
_RETRY_S = (0.5, 2.0, 10.0, 60.0)
_TICK_S = 3600.0
_PRUNE_INTERVAL_S = 3600.0
_KEEP_JOURNAL = timedelta(days=90)
_KEEP_FEATURES = timedelta(days=30)
"""A patch that was rebased away may come back; after this long it is encoded again."""


@dataclass
class _Due:
    """A worktree that wants a look."""

    at_s: float
    """When to look, on the monotonic clock."""
    attempts: int = 0
    """Failed refreshes in a row."""


@dataclass
class _Board:
    """What is due and what is under way; guarded by `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    due: dict[int, _Due] = field(default_factory=dict)
    busy: set[int] = field(default_factory=set)
    backfills: dict[str, float] = field(default_factory=dict)
    """Repository id -> when to go on with it."""
    backfilling: str | None = None


class Supervisor:
    """The daemon's one long-lived process. `run` returns when a signal asks for it."""

    def __init__(self, settings: Settings, *, notify_socket: str | None = None) -> None:
        self._settings = settings
        self._notify_socket = notify_socket
        self._board = _Board()
        self._stopping = threading.Event()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)

    def run(self) -> None:
        """Hold the single-instance lock and serve until SIGTERM or SIGINT.

        Raises UserError when another supervisor holds the lock, or there is no such model.
        """
        self._settings.prepare()
        lock = supervisor_lock(self._settings)
        try:
            lock.acquire(timeout=_LOCK_WAIT_S)
        except Timeout as error:
            raise UserError(
                "another daemon is running", hint="`code2lora daemon status`"
            ) from error
        with lock, Store.open(self._settings.resolved_database_url) as store:
            self._store = store
            model = resolve_model(self._settings.model, self._settings.models_dir)
            self._fingerprint = fingerprint(model.hypernetwork)
            self._serve()

    def _serve(self) -> None:
        sweep_temporary(self._settings.adapters_dir)
        listener = _listen(self._settings)
        self._client = WorkerClient(self._settings.socket, timeout_s=_REFRESH_TIMEOUT_S)
        self._worker = WorkerProcess(self._settings, listener)
        self._watcher = Watcher(self._settings.inbox, self._wake, self._on_reflog)
        self._threads = ThreadPoolExecutor(max_workers=3, thread_name_prefix="refresh")
        scheduler = self._schedule_jobs()
        previous = self._install_signals()
        try:
            _write_pid(self._settings.pid_file)
            notify_service_manager("READY=1", self._notify_socket)
            log.info("ready, process %d, socket %s", os.getpid(), self._settings.socket)
            self._store.record_event("daemon-start", detail={"pid": os.getpid()})
            self._sweep()
            self._loop(listener)
        finally:
            notify_service_manager("STOPPING=1", self._notify_socket)
            scheduler.shutdown(wait=False)
            self._watcher.close()
            self._worker.stop()
            # With nobody listening, no thread can wait for an answer that will not come.
            listener.close()
            self._settings.socket.unlink(missing_ok=True)
            self._client.close()
            self._threads.shutdown(wait=True, cancel_futures=True)
            self._settings.pid_file.unlink(missing_ok=True)
            signal.set_wakeup_fd(previous)
            log.info("stopped")

    # -- the loop ---------------------------------------------------------------------------

    def _loop(self, listener: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            listening = False
            while not self._stopping.is_set():
                self._worker.reap()
                want = self._worker.may_start()
                if want and not listening:
                    selector.register(listener, selectors.EVENT_READ)
                elif not want and listening:
                    selector.unregister(listener)
                listening = want
                ready = {key.fileobj for key, _ in selector.select(self._next_timeout_s())}
                if self._wake_read in ready:
                    self._drain_wakes()
                if listener in ready:
                    self._worker.start()
                self._take_pokes()
                self._start_due()

    def _next_timeout_s(self) -> float:
        now = time.monotonic()
        with self._board.lock:
            times = [d.at_s for w, d in self._board.due.items() if w not in self._board.busy]
            if self._board.backfilling is None:
                times.extend(self._board.backfills.values())
        backoff = self._worker.backoff_until_s()
        if backoff is not None:
            times.append(backoff)
        return max(0.0, min(times, default=now + _TICK_S) - now)

    def _wake(self) -> None:
        try:
            self._wake_write.send(b"\0")
        except (BlockingIOError, OSError):
            return  # full: the loop is about to wake anyway; closed: we are ending

    def _drain_wakes(self) -> None:
        try:
            while self._wake_read.recv(4096):
                pass
        except BlockingIOError:
            return

    def _install_signals(self) -> int:
        def stop(_signal: int, _frame: object) -> None:
            self._stopping.set()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        # A handler, so that the wake-up descriptor hears of a worker that ended.
        signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
        return signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)

    # -- what is due ------------------------------------------------------------------------

    def _take_pokes(self) -> None:
        try:
            pokes = drain(self._settings.inbox)
        except OSError as error:
            log.warning("the inbox cannot be read: %s", error)
            return
        for poke in pokes:
            self._take_poke(poke)

    def _take_poke(self, poke: Poke) -> None:
        try:
            worktree = worktree_of(self._store, poke.directory)
        except UserError as error:
            log.info("poke %s from %s ignored: %s", poke.event, poke.directory, error)
            return
        if worktree is None:
            log.info("poke %s from %s: not registered", poke.event, poke.directory)
            self._watch_all()  # it may have been removed just now
            return
        self._store.record_event(
            poke.event, worktree_id=worktree.id, repository_id=worktree.repository_id
        )
        self._watcher.watch(worktree)
        self._mark_due(worktree.id, self._settings.debounce_s)

    def _on_reflog(self, worktree_id: int) -> None:
        self._mark_due(worktree_id, self._settings.debounce_s)
        self._wake()

    def _mark_due(self, worktree_id: int, delay_s: float) -> None:
        at_s = time.monotonic() + delay_s
        with self._board.lock:
            due = self._board.due.get(worktree_id)
            if due is None or due.attempts:
                self._board.due[worktree_id] = _Due(at_s)
            # One that is due soon already stays as it is: a burst is one refresh.

    def _start_due(self) -> None:
        now = time.monotonic()
        with self._board.lock:
            ready = [
                (worktree_id, due)
                for worktree_id, due in self._board.due.items()
                if due.at_s <= now and worktree_id not in self._board.busy
            ]
            for worktree_id, _ in ready:
                del self._board.due[worktree_id]
                self._board.busy.add(worktree_id)
            backfill = None
            if self._board.backfilling is None and not self._board.busy:
                soon = [r for r, at_s in self._board.backfills.items() if at_s <= now]
                backfill = soon[0] if soon else None
                self._board.backfilling = backfill
        for worktree_id, due in ready:
            self._threads.submit(self._refresh, worktree_id, due)
        if backfill is not None:
            self._threads.submit(self._backfill, backfill)

    def _sweep(self) -> None:
        """Make every worktree due, so that a lost poke costs delay and never data."""
        if not self._settings.inbox.is_dir():
            log.warning("%s is gone, so there is nothing to watch", self._settings.inbox)
            self._stopping.set()
            self._wake()
            return
        self._watch_all()
        for worktree in self._store.worktrees():
            self._mark_due(worktree.id, 0.0)
            if self._store.backfill_progress(worktree.repository_id, self._fingerprint):
                self._queue_backfill(worktree.repository_id)
        self._wake()

    def _watch_all(self) -> None:
        self._watcher.watch_only(self._store.worktrees())

    # -- the work ---------------------------------------------------------------------------

    def _refresh(self, worktree_id: int, due: _Due) -> None:
        """Bring one worktree to its HEAD; runs on a thread of its own."""
        again: _Due | None = None
        try:
            seen = look(self._store, worktree_id, self._fingerprint)
            if seen is Look.REBASING:
                # A rebase is one refresh: wait until it has been quiet for a moment.
                again = _Due(time.monotonic() + _REBASE_QUIET_S)
            elif seen is Look.BEHIND:
                answer = self._client.post("/daemon/refresh", {"worktree": worktree_id})
                if answer.get("backfill"):
                    self._queue_backfill(str(answer["repository"]))
        except UserError as error:
            again = self._failed(worktree_id, due, error)
        except Exception:
            log.exception("refresh of worktree %d", worktree_id)
            again = _Due(time.monotonic() + _RETRY_S[-1], due.attempts + 1)
        finally:
            with self._board.lock:
                self._board.busy.discard(worktree_id)
                if again is not None:
                    self._board.due.setdefault(worktree_id, again)
            self._wake()

    def _failed(self, worktree_id: int, due: _Due, error: UserError) -> _Due | None:
        """Log a failed refresh; what the worker could not record itself is recorded here."""
        log.warning("worktree %d: %s", worktree_id, error)
        if due.attempts >= len(_RETRY_S):
            self._record_failure(worktree_id, error)
            return None  # the next poke or sweep tries again
        return _Due(time.monotonic() + _RETRY_S[due.attempts], due.attempts + 1)

    def _record_failure(self, worktree_id: int, error: UserError) -> None:
        worktree = self._store.worktree(worktree_id)
        if worktree is not None:
            self._store.record_failure(
                worktree.repository_id,
                "daemon",
                error.message,
                hint=error.hint,
                worktree_id=worktree_id,
            )

    def _queue_backfill(self, repository_id: str) -> None:
        with self._board.lock:
            self._board.backfills[repository_id] = time.monotonic()

    def _backfill(self, repository_id: str) -> None:
        """Replay one slice of a repository's older history; refreshes go first in between."""
        next_s: float | None = None
        try:
            answer = self._client.post(
                "/daemon/backfill", {"repository": repository_id, "budget_s": _BACKFILL_SLICE_S}
            )
            if not answer["done"]:
                next_s = time.monotonic()
        except UserError as error:
            log.warning("backfill of %s: %s", repository_id, error)
            next_s = time.monotonic() + _RETRY_S[2]
        except Exception:
            log.exception("backfill of %s", repository_id)
        finally:
            with self._board.lock:
                self._board.backfilling = None
                if next_s is None:
                    self._board.backfills.pop(repository_id, None)
                else:
                    self._board.backfills[repository_id] = next_s
            self._wake()

    # -- scheduled jobs ---------------------------------------------------------------------

    def _schedule_jobs(self) -> BackgroundScheduler:
        scheduler = BackgroundScheduler(timezone=UTC)
        options = {"coalesce": True, "max_instances": 1, "misfire_grace_time": 60}
        scheduler.add_job(
            self._sweep, "interval", seconds=self._settings.sweep_s, id="sweep", **options
        )
        scheduler.add_job(
            self._prune,
            "interval",
            seconds=_PRUNE_INTERVAL_S,
            next_run_time=datetime.now(UTC),
            id="prune",
            **options,
        )
        scheduler.start()
        return scheduler

    def _prune(self) -> None:
        for repository in self._store.repositories():
            prune_repository(self._store, repository.id, self._settings)
        now = datetime.now(UTC)
        self._store.prune_journal(before=now - _KEEP_JOURNAL)
        self._store.delete_unused_features(created_before=now - _KEEP_FEATURES)


def _write_pid(path: Path) -> None:
    """Write our pid; a hook or a command that sees the file sees all of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(f"{os.getpid()}\n")
    os.replace(temporary, path)


def _listen(settings: Settings) -> socket.socket:
    """Return the listening Unix socket, readable by the user alone."""
    path = settings.socket
    if len(os.fsencode(path)) > 100:
        raise UserError(
            f"the socket path {path} is longer than a Unix socket allows",
            hint="set CODE2LORA_RUNTIME_DIR to a shorter directory",
        )
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(128)
    listener.setblocking(False)
    return listener
