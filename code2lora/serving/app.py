"""Serve completions over HTTP, in the shapes of OpenAI's API and of llama.cpp's server.

Knows nothing of sockets or ports: the same application answers on a Unix socket that only its
owner can open and, where it is given a token, on TCP. Completions of all clients share the
engine's passes; a client that goes away ends its completion at the next token.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from code2lora.errors import UserError
from code2lora.serving import chat, llamacpp, openai
from code2lora.serving.answering import (
    BUG,
    MAX_REQUESTS,
    SEND_TIMEOUT_S,
    AdapterResolver,
    Completions,
    Desk,
    Shape,
)
from code2lora.serving.door import PAGES, PageHeaders
from code2lora.serving.engine import Engine
from code2lora.serving.errors import ApiError
from code2lora.serving.guard import BODY_TIMEOUT_S, Guard, TcpAccess, error_response
from code2lora.serving.metrics import TEXT_FORMAT, Metrics
from code2lora.serving.names import is_repository, public_id
from code2lora.serving.response import Json

MAX_BODY_BYTES = 4 * 2**20
LOAD_WAIT_S = 30.0

_POLL_S = 0.02

_FOR_REPOSITORY = re.compile(r"/r/([^/]+)(/.*)")


class EngineProvider(Protocol):
    """Who loads the model."""

    @property
    def model_id(self) -> str:
        """The model's own id."""

    def engine(self) -> Engine | None:
        """Return the engine, or None while it loads; never waits.

        Raises UserError when the model cannot be loaded.
        """


def create_app(
    engine_provider: EngineProvider,
    resolver: AdapterResolver,
    *,
    extra_routes: Sequence[BaseRoute] = (),
    pages: Sequence[BaseRoute] = (),
    tcp: TcpAccess | None = None,
    collectors: Sequence[Collector] = (),
    max_requests: int = MAX_REQUESTS,
    max_body_bytes: int = MAX_BODY_BYTES,
    body_timeout_s: float = BODY_TIMEOUT_S,
    send_timeout_s: float = SEND_TIMEOUT_S,
    load_wait_s: float = LOAD_WAIT_S,
) -> Starlette:
    """Return the application.

    extra_routes: served beside ours on the Unix socket alone, under the same guard (POST must be
        JSON and of bounded size) and error shape
    pages: what browsers are shown, below `/dashboard`, and what those pages ask for
    tcp: who may ask over TCP; None: nobody
    collectors: what `/metrics` tells beside what is served
    max_requests: completions that may be under way or wait; more are answered 429
    body_timeout_s, send_timeout_s: how long a client may take to send the next part of its body,
        and to take the next part of its response
    load_wait_s: how long requests wait for a model that loads, before they are told to ask again
    """
    model = _Model(engine_provider, load_wait_s)
    metrics = Metrics(model.engine_if_loaded, collectors)
    desk = Desk(resolver, metrics, max_requests=max_requests, send_timeout_s=send_timeout_s)

    def is_private(path: str) -> bool:
        scope = {"type": "http", "path": path, "method": "POST", "root_path": "", "headers": []}
        return any(route.matches(scope)[0] != Match.NONE for route in extra_routes)

    return Starlette(
        routes=[*_routes(model, desk), *pages, *extra_routes],
        middleware=[
            Middleware(_RepositoryInPath),  # first: the guard must see the path that is served
            Middleware(PageHeaders),
            Middleware(
                Guard,
                max_body_bytes=max_body_bytes,
                tcp=tcp,
                is_private=is_private,
                body_timeout_s=body_timeout_s,
            ),
        ],
        exception_handlers={
            HTTPException: _answer_http_error,
            UserError: _answer_user_error,
            Exception: _answer_bug,
        },
    )


def _routes(model: _Model, desk: Desk) -> list[Route]:
    information = _Information(model, desk)
    gets = [
        (("/health", "/v1/health"), information.health),
        (("/v1/models", "/models"), information.models),
        (("/props", "/v1/props"), information.props),
        (("/metrics",), information.metrics),
    ]
    posts = [
        (("/v1/completions", "/completions", f"{PAGES}/api/completions"), COMPLETIONS),
        (("/v1/chat/completions", "/chat/completions"), CHAT),
        (("/v1/fim/completions", "/fim/completions"), FILL),
        (("/infill", "/v1/infill"), INFILL),
        (("/completion", "/v1/completion"), NATIVE),
    ]
    return [
        *(Route(path, get) for paths, get in gets for path in paths),
        *(
            Route(path, Completions(desk, shape, model.soon), methods=["POST"])
            for paths, shape in posts
            for path in paths
        ),
    ]


COMPLETIONS = Shape(
    name="completions",
    parse=lambda body, engine, header: openai.parse_call(
        body, engine.model, repository_header=header
    ),
    whole=lambda _, call, done, model: openai.completion_body(
        *done, model_id=model, echoed=call.echoed
    ),
    stream=lambda _, call, model: openai.Chunks(
        model, echoed=call.echoed, include_usage=call.include_usage
    ),
)
"""OpenAI's legacy completions."""

