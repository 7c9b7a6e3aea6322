"""Answer one request for completions: choose the adapter, have the engine complete, write it out.

The same for every shape of request and response; a shape brings a parser and a format.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from code2lora.errors import UserError
from code2lora.serving.adapter_cache import LoadedAdapter
from code2lora.serving.completion import AdapterIdentity, Completion, Piece, TokenChance, Use
from code2lora.serving.engine import Engine
from code2lora.serving.errors import ApiError
from code2lora.serving.fields import parse_json
from code2lora.serving.guard import error_response
from code2lora.serving.job import Job
from code2lora.serving.metrics import Metrics
from code2lora.serving.names import answered_id
from code2lora.serving.openai import (
    GENERATION_HEADER,
    REPOSITORY_HEADER,
    SWAP_HEADER,
    CompletionCall,
    generation_header,
)
from code2lora.serving.prompts import Prompts
from code2lora.serving.response import Json

MAX_REQUESTS = 64
"""Requests for completions that may be under way or wait."""
SEND_TIMEOUT_S = 60.0
"""A client that takes nothing for so long is gone."""

BUG = ApiError(500, "internal error", hint="`code2lora daemon logs`")

_N_RESOLVERS = 4

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Known:
    """A repository that completions can be asked for."""

    id: str
    name: str
    commits: tuple[str, ...] = ()
    """Commits whose adapters lie ready; others can be asked for as well."""


class AdapterResolver(Protocol):
    """Who knows the repositories."""

    def resolve(
        self, repository: str | None, commit: str | None, use: Use, files: Sequence[str] = ()
    ) -> LoadedAdapter | None:
        """Return the adapter for a request, or None for the base model; may wait.

        repository: an id or a name as the client sent it, to be looked up, never used as a path
        commit: a commit hash or the beginning of one; None means the current adapter
        files: names of files around the cursor, to tell the repository by where nothing else does

        Raises UserError when there is no such repository, commit or adapter.
        """

    def known(self) -> Sequence[Known]:
        """Return the repositories; may wait."""


class StreamFormat(Protocol):
    """Turns what happens into the events of one stream."""

    def text(self, piece: str, index: int = 0, tokens: Sequence[TokenChance] = ()) -> bytes:
        """Return the event for a piece of the completion with this number."""

    def end(self, *done: Completion) -> bytes:
        """Return the last events."""

    def error(self, error: ApiError) -> bytes:
        """Return the event for a failure after the response has begun."""


@dataclass(frozen=True)
class Shape:
    """One kind of request for completions."""

    name: str
    """As the metrics call it."""
    parse: Callable[[dict[str, Any], Engine, str | None], CompletionCall]
    """Body, engine and repository header to a call. Raises ApiError 400."""
    whole: Callable[[dict[str, Any], CompletionCall, Sequence[Completion], str], Any]
    """Body, call, completions and model id to the JSON of the response."""
    stream: Callable[[dict[str, Any], CompletionCall, str], StreamFormat]
    """Body, call and model id to the format of the events."""


@dataclass(frozen=True)
class _Begun:
    """The adapter is chosen; tokens follow."""

    adapter: LoadedAdapter | None


class Desk:
    """What all requests share: the resolver, its threads, and how many are under way."""

    def __init__(
        self,
        resolver: AdapterResolver,
        metrics: Metrics,
        *,
        max_requests: int = MAX_REQUESTS,
        send_timeout_s: float = SEND_TIMEOUT_S,
    ) -> None:
        self.resolver = resolver
        self.metrics = metrics
        self.threads = ThreadPoolExecutor(_N_RESOLVERS, thread_name_prefix="resolve")
        self.send_timeout_s = send_timeout_s
        self._max_requests = max_requests
        self._n_requests = 0

    def __enter__(self) -> None:
        """Take a place. Raises ApiError 429 when all are taken."""
        if self._n_requests >= self._max_requests:
            raise ApiError(
                429,
                "too many requests are waiting",
                hint="ask again in a second",
                retry_after_s=1,
            )
        self._n_requests += 1

    def __exit__(self, *_: object) -> None:
        self._n_requests -= 1


@dataclass(frozen=True)
class Completions:
    """One endpoint, as an ASGI application."""

    desk: Desk
    shape: Shape
    ready: Callable[[], Awaitable[tuple[Engine, str]]]
    """Returns the engine and the model's public id. Raises ApiError 503 when it has none."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever comes of it."""
        exchange = _Exchange(self, scope, receive, send)
        try:
            await exchange.run()
        except ClientDisconnect:
            exchange.status = 499
        except Exception as error:
            if not isinstance(error, UserError):
                _log.exception("a request for completions failed")
            told = ApiError.of(error) if isinstance(error, UserError) else BUG
            exchange.status = told.status
            await error_response(told)(scope, receive, send)
        self.desk.metrics.answered(self.shape.name, exchange.status)


