"""Serve completions over HTTP in the OpenAI shape.

Knows nothing of sockets, ports or tokens: the same application runs behind a Unix socket that
only its owner can open and behind any transport that guards itself. Blocking work runs in one
thread; a client that goes away ends its completion at the next token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from code2lora.errors import UserError
from code2lora.serving.adapter_cache import LoadedAdapter
from code2lora.serving.completion import AdapterIdentity, Completion, Use
from code2lora.serving.engine import Engine
from code2lora.serving.openai import (
    GENERATION_HEADER,
    REPOSITORY_HEADER,
    ApiError,
    Chunks,
    CompletionCall,
    completion_body,
    error_body,
    generation_header,
    parse_call,
    parse_json,
)
from code2lora.serving.worker_thread import Job, WorkerThread

MAX_BODY_BYTES = 4 * 2**20
MAX_QUEUED = 16

_log = logging.getLogger(__name__)


class EngineProvider(Protocol):
    """Who loads the model."""

    @property
    def model_id(self) -> str:
        """The id that clients see; editors choose their prompt template by it."""

    def engine(self) -> Engine | None:
        """Return the engine, or None while it loads; never waits.

        Raises UserError when the model cannot be loaded.
        """


class AdapterResolver(Protocol):
    """Who knows the repositories."""

    def resolve(self, repository: str | None, commit: str | None, use: Use) -> LoadedAdapter | None:
        """Return the adapter for a request, or None for the base model; may wait.

        repository: an id as the client sent it, to be looked up and never used as a path
        commit: a commit hash or the beginning of one; None means the current adapter

        Raises UserError when there is no such repository, commit or adapter.
        """


def create_app(
    engine_provider: EngineProvider,
    resolver: AdapterResolver,
    *,
    extra_routes: Sequence[BaseRoute] = (),
    max_queued: int = MAX_QUEUED,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> Starlette:
    """Return the application.

    extra_routes: served beside ours, under the same guard (POST must be JSON and of bounded size)
        and error shape
    max_queued: completions that may wait for the running one; more are answered 429
    """
    thread = WorkerThread(max_queued=max_queued)
    completions = _Completions(engine_provider, resolver, thread)
    models = _Models(engine_provider)
    return Starlette(
        routes=[
            Route("/health", _Health(engine_provider).get),
            *(Route(path, models.get) for path in ("/v1/models", "/models")),
            *(
                Route(path, completions, methods=["POST"])
                for path in ("/v1/completions", "/completions")
            ),
            *extra_routes,
        ],
        middleware=[Middleware(_Guard, max_body_bytes=max_body_bytes)],
        exception_handlers={
            HTTPException: _answer_http_error,
            UserError: _answer_user_error,
            Exception: _answer_bug,
        },
    )


@dataclass(frozen=True)
class _Health:
    provider: EngineProvider

    async def get(self, request: Request) -> Response:
        _ready(self.provider)
        return JSONResponse({"status": "ok"})


@dataclass(frozen=True)
class _Models:
    provider: EngineProvider

    async def get(self, request: Request) -> Response:
        model = {
            "id": self.provider.model_id,
            "object": "model",
            "created": 0,
            "owned_by": "code2lora",
            "max_model_len": _ready(self.provider).context_tokens,
        }
        return JSONResponse({"object": "list", "data": [model]})


def _ready(provider: EngineProvider) -> Engine:
    try:
        engine = provider.engine()
    except UserError as error:
        raise ApiError(503, error.message, hint=error.hint) from error
    if engine is None:
        raise ApiError(503, "Loading model", hint="ask again in a second", retry_after_s=1)
    return engine


@dataclass(frozen=True)
class _Begun:
    """The adapter is chosen; tokens follow."""

    adapter: AdapterIdentity | None


@dataclass(frozen=True)
class _Completions:
    """The completions endpoint, as an ASGI application."""

    provider: EngineProvider
    resolver: AdapterResolver
    thread: WorkerThread

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            body = parse_json(await request.body())
        except ClientDisconnect:
            return
        call = parse_call(body, repository_header=request.headers.get(REPOSITORY_HEADER))
        engine = _ready(self.provider)
        with self.thread.start(lambda job: self._complete(engine, call, job)) as job:
            watch = asyncio.create_task(_cancel_on_disconnect(receive, job))
            try:
                await self._answer(call, job, scope, receive, send)
            finally:
                watch.cancel()

    def _complete(self, engine: Engine, call: CompletionCall, job: Job) -> None:
        """Do the work, in the worker thread."""
        try:
            adapter = self.resolver.resolve(call.repository, call.commit, call.use)
        except ApiError:
            raise
        except UserError as error:
            raise ApiError(404, error.message, hint=error.hint) from error
        job.post(_Begun(adapter.identity if adapter else None))
        on_text = job.post if call.stream else None
        job.post(engine.complete(call.request, adapter, on_text=on_text, cancelled=job.cancelled))

    async def _answer(
        self, call: CompletionCall, job: Job, scope: Scope, receive: Receive, send: Send
    ) -> None:
        begun = await job.next_event()
        if not isinstance(begun, _Begun):  # the client is gone
            return
        headers = {GENERATION_HEADER: generation_header(begun.adapter)}
        if call.stream:
            await self._stream(job, headers, send)
            return
        completion = await job.next_event()
        if isinstance(completion, Completion):
            body = completion_body(completion, model_id=self.provider.model_id)
            await JSONResponse(body, headers=headers)(scope, receive, send)

    async def _stream(self, job: Job, headers: dict[str, str], send: Send) -> None:
        chunks = Chunks(self.provider.model_id)
        await send(_stream_start(headers))
        try:
            while isinstance(piece := await job.next_event(), str):
                await send(_body(chunks.text(piece), more=True))
            last = chunks.end(piece) if isinstance(piece, Completion) else b""
        except UserError as error:
            last = chunks.error(_as_api_error(error))
        except Exception:
            _log.exception("a completion failed after its response had begun")
            last = chunks.error(_BUG)
        await send(_body(last, more=False))


async def _cancel_on_disconnect(receive: Receive, job: Job) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.cancel()


def _stream_start(headers: dict[str, str]) -> Message:
    fields = {"content-type": "text/event-stream", "cache-control": "no-cache", **headers}
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in fields.items()]
    return {"type": "http.response.start", "status": 200, "headers": raw}


def _body(content: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}


class _Guard:
    """Refuses bodies that are not JSON or too large, before anything reads them.

    A web page can make a browser post a form to any address, but not JSON without asking first.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        length = headers.get("content-length", "")
        if media_type != "application/json":
            error = ApiError(415, "the content type is not application/json")
            await _error_response(error)(scope, receive, send)
        elif length.isdecimal() and int(length) > self._max_body_bytes:
            await _error_response(self._too_large())(scope, receive, send)
        else:
            await self._app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        n_bytes = 0

        async def counted() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > self._max_body_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._max_body_bytes} bytes")


_BUG = ApiError(500, "internal error", hint="`code2lora daemon logs`")


def _as_api_error(error: UserError) -> ApiError:
    if isinstance(error, ApiError):
        return error
    return ApiError(400, error.message, hint=error.hint)


def _error_response(error: ApiError) -> Response:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _error_response(ApiError(error.status_code, error.detail))
    response.headers.update(error.headers or {})
    return response


async def _answer_user_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    return _error_response(_as_api_error(error))


async def _answer_bug(request: Request, error: Exception) -> Response:
    return _error_response(_BUG)
