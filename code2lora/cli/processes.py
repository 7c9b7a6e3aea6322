"""Look up the supervisor and its model worker in the process table."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from code2lora.settings import Settings

if TYPE_CHECKING:
    import psutil


@dataclass(frozen=True, kw_only=True)
class ProcessView:
    """One running process."""

    pid: int
    rss_bytes: int
    started_at: datetime


@dataclass(frozen=True, kw_only=True)
class DaemonView:
    """Whether the daemon runs, and its processes as far as they can be seen."""

    running: bool
    supervisor: ProcessView | None
    worker: ProcessView | None
    """None while no model is loaded."""


def daemon_view(settings: Settings) -> DaemonView:
    """Return how the daemon of these settings stands; never wakes the worker."""
    from code2lora.daemon.control import supervisor_status

    status = supervisor_status(settings)
    if not status.running or status.pid is None:
        return DaemonView(running=status.running, supervisor=None, worker=None)
    import psutil

    try:
        supervisor = psutil.Process(status.pid)
        workers = [child for child in supervisor.children() if "worker" in child.cmdline()]
        return DaemonView(
            running=True,
            supervisor=_view(supervisor),
            worker=_view(workers[0]) if workers else None,
        )
    except psutil.Error:  # ended while we looked, or not ours to see
        return DaemonView(running=True, supervisor=None, worker=None)


def _view(process: psutil.Process) -> ProcessView:
    return ProcessView(
        pid=process.pid,
        rss_bytes=process.memory_info().rss,
        started_at=datetime.fromtimestamp(process.create_time(), UTC),
    )