CHAT = Shape(
    name="chat",
    parse=lambda body, engine, header: chat.parse_chat(
        body, engine.model, repository_header=header
    ),
    whole=lambda _, __, done, model: chat.chat_body(done, model_id=model),
    stream=lambda _, call, model: chat.ChatChunks(model, include_usage=call.include_usage),
)
"""OpenAI's chat completions."""

FILL = Shape(
    name="fim",
    parse=lambda body, engine, header: openai.parse_fill(
        body, engine.model, repository_header=header
    ),
    whole=CHAT.whole,
    stream=CHAT.stream,
)
"""Prompt and suffix in, a chat's answer out, as Mistral and DeepSeek have it."""

INFILL = Shape(
    name="infill",
    parse=lambda body, _, header: llamacpp.parse_infill(body, repository_header=header),
    whole=lambda body, call, done, model: llamacpp.native_body(
        done, model_id=model, call=call, wanted=llamacpp.response_fields(body)
    ),
    stream=lambda body, call, model: llamacpp.NativeChunks(
        model, call=call, wanted=llamacpp.response_fields(body)
    ),
)
"""llama.cpp's fill in the middle."""

NATIVE = Shape(
    name="completion",
    parse=lambda body, _, header: llamacpp.parse_native(body, repository_header=header),
    whole=INFILL.whole,
    stream=INFILL.stream,
)
"""llama.cpp's own completion."""


@dataclass(frozen=True)
class _Model:
    """The engine with the id that clients know it by."""

    provider: EngineProvider
    load_wait_s: float

    async def soon(self) -> tuple[Engine, str]:
        """Return both, after a while if need be: few clients ask again by themselves.

        Raises ApiError as `ready` does.
        """
        give_up_s = time.monotonic() + self.load_wait_s
        while time.monotonic() < give_up_s and not self._settled():
            await asyncio.sleep(_POLL_S)
        return self.ready()

    def _settled(self) -> bool:
        try:
            return self.provider.engine() is not None
        except UserError:
            return True

    def ready(self) -> tuple[Engine, str]:
        """Return both. Raises ApiError 503 while the model loads or when it cannot be loaded."""
        try:
            engine = self.provider.engine()
        except UserError as error:
            raise ApiError(503, error.message, hint=error.hint) from error
        if engine is None:
            raise ApiError(503, "Loading model", hint="ask again in a second", retry_after_s=1)
        return engine, public_id(self.provider.model_id, engine.model.control)

    def engine_if_loaded(self) -> Engine | None:
        """Return the engine if it is there."""
        try:
            return self.provider.engine()
        except UserError:
            return None


@dataclass(frozen=True)
class _Information:
    """The endpoints that only tell."""

    model: _Model
    desk: Desk

    async def health(self, request: Request) -> Response:
        self.model.ready()
        return Json({"status": "ok"})

    async def models(self, request: Request) -> Response:
        engine, model_id = await self.model.soon()
        known = await run_in_threadpool(self.desk.resolver.known)
        ids = [model_id, f"{model_id}@base", f"{model_id}@generic"]
        for repository in known:
            named = [r.name for r in known].count(repository.name) == 1
            short = repository.name if named and is_repository(repository.name) else repository.id
            ids += [f"{model_id}@{short}"]
            ids += [f"{model_id}@{short}@{commit[:12]}" for commit in repository.commits]
        entries = [_entry(one, engine.context_tokens) for one in ids]
        return Json({"object": "list", "data": entries})

    async def props(self, request: Request) -> Response:
        engine, model_id = await self.model.soon()
        return Json(
            llamacpp.props(
                model_id, engine.context_tokens, engine.max_rows, engine.model.chat_template
            )
        )

    async def metrics(self, request: Request) -> Response:
        content = await run_in_threadpool(self.desk.metrics.text)
        return Response(content, media_type=TEXT_FORMAT)


def _entry(model_id: str, context_tokens: int) -> dict[str, Any]:
    return {
        "id": model_id,
        "object": "model",
        "created": 0,
        "owned_by": "code2lora",
        "max_model_len": context_tokens,
    }


class _RepositoryInPath:
    """Lets clients that can set nothing but an address name the repository in it.

    `/r/REPOSITORY/infill` is `/infill` with the repository's header.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = _FOR_REPOSITORY.fullmatch(scope["path"])
        if found is not None:
            name = openai.REPOSITORY_HEADER.lower().encode()
            others = [(k, v) for k, v in scope["headers"] if k != name]
            header = (name, found[1].encode("latin-1", "replace"))
            path = found[2]
            scope = {**scope, "path": path, "headers": [*others, header]}
            scope["raw_path"] = path.encode("utf-8", "replace")
        await self._app(scope, receive, send)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = error_response(ApiError(error.status_code, error.detail))
    response.headers.update(error.headers or {})
    return response


async def _answer_user_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    return error_response(ApiError.of(error))


async def _answer_bug(request: Request, error: Exception) -> Response:
    return error_response(BUG)
