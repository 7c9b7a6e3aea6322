"""Push every new live adapter to where its repository says; what fails is recorded and waits.

Reads   `code2lora.publish` in the repository's git configuration, the publishers that the user has
        confirmed, the state store.
Writes  events (`pushed`) and failures in the state store, confirmed publishers in the state
        directory; the pushes themselves write at their targets.

Nothing waits for a push: the supervisor offers a worktree whenever it has looked at it, and one
thread of ours pushes the adapter that is live by then. A push that fails is tried again with the
next generation and by `code2lora publish now`, and where the server did not answer also by itself,
less and less often. What arrives is always the newest generation. Torch-free.

A repository's git configuration may have come with the repository, so a publisher in it counts only
once `code2lora publish add` has been told the same: else a downloaded folder could have keys read
and sent.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from filelock import FileLock, Timeout

from code2lora.adapters.files import placed_file
from code2lora.adapters.publishers.http import Unavailable, read_key
from code2lora.adapters.publishers.places import Generation
from code2lora.adapters.publishers.push import push
from code2lora.adapters.publishers.target import Target, parse
from code2lora.daemon.looking import open_registered
from code2lora.errors import UserError
from code2lora.history.gitconfig import publishers
from code2lora.history.model import History
from code2lora.hypernetwork.models import resolve_model
from code2lora.settings import Settings
from code2lora.state_store import Store
from code2lora.state_store.records import Adapter, Worktree

log = logging.getLogger(__name__)

PUSHED = "pushed"
"""Kind of the event that a push leaves."""

FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 300.0

_LOCK_TIMEOUT_S = 300.0
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_MANY_EVENTS = 500


@dataclass(frozen=True, kw_only=True)
class Push:
    """How one push went."""

    target: str
    """The publisher as git configuration has it."""
    label: str
    """Its kind and destination."""
    name: str | None
    """What the adapter is called there; None where the publisher is malformed."""
    generation: int
    commit: str
    error: str | None = None
    hint: str | None = None
    may_pass: bool = False
    """Whether the same push may succeed later, such as when the server runs again."""


class Publishing:
    """The supervisor's thread for pushes."""

    def __init__(self, settings: Settings, store: Store, environ: Mapping[str, str]) -> None:
        """Push with keys from the files and from the environment that publishers name."""
        self._settings = settings
        self._store = store
        self._environ = environ
        self._offered: dict[int, int] = {}
        self._queue: SimpleQueue[int | None] = SimpleQueue()
        self._retries: dict[int, _Retry] = {}
        self._thread: threading.Thread | None = None

    def offer(self, worktree_id: int) -> None:
        """Have a worktree's live adapter pushed, unless it has been offered before; never waits.

        Called from several threads, but for one worktree from one at a time.
        """
        live = self._store.live_adapter(worktree_id)
        if live is None or self._offered.get(worktree_id) == live.id:
            return
        self._offered[worktree_id] = live.id
        self._queue.put(worktree_id)
        if self._thread is None:
            # A daemon thread: a server that hangs does not keep the supervisor from ending.
            self._thread = threading.Thread(target=self._run, name="publish", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread once it has done what it is at; does not wait."""
        self._queue.put(None)

    def _run(self) -> None:
        while (worktree_id := self._next()) is not None:
            before = self._retries.pop(worktree_id, None)
            if self._push(worktree_id):
                wait_s = FIRST_RETRY_S if before is None else before.wait_s * 2
                self._retries[worktree_id] = _Retry.after(min(wait_s, LONGEST_RETRY_S))

    def _next(self) -> int | None:
        """Return the worktree whose turn it is, at its time; None at the end."""
        if not self._retries:
            return self._queue.get()
        first, retry = min(self._retries.items(), key=lambda item: item[1].at_s)
        try:
            return self._queue.get(timeout=max(0.0, retry.at_s - time.monotonic()))
        except Empty:
            return first

    def _push(self, worktree_id: int) -> bool:
        """Push one worktree and tell whether a push that failed may succeed later."""
        done: list[Push] = []
        try:
            worktree = self._store.worktree(worktree_id)
            if worktree is not None:
                done = push_worktree(self._settings, self._store, worktree, self._environ)
        except UserError as error:  # the repository cannot be read: its refresh says so too
            log.warning("worktree %d is not pushed: %s", worktree_id, error)
        except Exception:
            log.exception("pushing worktree %d", worktree_id)
        for each in done:
            log.info("%s: %s", each.label, each.error or f"has {each.generation}")
        return any(each.may_pass for each in done)


@dataclass(frozen=True)
class _Retry:
    """When a worktree is pushed again."""

    at_s: float
    """By time.monotonic."""
    wait_s: float

    @classmethod
    def after(cls, wait_s: float) -> _Retry:
        return cls(time.monotonic() + wait_s, wait_s)


def push_worktree(
    settings: Settings,
    store: Store,
    worktree: Worktree,
    environ: Mapping[str, str],
    *,
    chosen: Callable[[str], bool] = lambda _: True,
    again: bool = False,
) -> list[Push]:
    """Push a worktree's live adapter to its repository's publishers, and record how it went.

    chosen: tells, by the line of git configuration, the publishers to push to
    again: push to those as well that have this adapter already
    Raises UserError when the repository cannot be read, or another process keeps pushing.
    """
    live = store.live_adapter(worktree.id)
    if live is None:
        return []
    with open_registered(worktree) as history:
        lines = [line for line in publishers(history) if chosen(line)]
        suffix = _suffix(history)
    if not lines:
        return []
    confirmed = confirmed_publishers(settings, worktree.repository_id)
    done: list[Push] = []
    with _lock(settings, worktree.repository_id):
        for line in lines:
            if not again and _has_it(store, worktree, line, live):
                continue
            try:
                if line not in confirmed:
                    raise _unconfirmed(line)
                target = parse(line)
                name = target.name + suffix
                _push(settings, target, name, live, environ)
            except UserError as error:
                done.append(_failed(store, worktree, line, live, error))
            else:
                done.append(_succeeded(store, worktree, line, name, live))
    return done


def last_pushes(store: Store, worktree: Worktree) -> dict[str, Mapping[str, object]]:
    """Return what each publisher had pushed to it last, by its line of git configuration."""
    found: dict[str, Mapping[str, object]] = {}
    for event in store.events(worktree.repository_id, kinds=(PUSHED,), limit=_MANY_EVENTS):
        if event.worktree_id == worktree.id:
            found.setdefault(str(event.detail.get("target")), {**event.detail, "at": event.at})
    return found


def stage_of(line: str) -> str:
    """Return the stage under which a publisher's failures are recorded."""
    return f"publish {hashlib.sha256(line.encode()).hexdigest()[:16]}"


def confirmed_publishers(settings: Settings, repository_id: str) -> frozenset[str]:
    """Return the publishers of a repository that the user has asked for."""
    try:
        text = _confirmations(settings, repository_id).read_text(encoding="utf-8")
    except FileNotFoundError:
        return frozenset()
    return frozenset(text.splitlines())


def confirm_publisher(settings: Settings, repository_id: str, line: str) -> None:
    """Record that the user has asked for a publisher."""
    _write_confirmations(
        settings, repository_id, {*confirmed_publishers(settings, repository_id), line}
    )


def forget_publisher(settings: Settings, repository_id: str, line: str) -> None:
    """Record that the user has let a publisher go."""
    known = confirmed_publishers(settings, repository_id)
    if line in known:
        _write_confirmations(settings, repository_id, known - {line})


def _confirmations(settings: Settings, repository_id: str) -> Path:
    return settings.state_dir / "publishers" / repository_id


def _write_confirmations(settings: Settings, repository_id: str, lines: AbstractSet[str]) -> None:
    file = _confirmations(settings, repository_id)
    file.parent.mkdir(mode=0o700, exist_ok=True)
    with placed_file(file, force=True) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in sorted(lines)), encoding="utf-8")


