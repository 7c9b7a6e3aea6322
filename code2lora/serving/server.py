"""How the application is put on sockets: uvicorn, with a limit to how slowly a client may ask."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 10.0
"""Longest wait for the head of a request, from its first byte or from connecting."""
MAX_CONNECTIONS = 512


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 that hangs up on clients who do not finish asking."""

    head_timeout_s = HEAD_TIMEOUT_S
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what came, and see whether it was a whole head."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._deadline is None and not self.transport.is_closing():
            self._wait_for_head()

    def _wait_for_head(self) -> None:
        self._deadline = self.loop.call_later(self.head_timeout_s, self._hang_up)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _hang_up(self) -> None:
        self._deadline = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def server_config(app: ASGIApp, *, graceful_s: int, **options: Any) -> uvicorn.Config:
    """Return what a uvicorn server for the application is made of.

    graceful_s: how long requests under way may take when the server ends
    options: such as `uds`, where the sockets are not handed over
    """
    return uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # nobody stands before us, and everybody could say so
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=graceful_s,
        **options,
    )
