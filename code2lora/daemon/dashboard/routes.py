"""The dashboard's routes: the page with its files, the login, and the data as JSON.

Reads   the files in static/, the state store, git. Never loads a model.

All of it lies below `/dashboard`, where the guard lets a browser in. An answer says by its ETag
whether anything has changed, so that a page may ask often.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from code2lora.daemon.dashboard.chronicle import chronicle
from code2lora.daemon.dashboard.views import place_view, places
from code2lora.serving.door import LOGIN, PAGES, Door
from code2lora.serving.errors import ApiError
from code2lora.settings import Settings
from code2lora.state_store import Store
from code2lora.state_store.records import Worktree

MAX_COMMITS = 200
"""Commits of one answer."""

_N_COMMITS = 40
_STATIC = Path(__file__).parent / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_NUMBER = re.compile(r"[0-9]{1,18}")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def dashboard_routes(settings: Settings, store: Store, door: Door) -> list[Route]:
    """Return the routes; `door` logs browsers in."""

    async def login(request: Request) -> Response:
        place = request.query_params.get("place", "")
        # in the query, not the fragment, which the links to the page's sections replace
        onward = f"{PAGES}?place={place}" if _NUMBER.fullmatch(place) else PAGES
        return door.login(request.scope, request.query_params.get("code", ""), onward=onward)

    def listed(request: Request) -> Any:
        return {"places": [asdict(place) for place in places(store)]}

    def overview(request: Request) -> Any:
        return asdict(place_view(settings, store, _worktree(store, request)))

    def commits(request: Request) -> Any:
        worktree = _worktree(store, request)
        before, limit = _before(request), _limit(request)
        return asdict(chronicle(store, worktree, before=before, limit=limit))

    api = f"{PAGES}/api/places"
    return [
        Route(LOGIN, login),
        *_files(),
        _data(api, listed),
        _data(f"{api}/{{worktree}}", overview),
        _data(f"{api}/{{worktree}}/commits", commits),
    ]


def _files() -> list[Route]:
    """Return a route for each file there is, so that no path is ever made of what was asked."""

    def serve(path: Path) -> Callable[[Request], Response]:
        content, media_type = path.read_bytes(), _TYPES[path.suffix]
        return lambda request: Response(content, media_type=media_type)

    files = sorted(_STATIC.iterdir())
    return [
        Route(PAGES, serve(_STATIC / "index.html")),
        Route(f"{PAGES}/", lambda request: RedirectResponse(PAGES)),
        *(Route(f"{PAGES}/static/{file.name}", serve(file)) for file in files),
    ]


def _data(path: str, gather: Callable[[Request], Any]) -> Route:
    """Return a GET route whose answer is what `gather` returns, unless the page has it already."""

    async def endpoint(request: Request) -> Response:
        content = await run_in_threadpool(lambda: _encode(gather(request)))
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"ETag": tag})
        return Response(content, media_type="application/json", headers={"ETag": tag})

    return Route(path, endpoint)


def _encode(value: Any) -> bytes:
    # ASCII: paths and subjects may hold what is no character, which JSON can say and UTF-8 cannot
    return json.dumps(value, separators=(",", ":"), default=_plain).encode("ascii")


def _plain(value: Any) -> str:
    assert isinstance(value, datetime), f"{type(value).__name__} has no JSON form"
    return value.astimezone(UTC).isoformat(timespec="milliseconds")


def _worktree(store: Store, request: Request) -> Worktree:
    number = request.path_params["worktree"]
    if not _NUMBER.fullmatch(number):
        raise ApiError(404, "Not Found")
    worktree = store.worktree(int(number))
    if worktree is None:
        raise ApiError(404, f"worktree {number} is not registered", hint="`code2lora status --all`")
    return worktree


def _before(request: Request) -> str | None:
    before = request.query_params.get("before")
    if before is not None and not _HASH.fullmatch(before):
        raise ApiError(400, "before is not a commit's full hash", param="before")
    return before


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", str(_N_COMMITS))
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= MAX_COMMITS):
        raise ApiError(400, f"limit is not a number from 1 to {MAX_COMMITS}", param="limit")
    return int(text)
