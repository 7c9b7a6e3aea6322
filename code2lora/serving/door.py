"""Let a browser in without the token: a code that works once for a cookie, a cookie for the pages.

The owner asks for a code on the Unix socket and opens the login page with it. What the browser
keeps is a cookie that no script can read and that no other site's page can make it send, good for
the pages alone. It is signed with the token, so it outlives the worker, and a new token ends it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from code2lora.serving.errors import ApiError

PAGES = "/dashboard"
"""What browsers may ask for; the cookie is sent nowhere else."""
LOGIN = f"{PAGES}/login"
CODE_LIFE_S = 60.0
COOKIE_LIFE_S = 24 * 3600.0

_MAX_CODES = 16
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
_LOCKED = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>code2lora</title>
<p>This page opens with <code>code2lora dashboard</code>, whose address works once, within a minute.
<p>If you have just come by it, reload this page.
"""


class Door:
    """Gives out codes and cookies, and knows them again. Thread-safe."""

    def __init__(self, token: str | None, *, clock: Callable[[], float] = time.time) -> None:
        """Sign with the token for TCP; without one, everybody may come in as they are."""
        secret = (token or secrets.token_urlsafe()).encode()
        self._key = hmac.digest(secret, b"code2lora dashboard cookie", "sha256")
        self._clock = clock
        self._codes: dict[bytes, float] = {}
        self._lock = threading.Lock()

    def new_code(self) -> str:
        """Return a code that opens the door once, for `CODE_LIFE_S` from now."""
        code, now_s = secrets.token_urlsafe(32), self._clock()
        with self._lock:
            fresh = [(key, ends_s) for key, ends_s in self._codes.items() if ends_s > now_s]
            self._codes = dict(fresh[1 - _MAX_CODES :])
            self._codes[_digest(code)] = now_s + CODE_LIFE_S
        return code

    def login(self, scope: Scope, code: str, *, onward: str) -> Response:
        """Return a redirect with the cookie for a good code, the locked page for any other.

        onward: where to go from here, a path of ours
        """
        with self._lock:
            ends_s = self._codes.pop(_digest(code), 0.0)
        if ends_s <= self._clock():
            return locked()
        response = RedirectResponse(onward, status_code=303)
        response.set_cookie(
            _cookie_name(scope),
            self._sign(str(int(self._clock() + COOKIE_LIFE_S)), secrets.token_urlsafe(16)),
            max_age=int(COOKIE_LIFE_S),
            path=PAGES,
            httponly=True,
            samesite="strict",
        )
        return response

    def opens_to(self, scope: Scope, headers: Headers) -> bool:
        """Tell whether a request without the token may pass.

        Raises ApiError 403 when it has the cookie, but comes from another page than ours.
        """
        if not leads_to_pages(scope["path"]):
            return False
        if scope["path"] == LOGIN:
            return bool(scope["method"] == "GET")
        if not self._knows(cookie_parser(headers.get("cookie", "")).get(_cookie_name(scope), "")):
            return False
        own = f"http://{headers.get('host', '')}"
        origin = headers.get("origin", own if scope["method"] in ("GET", "HEAD") else None)
        if origin != own or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise ApiError(403, "pages of other sites may not ask")
        return True

    def _knows(self, cookie: str) -> bool:
        ends, _, rest = cookie.partition(".")
        nonce, _, _ = rest.partition(".")
        signed = self._sign(ends, nonce)
        if not hmac.compare_digest(cookie.encode(), signed.encode()):
            return False
        return int(ends) > self._clock()  # we have written it, so it is a number

    def _sign(self, ends: str, nonce: str) -> str:
        value = f"{ends}.{nonce}"
        return f"{value}.{hmac.new(self._key, value.encode(), 'sha256').hexdigest()}"


class PageHeaders:
    """ASGI middleware that has browsers run, load and keep nothing but what the pages bring."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; every answer below `PAGES` gets the headers."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        is_page = scope["type"] == "http" and leads_to_pages(scope["path"])
        await self._app(scope, receive, with_headers if is_page else send)


def leads_to_pages(path: str) -> bool:
    """Tell whether a path is a page's, or what a page asks for."""
    return path == PAGES or path.startswith(f"{PAGES}/")


def locked() -> Response:
    """Return the page that says how to get in."""
    return HTMLResponse(_LOCKED, status_code=401)


def _cookie_name(scope: Scope) -> str:
    """Return a name of this port's own: browsers share cookies between the ports of a host."""
    return f"code2lora-{scope['server'][1]}"


def _digest(code: str) -> bytes:
    return hashlib.sha256(code.encode()).digest()