@dataclass
class _Exchange:
    """One request and its response."""

    endpoint: Completions
    scope: Scope
    receive: Receive
    send: Send
    status: int = 200
    _body: dict[str, Any] = field(default_factory=dict)

    async def run(self) -> None:
        request = Request(self.scope, self.receive)
        desk, shape = self.endpoint.desk, self.endpoint.shape
        self._body = parse_json(await request.body())
        engine, model_id = await self.endpoint.ready()
        call = shape.parse(self._body, engine, request.headers.get(REPOSITORY_HEADER))
        with desk, Job() as job:
            job.start(desk.threads, lambda: self._begin(engine, call, job))
            watch = asyncio.create_task(_cancel_on_disconnect(self.receive, job))
            try:
                await self._answer(call, job, model_id)
            finally:
                watch.cancel()

    def _begin(self, engine: Engine, call: CompletionCall, job: Job) -> None:
        """Choose the adapter and hand the request to the engine; in a thread."""
        desk = self.endpoint.desk
        try:
            adapter = desk.resolver.resolve(call.repository, call.commit, call.use, call.files)
        except UserError as error:
            raise ApiError.of(error, 404) from error
        if adapter is not None and call.use == "own" and call.commit is None:
            desk.metrics.live(adapter)
        job.post(_Begun(adapter))
        stream = call.stream

        def on_piece(index: int, piece: Piece) -> None:
            if stream:
                job.post((index, piece))

        def later(work: Callable[[], None]) -> None:
            job.start(desk.threads, work)

        Prompts(
            engine,
            call.requests,
            adapter,
            on_done=job.post,
            on_piece=on_piece,
            cancelled=job.cancelled,
            later=later,
        ).begin()

    async def _answer(self, call: CompletionCall, job: Job, model_id: str) -> None:
        begun = await job.next_event()
        if not isinstance(begun, _Begun):
            raise ClientDisconnect
        identity = begun.adapter.identity if begun.adapter else None
        model = answered_id(model_id, identity, pinned=call.commit is not None)
        headers = _headers(identity, begun.adapter)
        if call.stream:
            await self._stream(call, job, model, headers)
            return
        done = await job.next_event()
        if not isinstance(done, list):
            raise ClientDisconnect
        self.endpoint.desk.metrics.completed(done)
        body = self.endpoint.shape.whole(self._body, call, done, model)
        await Json(body, headers=headers)(self.scope, self.receive, self._write)

    async def _stream(
        self, call: CompletionCall, job: Job, model: str, headers: dict[str, str]
    ) -> None:
        chunks = self.endpoint.shape.stream(self._body, call, model)
        # the first event decides on the status: a request can still be refused
        event = await job.next_event()
        await self._write(_stream_start(headers))
        try:
            while isinstance(event, tuple):
                index, piece = event
                await self._write(_part(chunks.text(piece.text, index, piece.tokens), more=True))
                event = await job.next_event()
            if not isinstance(event, list):
                raise ClientDisconnect
            self.endpoint.desk.metrics.completed(event)
            last = chunks.end(*event)
        except ClientDisconnect:
            raise
        except UserError as error:
            self.status = ApiError.of(error).status
            last = chunks.error(ApiError.of(error))
        except Exception:
            _log.exception("a completion failed after its response had begun")
            self.status = 500
            last = chunks.error(BUG)
        await self._write(_part(last, more=False))

    async def _write(self, message: Message) -> None:
        try:
            await asyncio.wait_for(self.send(message), self.endpoint.desk.send_timeout_s)
        except TimeoutError as error:
            raise ClientDisconnect from error


async def _cancel_on_disconnect(receive: Receive, job: Job) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.cancel()


def _headers(identity: AdapterIdentity | None, adapter: LoadedAdapter | None) -> dict[str, str]:
    headers = {GENERATION_HEADER: generation_header(identity)}
    if adapter is not None:
        headers[SWAP_HEADER] = f"{adapter.swap_ms:.3f}"
    return headers


def _stream_start(headers: dict[str, str]) -> Message:
    fields = {"content-type": "text/event-stream", "cache-control": "no-cache", **headers}
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in fields.items()]
    return {"type": "http.response.start", "status": 200, "headers": raw}


def _part(content: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}
