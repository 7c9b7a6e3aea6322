"""Wait, with a limit, until a worktree's live adapter is the one of its HEAD; tell the stages.

The daemon does the work; what is told here is what the database shows of it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from code2lora.cli import render
from code2lora.cli.place import Place
from code2lora.cli.processes import daemon_view
from code2lora.errors import UserError
from code2lora.settings import Settings

if TYPE_CHECKING:
    from code2lora.state_store.records import Adapter

_POLL_S = 0.02
_LOOK_AT_DAEMON_S = 1.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Arrival:
    """The adapter that was waited for."""

    adapter: Adapter
    waited_s: float


class Stages:
    """Tells on stderr what is done and what is under way."""

    def __init__(self, say_done: Say, say_now: Say) -> None:
        self.done = say_done
        """Say that a stage is behind us."""
        self.now = say_now
        """Say what is under way; on a pipe nothing is said, because nothing can be taken back."""


@contextmanager
def stages() -> Iterator[Stages]:
    """Yield a teller of stages: a spinner on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield Stages(render.remark, lambda text: None)
        return
    console = render.error_console()
    with console.status("") as spinner:
        yield Stages(
            lambda text: console.print(f"✓ {text}"),
            lambda text: spinner.update(f"{text} …"),
        )


def ensure_daemon(settings: Settings) -> bool:
    """Start the daemon unless it runs; tell whether it had to be. Raises UserError on failure."""
    from code2lora.daemon.control import start, supervisor_status

    if supervisor_status(settings).running:
        return False
    start(settings, os.environ)
    return True


def wait_for_head(place: Place, tell: Stages, *, timeout_s: float, since: datetime) -> Arrival:
    """Return the live adapter as soon as it is HEAD's.

    since: failures before this moment are not ours.

    Raises UserError with the failure's message when one is recorded, when the daemon ends, or when
    the time is up.
    """
    from code2lora.adapters.prune import is_intact

    began_s = time.monotonic()
    looked_s = 0.0
    while True:
        head = place.history.head().commit
        live = place.store.live_adapter(place.worktree.id)
        found = live if live is not None and live.commit == head else None
        if found is not None and is_intact(Path(found.path), found.sha256):
            return Arrival(found, time.monotonic() - began_s)
        _raise_failure(place, since)
        waited_s = time.monotonic() - began_s
        if waited_s > timeout_s:
            raise _too_late(place, timeout_s)
        if waited_s - looked_s > _LOOK_AT_DAEMON_S or not looked_s:
            looked_s = waited_s or _POLL_S
            _tell_progress(place, tell, head)
        time.sleep(_POLL_S)


def moment() -> datetime:
    """Return a moment before anything that happens from now on; databases round times."""
    return datetime.now(UTC) - timedelta(milliseconds=5)


def _raise_failure(place: Place, since: datetime) -> None:
    for failure in place.store.failures(place.repository.id, limit=5):
        if failure.at >= since and failure.worktree_id in (None, place.worktree.id):
            raise UserError(failure.message, hint=failure.hint or "`code2lora status`")


def _tell_progress(place: Place, tell: Stages, head: str | None) -> None:
    daemon = daemon_view(place.settings)
    if not daemon.running:
        raise UserError("the daemon has ended", hint="`code2lora daemon logs`")
    if daemon.worker is None:
        tell.now("starting the model worker")
        return
    newest = place.store.recent_states(place.repository.id, limit=1)
    if not newest:
        tell.now("reading the snapshot at HEAD")
    elif newest[0].commit != head:
        tell.now(f"absorbing commits, at {render.short(newest[0].commit)}")
    else:
        tell.now("writing the adapter")


def _too_late(place: Place, timeout_s: float) -> UserError:
    daemon = daemon_view(place.settings)
    doing = "the model worker is at work" if daemon.worker else "the model worker has not started"
    return UserError(
        f"no adapter for HEAD after {render.span(timeout_s)}; {doing}",
        hint="the daemon goes on: `code2lora status` shows how far, `code2lora daemon logs` why",
    )
