"""Start, stop and find the supervisor; what `code2lora daemon` and the hooks call.

The supervisor holds a file lock for as long as it lives, which the kernel releases however it
ends. The pid file beside it is information: for messages, and for the hook's cheap liveness test.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from code2lora.daemon.platform import interpreter, spawn_detached
from code2lora.errors import UserError
from code2lora.settings import Settings

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 20.0
DIRECTORIES = ("config_dir", "state_dir", "data_dir", "runtime_dir")
"""The settings that tell one installation from another."""
_POLL_S = 0.02


@dataclass(frozen=True)
class SupervisorStatus:
    """Whether a supervisor runs, and as which process."""

    running: bool
    pid: int | None


def start_command(settings: Settings) -> list[str]:
    """Return the command that starts a supervisor in the background if none runs.

    It names the directories, so that a hook that a graphical client runs, without the shell's
    environment, starts the daemon of these settings.
    """
    command = [interpreter(), "-I", "-m", "code2lora.daemon", "start"]
    for name in DIRECTORIES:
        command += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    return command


def run_command() -> list[str]:
    """Return the command that runs the supervisor in the foreground."""
    return [interpreter(), "-I", "-m", "code2lora.daemon", "run"]


def supervisor_lock(settings: Settings) -> FileLock:
    """Return the lock that the one supervisor of these settings holds."""
    return FileLock(settings.state_dir / "supervisor.lock", timeout=0)


def supervisor_log(settings: Settings) -> Path:
    """Return the file that the supervisor logs to, and its and its worker's last words."""
    return settings.log_dir / "daemon.log"


def worker_log(settings: Settings) -> Path:
    """Return the file that the model worker logs to."""
    return settings.log_dir / "worker.log"


def supervisor_status(settings: Settings) -> SupervisorStatus:
    """Tell whether the supervisor runs, by trying its lock."""
    if not settings.state_dir.is_dir():
        return SupervisorStatus(running=False, pid=None)
    lock = supervisor_lock(settings)
    try:
        with lock:
            return SupervisorStatus(running=False, pid=None)
    except Timeout:
        return SupervisorStatus(running=True, pid=_read_pid(settings.pid_file))


def start(settings: Settings, env: Mapping[str, str]) -> SupervisorStatus:
    """Start the supervisor in the background unless one runs, and wait until it is ready.

    Raises UserError with the end of its log when it does not come up.
    """
    settings.prepare()
    status = supervisor_status(settings)
    if status.running:
        return status
    log = supervisor_log(settings)
    settings.pid_file.unlink(missing_ok=True)
    scrubbed = {key: value for key, value in env.items() if not key.startswith("GIT_")}
    scrubbed.pop("NOTIFY_SOCKET", None)  # of whichever service the hook ran in
    pid = spawn_detached(run_command(), log=log, env=scrubbed)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        # The pid file is written once the socket listens; another starter may have won the race.
        if settings.pid_file.exists() and supervisor_status(settings).running:
            return supervisor_status(settings)
        if not _alive(pid) and not supervisor_status(settings).running:
            break
        time.sleep(_POLL_S)
    raise UserError(
        f"the daemon did not start: {_complaint(log)}",
        hint=f"read {log}, or run `code2lora daemon run` to see it in the foreground",
    )


def stop(settings: Settings) -> bool:
    """Stop the supervisor and its worker; False when none runs.

    Raises UserError when it does not end in time.
    """
    status = supervisor_status(settings)
    if not status.running:
        return False
    if status.pid is None:
        raise UserError(
            f"the daemon runs, but {settings.pid_file} does not tell its process",
            hint="end the process whose command line has `code2lora.daemon run`",
        )
    with suppress(ProcessLookupError):
        os.kill(status.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        if not _alive(status.pid) and not supervisor_status(settings).running:
            return True
        time.sleep(_POLL_S)
    raise UserError(
        f"the daemon (process {status.pid}) did not end within {STOP_TIMEOUT_S:.0f} s",
        hint=f"`kill -9 {status.pid}` is safe: no work is lost",
    )


def _read_pid(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _alive(pid: int) -> bool:
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # collects it if we started it and it has ended
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _complaint(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return "it left no log"
    complaints = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (complaints or lines or ["it left no log"])[-1]