def _push(
    settings: Settings, target: Target, name: str, live: Adapter, environ: Mapping[str, str]
) -> None:
    generation = Generation(
        path=Path(live.path),
        number=live.generation,
        commit=live.commit,
        sha256=live.sha256,
        base_dir=resolve_model(settings.model, settings.models_dir).base,
    )
    push(target, generation, name=name, key=read_key(target, environ))


def _suffix(history: History) -> str:
    """Return what tells a linked worktree's adapter from the main worktree's."""
    if history.git_dir == history.common_dir:
        return ""
    return "." + _UNSAFE.sub("-", history.git_dir.name)


def _has_it(store: Store, worktree: Worktree, line: str, live: Adapter) -> bool:
    last = last_pushes(store, worktree).get(line)
    return last is not None and last.get("adapter") == live.id


def _succeeded(store: Store, worktree: Worktree, line: str, name: str, live: Adapter) -> Push:
    store.resolve_failures(worktree.repository_id, stage=stage_of(line))
    store.record_event(
        PUSHED,
        repository_id=worktree.repository_id,
        worktree_id=worktree.id,
        detail={
            "target": line,
            "name": name,
            "adapter": live.id,
            "generation": live.generation,
            "commit": live.commit,
        },
    )
    return Push(
        target=line,
        label=label_of(line),
        name=name,
        generation=live.generation,
        commit=live.commit,
    )


def _failed(store: Store, worktree: Worktree, line: str, live: Adapter, error: UserError) -> Push:
    # Of no worktree: a refresh that succeeds resolves its worktree's failures, and not this.
    store.record_failure(
        worktree.repository_id,
        stage_of(line),
        error.message,
        hint=error.hint,
    )
    return Push(
        target=line,
        label=label_of(line),
        name=None,
        generation=live.generation,
        commit=live.commit,
        error=error.message,
        hint=error.hint,
        may_pass=isinstance(error, Unavailable),
    )


def label_of(line: str) -> str:
    """Return how messages call a publisher, well-formed or not."""
    try:
        return parse(line).label
    except UserError:
        return line


def _unconfirmed(line: str) -> UserError:
    return UserError(
        f"{label_of(line)} is in the repository's git configuration, but was not added here",
        hint="`code2lora publish add` with the same words confirms it, "
        "`code2lora publish remove` drops it",
    )


@contextmanager
def _lock(settings: Settings, repository_id: str) -> Iterator[None]:
    """Keep two processes from pushing one repository at once."""
    locks = settings.state_dir / "locks"
    locks.mkdir(mode=0o700, exist_ok=True)
    try:
        with FileLock(locks / f"publish-{repository_id}", timeout=_LOCK_TIMEOUT_S):
            yield
    except Timeout as error:
        raise UserError(
            "another process is pushing this repository", hint="try again in a minute"
        ) from error
