"""Start the model worker on demand, notice its end, and hold it back when it keeps crashing.

The worker inherits the listening sockets and the read end of a pipe whose write end only we hold:
when we die, however, the pipe closes and the worker ends with us.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress

from code2lora.daemon.listening import is_listening
from code2lora.daemon.platform import interpreter
from code2lora.settings import Settings

log = logging.getLogger(__name__)

_BACKOFF_S = (0.0, 1.0, 4.0, 15.0, 60.0)
_STOP_TIMEOUT_S = 5.0

# How long a thread that waits for the others of a small product spins before it sleeps. The own
# choice of GNU OpenMP is about a millisecond while there are no more threads than cores: where
# something else wants the cores too, that keeps from them the very threads that are waited for.
_ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}


class WorkerProcess:
    """At most one worker process. Used from the supervisor's main thread, but for `answered`."""

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        tcp: socket.socket | None,
        environ: Mapping[str, str],
    ) -> None:
        """Lend both sockets and the environment to every worker; `tcp` may not listen yet."""
        self._settings = settings
        self._listener = listener
        self._tcp = tcp
        self._environ = {**_ENVIRONMENT, **environ}
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: int | None = None
        self._crashes = 0
        self._not_before_s = 0.0

    def may_start(self) -> bool:
        """Tell whether a waiting connection should start a worker now."""
        return self._process is None and time.monotonic() >= self._not_before_s

    def backoff_until_s(self) -> float | None:
        """Return when a crashed worker may start again (monotonic), None when it may now."""
        if self._process is None and time.monotonic() < self._not_before_s:
            return self._not_before_s
        return None

    def start(self) -> None:
        """Start the worker; it takes the waiting connections."""
        lifeline_read, self._lifeline = os.pipe()
        lent = {"socket": self._listener.fileno(), "lifeline": lifeline_read}
        if self._tcp is not None:
            lent["tcp"] = self._tcp.fileno()
        command = [interpreter(), "-I", "-m", "code2lora.daemon", "worker"]
        for name, descriptor in lent.items():
            command += [f"--{name}", str(descriptor)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                cwd="/",
                env=self._environ,
                pass_fds=tuple(lent.values()),
            )
        except OSError as error:  # no process or memory left
            log.warning("the worker could not be started: %s", error.strerror)
            self._forget()
            self._hold_back()
            return
        finally:
            os.close(lifeline_read)
        log.info("worker started, process %d", self._process.pid)

    def reap(self) -> None:
        """Notice a worker that has ended."""
        if self._process is None or self._process.poll() is None:
            return
        status = self._process.returncode
        self._forget()
        if status in (0, -signal.SIGTERM):
            log.info("worker ended, idle or asked to")
            return
        log.warning("worker ended with status %d", status)
        self._hold_back()

    def _hold_back(self) -> None:
        """Let whoever waits know that nobody answers, and wait longer after each crash."""
        for listener in (self._listener, self._tcp):
            with suppress(BlockingIOError):
                while listener is not None and is_listening(listener):
                    listener.accept()[0].close()
        self._not_before_s = time.monotonic() + _BACKOFF_S[min(self._crashes, len(_BACKOFF_S) - 1)]
        self._crashes += 1

    def answered(self) -> None:
        """Take note that the worker works: its next crash is the first again."""
        self._crashes = 0

    def stop(self) -> None:
        """End the worker: politely, then not."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._forget()

    def _forget(self) -> None:
        self._process = None
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None
