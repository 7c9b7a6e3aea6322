"""Refuse what should not reach the application: foreign pages, large or slow bodies, strangers.

On a Unix socket that only its owner can open, everybody is the owner. On TCP everything on this
machine can connect, and so can every web page that a browser on it shows. So there a request must
name this machine as its host (a page that rebinds its own name to 127.0.0.1 does not), must not
come from another page (browsers tell by `Origin`), and must carry the token of a file that only
the owner can read. A browser that was let in by the door may ask for our own pages without it.
Everywhere a body must be JSON, which a page cannot send unasked, of bounded size, and come in
bounded time.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from code2lora.serving.door import Door, leads_to_pages, locked
from code2lora.serving.errors import ApiError, error_body
from code2lora.serving.response import Json

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
BODY_TIMEOUT_S = 20.0

_HOST = re.compile(r"(?:localhost|127\.0\.0\.1|\[::1\])(?::[0-9]{1,5})?", re.IGNORECASE)
_READS = ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True, slots=True)
class TcpAccess:
    """Who may ask over TCP."""

    token: str | None
    """What a request must carry; None lets every program on this machine in."""
    door: Door | None = None
    """Lets browsers that were logged in ask for the pages; None: there are none."""


class Guard:
    """ASGI middleware, the outermost."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        tcp: TcpAccess | None,
        is_private: Callable[[str], bool],
        body_timeout_s: float = BODY_TIMEOUT_S,
    ) -> None:
        """Guard `app`.

        tcp: None refuses everything that does not come over a Unix socket
        is_private: tells the paths that do not exist over TCP
        body_timeout_s: longest wait for the next part of a body
        """
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._tcp = tcp
        self._is_private = is_private
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer why not."""
        if scope["type"] != "http":
            return  # neither lifespan nor websockets are spoken here
        headers = Headers(scope=scope)
        try:
            if not _over_unix(scope):
                self._admit(headers, scope)
            if scope["method"] not in _READS:
                self._check_body(headers)
        except ApiError as error:
            await _refusal(error, headers, scope)(scope, receive, send)
            return
        await self._app(scope, self._bounded(receive), send)

    def _admit(self, headers: Headers, scope: Scope) -> None:
        if self._tcp is None:
            raise ApiError(403, "this server answers on its Unix socket alone")
        if not _HOST.fullmatch(headers.get("host", "")):
            raise ApiError(403, "the host is not this machine", hint="ask http://127.0.0.1")
        origin = headers.get("origin")
        if origin is not None and _origin_host(origin) not in LOOPBACK:
            raise ApiError(403, "pages of other sites may not ask")
        if headers.get("sec-fetch-site") == "cross-site" and not leads_to_pages(scope["path"]):
            # such as an image: what a page asks for without `Origin`, and cannot read
            raise ApiError(403, "pages of other sites may not ask")
        if not self._knows(headers, scope):
            error = ApiError(
                401,
                "the token is missing or wrong",
                hint="send `Authorization: Bearer TOKEN`; `code2lora editor` prints it",
            )
            raise error
        if self._is_private(scope["path"]):
            raise ApiError(404, "Not Found")

    def _knows(self, headers: Headers, scope: Scope) -> bool:
        """Tell whether a request shows that it is the owner's."""
        assert self._tcp is not None
        token, door = self._tcp.token, self._tcp.door
        if token is None or _carries(headers, token):
            return True
        return door is not None and door.opens_to(scope, headers)

    def _check_body(self, headers: Headers) -> None:
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise ApiError(415, "the content type is not application/json")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_body_bytes:
            raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        n_bytes, whole = 0, False

        async def bounded() -> Message:
            nonlocal n_bytes, whole
            if whole:  # what comes now is the client's going away, whenever it likes
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._body_timeout_s)
            except TimeoutError as error:
                raise ApiError(408, "the body did not come in time") from error
            n_bytes += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if n_bytes > self._max_body_bytes:
                raise self._too_large()
            return message

        return bounded

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._max_body_bytes} bytes")


def error_response(error: ApiError) -> Response:
    """Return the response that tells of an error."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Json(error_body(error), status_code=error.status, headers=headers)


def _refusal(error: ApiError, headers: Headers, scope: Scope) -> Response:
    """Return the response to a request that is not passed on; a person gets a page."""
    is_person = leads_to_pages(scope["path"]) and "text/html" in headers.get("accept", "")
    return locked() if error.status == 401 and is_person else error_response(error)


def _over_unix(scope: Scope) -> bool:
    """Tell by our own end of the connection, which no header can change."""
    server = scope.get("server")
    return server is not None and server[1] is None


def _origin_host(origin: str) -> str | None:
    try:
        parts = urlsplit(origin)
        return parts.hostname if parts.scheme in ("http", "https") else None
    except ValueError:
        return None


def _carries(headers: Headers, token: str) -> bool:
    kind, _, value = headers.get("authorization", "").partition(" ")
    given = value.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
    return hmac.compare_digest(given.encode(), token.encode())
