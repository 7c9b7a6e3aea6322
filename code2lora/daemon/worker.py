"""The model worker: answers completions and refreshes on the socket that the supervisor lends.

Reads   requests on the lent sockets; the TCP token; the state store; git; the model's files.
Writes  through the reconciler; nothing of its own.

It exits with status 0 when nothing has been asked for a while, so that the memory, and on a GPU
the device's, is free again; and at once when the supervisor is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Callable

import torch
import uvicorn
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from code2lora.daemon.dashboard.routes import dashboard_routes
from code2lora.daemon.gauges import GainGauges
from code2lora.daemon.listening import is_listening, read_token
from code2lora.daemon.loading import Models
from code2lora.daemon.resolving import StoreResolver
from code2lora.daemon.scoring import Precedence, Scorer
from code2lora.errors import UserError
from code2lora.serving.app import create_app
from code2lora.serving.door import CODE_LIFE_S, Door
from code2lora.serving.guard import TcpAccess
from code2lora.serving.server import server_config
from code2lora.settings import Settings
from code2lora.state_store import Store

log = logging.getLogger(__name__)

_GRACE_S = 5.0


class Activity:
    """ASGI middleware that knows how long nothing has been asked."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._n_active = 0
        self._last_s = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting it."""
        self._n_active += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._n_active -= 1
            self._last_s = time.monotonic()

    @property
    def idle_s(self) -> float:
        """Seconds since the last answer; 0 while one is under way."""
        return 0.0 if self._n_active else time.monotonic() - self._last_s


def run_worker(
    settings: Settings, socket_fd: int, lifeline_fd: int, tcp_fd: int | None = None
) -> None:
    """Serve on the inherited listening sockets until idle, told to stop, or orphaned."""
    _die_with(lifeline_fd)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with Store.open(settings.resolved_database_url) as store:
        models = Models(settings, store)
        tcp = None if tcp_fd is None else _tcp_access(settings)
        door = (tcp and tcp.door) or Door(None)
        port = _Port(None if tcp is None else socket.socket(fileno=tcp_fd))
        app = create_app(
            models,
            StoreResolver(store, models),
            extra_routes=[
                *_routes(settings, store, models, Precedence(port.is_closing)),
                _door_route(door, port),
            ],
            pages=dashboard_routes(settings, store, door),
            tcp=tcp,
            collectors=[GainGauges(settings, store)],
        )
        activity = Activity(app)
        port.server = uvicorn.Server(server_config(activity, graceful_s=int(_GRACE_S)))
        listeners = [socket.socket(fileno=socket_fd), *port.listening()]
        asyncio.run(_serve(port.server, listeners, activity, settings.idle_exit_s))


def _tcp_access(settings: Settings) -> TcpAccess | None:
    """Return who may ask over TCP: nobody, where a token is needed and there is none to compare."""
    if settings.http_auth == "none":
        return TcpAccess(token=None, door=Door(None))
    token = read_token(settings.http_token_file)
    if token is None:
        log.warning("%s has no token, so nobody may ask over TCP", settings.http_token_file)
        return None
    return TcpAccess(token, Door(token))


class _Port:
    """The lent TCP socket. It may not listen yet: then nobody has wanted anything of it."""

    def __init__(self, listener: socket.socket | None) -> None:
        self._listener = listener
        self.server: uvicorn.Server | None = None

    def listening(self) -> list[socket.socket]:
        """Return the socket, if it is to be served from the start."""
        return (
            [] if self._listener is None or not is_listening(self._listener) else [self._listener]
        )

    def is_closing(self) -> bool:
        """Tell whether the server has been told to end."""
        return self.server is not None and self.server.should_exit

    async def open(self) -> int:
        """Let it listen from now on, for this worker and all after it; return the port's number."""
        server, listener = self.server, self._listener
        if server is None or listener is None:
            raise UserError("no browser can connect", hint="`code2lora daemon logs` says why")
        if not is_listening(listener):
            config, state = server.config, server.lifespan.state
            opened = await asyncio.get_running_loop().create_server(
                lambda: config.http_protocol_class(  # type: ignore[call-arg]
                    config=config, server_state=server.server_state, app_state=state
                ),
                sock=listener,
                backlog=config.backlog,
            )
            server.servers.append(opened)
        return int(listener.getsockname()[1])


def _door_route(door: Door, port: _Port) -> Route:
    """Return the route that gives out a code for a browser; it exists on the Unix socket alone."""

    async def endpoint(request: Request) -> JSONResponse:
        opened = await port.open()
        return JSONResponse({"port": opened, "code": door.new_code(), "code_life_s": CODE_LIFE_S})

    return Route("/daemon/dashboard", endpoint, methods=["POST"])


async def _serve(
    server: uvicorn.Server,
    listeners: list[socket.socket],
    activity: Activity,
    idle_exit_s: float,
) -> None:
    async def leave_when_idle() -> None:
        while activity.idle_s < idle_exit_s:
            await asyncio.sleep(min(1.0, idle_exit_s / 4))
        server.should_exit = True

    watch = asyncio.create_task(leave_when_idle())
    await server.serve(sockets=listeners)
    watch.cancel()


def _routes(
    settings: Settings, store: Store, models: Models, precedence: Precedence
) -> list[Route]:
    """Return the routes that only the supervisor uses; they exist on the Unix socket alone."""
    scorer = Scorer(settings, store, models, precedence)

    def refresh(values: dict[str, object]) -> dict[str, object]:
        with precedence.first():
            return bring_to_head(values)

    def bring_to_head(values: dict[str, object]) -> dict[str, object]:
        worktree_id = int(str(values["worktree"]))
        try:
            reconciler = models.reconciler()
        except UserError as error:
            worktree = store.worktree(worktree_id)
            if worktree is not None:
                store.record_failure(
                    worktree.repository_id,
                    "model",
                    error.message,
                    hint=error.hint,
                    worktree_id=worktree_id,
                )
            raise
        done = reconciler.refresh(worktree_id)
        models.prepare(done.adapter)
        return {
            "repository": done.repository,
            "commit": done.commit,
            "absorbed": done.absorbed,
            "backfill": done.backfill,
        }

    def backfill(values: dict[str, object]) -> dict[str, object]:
        done = models.reconciler().backfill(
            str(values["repository"]), float(str(values["budget_s"]))
        )
        return {"done": done.done, "absorbed": done.absorbed, "total": done.total}

    def score(values: dict[str, object]) -> dict[str, object]:
        done = scorer.score(int(str(values["worktree"])), float(str(values["budget_s"])))
        return {"done": done.done, "scored": done.scored, "switched": done.switched}

    return [
        _json_route("/daemon/refresh", refresh),
        _json_route("/daemon/backfill", backfill),
        _json_route("/daemon/score", score),
    ]


def _json_route(path: str, work: Callable[[dict[str, object]], dict[str, object]]) -> Route:
    """Return a POST route whose blocking work runs on a thread."""

    async def endpoint(request: Request) -> JSONResponse:
        try:
            return JSONResponse(await run_in_threadpool(work, await request.json()))
        except LookupError as error:
            if type(error) is not LookupError:  # the state store's word for rows that are gone
                raise
            raise UserError(f"the repository was let go meanwhile: {error}") from error

    return Route(path, endpoint, methods=["POST"])


def _die_with(lifeline_fd: int) -> None:
    """End this process when the other end of the pipe closes, that is when the supervisor dies.

    Nothing needs unwinding: every transaction and every published directory is whole or absent.
    """

    def wait() -> None:
        os.read(lifeline_fd, 1)
        log.warning("the supervisor is gone")
        os._exit(0)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
