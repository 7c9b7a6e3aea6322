"""Watch for pokes, decide which worktrees are due, and have the model worker refresh them.

Reads   the inbox, the reflogs of registered worktrees, the state store, git's HEAD.
Writes  the state store (switches to adapters that exist already, events, failures).

The supervisor imports no torch. It owns the listening sockets, the Unix one and the TCP one that
editors and the dashboard may want, and lends them to the worker, which starts when somebody
connects (the supervisor itself, to refresh, or a client, to complete) and ends when idle. What it
remembers in memory is only which worktrees are due: a kill at any point costs one sweep, which
finds every worktree whose HEAD is not live.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

from apscheduler.schedulers.background import BackgroundScheduler
from filelock import Timeout

from code2lora.adapters.prune import sweep_temporary
from code2lora.daemon.board import Board, Due
from code2lora.daemon.control import supervisor_lock
from code2lora.daemon.inbox import Poke, drain
from code2lora.daemon.listening import is_listening, listen_tcp, listen_unix, reserve_tcp
from code2lora.daemon.locking import repository_lock
from code2lora.daemon.looking import (
    Look,
    forget_removed_worktrees,
    look,
    unscored,
    worktree_of,
)
from code2lora.daemon.platform import notify_service_manager
from code2lora.daemon.pruning import prune_repository, thin_repository
from code2lora.daemon.publishing import Publishing
from code2lora.daemon.watching import Watcher
from code2lora.daemon.worker_process import WorkerProcess
from code2lora.errors import UserError
from code2lora.hypernetwork.identity import fingerprint
from code2lora.hypernetwork.models import resolve_model
from code2lora.serving.client import WorkerClient
from code2lora.settings import Settings
from code2lora.state_store import Store
from code2lora.state_store.records import Worktree

log = logging.getLogger(__name__)

_LOCK_WAIT_S = 2.0
_REFRESH_TIMEOUT_S = 1800.0
_REPLAY_SLICE_S = 1.0
_REBASE_QUIET_S = 1.0
_SCORE_SLICE_S = 5.0
_SCORE_QUIET_S = 2.0
"""Scoring waits until nothing has been refreshed for so long."""
_RETRY_S = (0.5, 2.0, 10.0, 60.0)
_ASKED_FOR = frozenset({"init", "refresh"})
"""Pokes that a command sent, not a hook."""
_TICK_S = 3600.0
_PRUNE_INTERVAL_S = 3600.0
_KEEP_JOURNAL = timedelta(days=90)
_KEEP_FEATURES = timedelta(days=30)
"""A patch that was rebased away may come back; after this long it is encoded again."""


class Supervisor:
    """The daemon's one long-lived process. `run` returns when a signal asks for it."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        """Supervise with the service manager's socket and publishers' keys from `environ`."""
        self._settings = settings
        self._environ = environ
        self._notify_socket = environ.get("NOTIFY_SOCKET")
        self._board = Board()
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
        self._settings.pid_file.unlink(missing_ok=True)  # of one that was killed
        with lock, Store.open(self._settings.resolved_database_url) as store:
            self._store = store
            model = resolve_model(self._settings.model, self._settings.models_dir)
            self._fingerprint = fingerprint(model.hypernetwork)
            self._serve()

    def _serve(self) -> None:
        sweep_temporary(self._settings.adapters_dir)
        listener = listen_unix(self._settings)
        tcp = listen_tcp(self._settings) or reserve_tcp(self._settings)
        listeners = [listener] if tcp is None else [listener, tcp]
        self._client = WorkerClient(self._settings.socket, timeout_s=_REFRESH_TIMEOUT_S)
        self._worker = WorkerProcess(self._settings, listener, tcp, self._environ)
        self._watcher = Watcher(self._settings.inbox, self._wake, self._on_reflog)
        self._threads = ThreadPoolExecutor(max_workers=3, thread_name_prefix="refresh")
        self._publishing = Publishing(self._settings, self._store, self._environ)
        scheduler = self._schedule_jobs()
        previous = self._install_signals()
        try:
            _write_pid(self._settings.pid_file)
            notify_service_manager("READY=1", self._notify_socket)
            log.info("ready, process %d, socket %s", os.getpid(), self._settings.socket)
            self._start_working()
            self._loop(listeners)
        finally:
            notify_service_manager("STOPPING=1", self._notify_socket)
            scheduler.shutdown(wait=False)
            self._watcher.close()
            self._worker.stop()
            # With nobody listening, no thread can wait for an answer that will not come.
            for each in listeners:
                each.close()
            self._settings.socket.unlink(missing_ok=True)
            self._client.close()
            self._threads.shutdown(wait=True, cancel_futures=True)
            self._publishing.close()
            self._settings.pid_file.unlink(missing_ok=True)
            signal.set_wakeup_fd(previous)
            log.info("stopped")

    def _start_working(self) -> None:
        """Record the start and look at everything; a full disk is no reason to end."""
        try:
            self._store.record_event("daemon-start", detail={"pid": os.getpid()})
            self._sweep()
            for worktree in self._store.worktrees():  # what a kill has left unscored
                self._board.mark_scoring(worktree.id, _SCORE_QUIET_S)
        except UserError as error:
            log.warning("%s", error)

    # -- the loop ---------------------------------------------------------------------------

    def _loop(self, listeners: Sequence[socket.socket]) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            watched: list[socket.socket] = []
            while not self._stopping.is_set():
                self._worker.reap()
                wanted = listeners if self._worker.may_start() else ()
                wanted = [listener for listener in wanted if is_listening(listener)]
                for listener in watched:
                    if listener not in wanted:
                        selector.unregister(listener)
                for listener in wanted:
                    if listener not in watched:
                        selector.register(listener, selectors.EVENT_READ)
                watched = wanted
                ready = {key.fileobj for key, _ in selector.select(self._next_timeout_s())}
                if self._wake_read in ready:
                    self._drain_wakes()
                if not ready.isdisjoint(listeners):
                    self._worker.start()
                self._take_pokes()
                self._start_due()

    def _next_timeout_s(self) -> float:
        now_s = time.monotonic()
        times = [now_s + _TICK_S, self._board.next_s(), self._worker.backoff_until_s()]
        return max(0.0, min(at_s for at_s in times if at_s is not None) - now_s)

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
            try:
                self._take_poke(poke)
            except Exception:  # a full disk, or a row that is gone by now: the sweep comes by
                log.exception("poke %s from %s", poke.event, poke.directory)

    def _take_poke(self, poke: Poke) -> None:
        worktree = self._poked(poke)
        if worktree is None:
            log.info("poke %s from %s: not registered", poke.event, poke.directory)
            self._watch_all()  # it may have been removed just now
            return
        self._board.mark(worktree.id, self._settings.debounce_s, thorough=poke.event in _ASKED_FOR)
        self._watcher.watch(worktree)
        self._store.record_event(
            poke.event, worktree_id=worktree.id, repository_id=worktree.repository_id
        )

    def _poked(self, poke: Poke) -> Worktree | None:
        """Return the registered worktree that a poke is about, or None."""
        for place in (poke.directory, poke.git_dir):
            try:
                worktree = worktree_of(self._store, place) if place else None
            except UserError as error:
                log.info("poke %s: %s", poke.event, error)
                continue
            if worktree is not None:
                return worktree
        return None

    def _on_reflog(self, worktree_id: int) -> None:
        self._board.mark(worktree_id, self._settings.debounce_s)
        self._wake()

    def _start_due(self) -> None:
        ready = self._board.take()
        for worktree_id, due in ready.worktrees:
            self._threads.submit(self._refresh, worktree_id, due)
        if ready.replay is not None:
            self._threads.submit(self._replay, ready.replay)
        if ready.scoring is not None:
            self._threads.submit(self._score, ready.scoring)

    def _sweep(self) -> None:
        """Make every worktree due, so that a lost poke costs delay and never data."""
        if not self._settings.inbox.is_dir():
            log.warning("%s is gone, so there is nothing to watch", self._settings.inbox)
            self._stopping.set()
            self._wake()
            return
        forget_removed_worktrees(self._store)
        self._watch_all()
        for worktree in self._store.worktrees():
            self._board.mark(worktree.id, 0.0)
            if self._store.backfill_progress(worktree.repository_id, self._fingerprint):
                self._board.mark_replay(worktree.repository_id)
        self._wake()

    def _watch_all(self) -> None:
        self._watcher.watch_only(self._store.worktrees())

    # -- the work ---------------------------------------------------------------------------

    def _refresh(self, worktree_id: int, due: Due) -> None:
        """Bring one worktree to its HEAD; runs on a thread of its own."""
        again_in_s: float | None = None
        attempts = due.attempts
        try:
            seen = look(self._settings, self._store, worktree_id, self._fingerprint)
            if seen is Look.REBASING:
                # A rebase is one refresh: wait until it has been quiet for a moment.
                again_in_s = _REBASE_QUIET_S
            elif seen is Look.BEHIND or (seen is Look.CURRENT and due.thorough):
                answer = self._client.post("/daemon/refresh", {"worktree": worktree_id})
                self._worker.answered()
                if answer.get("backfill"):
                    self._board.mark_replay(str(answer["repository"]))
                self._board.mark_scoring(worktree_id, _SCORE_QUIET_S)
            elif seen is Look.CURRENT:
                self._resolve_failures(worktree_id)
            self._publishing.offer(worktree_id)
        except UserError as error:
            log.warning("worktree %d: %s", worktree_id, error)
            again_in_s = _RETRY_S[attempts] if attempts < len(_RETRY_S) else None
            attempts += 1
            if again_in_s is None:
                self._record_failure(worktree_id, error)  # the next poke or sweep tries again
        except Exception:
            log.exception("refresh of worktree %d", worktree_id)
            again_in_s, attempts = _RETRY_S[-1], attempts + 1
        finally:
            self._board.finish(worktree_id, again_in_s=again_in_s, attempts=attempts)
            self._wake()

    def _record_failure(self, worktree_id: int, error: UserError) -> None:
        """Record what the worker could not record itself."""
        worktree = self._store.worktree(worktree_id)
        if worktree is None:
            return
        known = self._store.failures(worktree.repository_id)
        if error.message not in {failure.message for failure in known}:
            self._store.record_failure(
                worktree.repository_id,
                "daemon",
                error.message,
                hint=error.hint,
                worktree_id=worktree_id,
            )

    def _resolve_failures(self, worktree_id: int) -> None:
        """Close what no longer holds: a repository that is back, a switch to a known commit."""
        worktree = self._store.worktree(worktree_id)
        if worktree is not None and self._store.failures(worktree.repository_id, limit=1):
            self._store.resolve_failures(worktree.repository_id, worktree_id=worktree_id)

    def _replay(self, repository_id: str) -> None:
        """Replay one slice of a repository's older history; refreshes go first in between."""
        again_in_s: float | None = None  # on failure, when the sweep comes by
        try:
            answer = self._client.post(
                "/daemon/backfill", {"repository": repository_id, "budget_s": _REPLAY_SLICE_S}
            )
            if not answer["done"]:
                again_in_s = 0.0
            else:
                # The anchor has changed, so every worktree's adapter is another one now.
                for worktree in self._store.worktrees(repository_id):
                    self._board.mark(worktree.id, 0.0)
                if self._store.backfill_progress(repository_id, self._fingerprint):
                    again_in_s = 0.0
        except UserError as error:
            log.warning("replay of %s: %s", repository_id, error)
        except Exception:
            log.exception("replay of %s", repository_id)
        finally:
            self._board.finish_replay(repository_id, again_in_s=again_in_s)
            self._wake()

    def _score(self, worktree_id: int) -> None:
        """Have a slice of a worktree's newest commits scored; everything else goes first."""
        again_in_s: float | None = None  # on failure, with the next refresh
        try:
            worktree = self._store.worktree(worktree_id)
            limit = self._settings.score_commits
            # Where there is nothing to do, the worker is not woken.
            if worktree is not None and unscored(self._store, worktree, self._fingerprint, limit):
                answer = self._client.post(
                    "/daemon/score", {"worktree": worktree_id, "budget_s": _SCORE_SLICE_S}
                )
                if answer["switched"]:
                    for each in self._store.worktrees(worktree.repository_id):
                        self._board.mark(each.id, 0.0)
                if not answer["done"]:
                    again_in_s = _SCORE_QUIET_S
        except UserError as error:
            log.warning("scoring worktree %d: %s", worktree_id, error)
        except Exception:
            log.exception("scoring worktree %d", worktree_id)
        finally:
            self._board.finish_scoring(worktree_id, again_in_s=again_in_s)
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
            with repository_lock(self._settings, repository.id):
                prune_repository(self._store, repository.id, self._settings)
                thin_repository(self._store, repository.id, self._settings)
        now = datetime.now(UTC)
        self._store.prune_journal(before=now - _KEEP_JOURNAL)
        self._store.delete_unused_features(created_before=now - _KEEP_FEATURES)


def _write_pid(path: Path) -> None:
    """Write our pid; a hook or a command that sees the file sees all of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(f"{os.getpid()}\n")
    os.replace(temporary, path)
