"""Who may ask over TCP, and what a hostile client can do: nothing."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from code2lora.serving.app import create_app
from code2lora.serving.engine import Engine
from code2lora.serving.guard import TcpAccess
from code2lora.serving.server import BoundedProtocol
from tests.serving.tiny import (
    REPOSITORIES,
    PacedEngine,
    Provider,
    Registry,
    serving_tcp,
    wait_until,
)

TOKEN = "the-token-of-the-owner-and-nobody-else"
BODY = {"prompt": "class", "max_tokens": 2}
PATH = "/v1/completions"


async def refresh(request: Request) -> JSONResponse:
    return JSONResponse({"refreshed": True})


def app_for(engine: object, registry: Registry, **options: Any) -> Starlette:
    options = {"tcp": TcpAccess(TOKEN), "max_body_bytes": 50_000} | options
    extra = [Route("/daemon/refresh", refresh, methods=["POST"])]
    return create_app(Provider(engine), registry, extra_routes=extra, **options)


@pytest.fixture(scope="module")
def port(engine: Engine, registry: Registry) -> Iterator[int]:
    with serving_tcp(app_for(engine, registry)) as made:
        yield made


@pytest.fixture
def client(port: int) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=20) as made:
        yield made


def status(response: httpx.Response) -> int:
    """Return the status of an answer that is a whole JSON object and no page for a browser."""
    assert response.headers["content-type"] == "application/json"
    assert not any(name.startswith("access-control") for name in response.headers)
    assert isinstance(response.json(), dict)
    return response.status_code


@pytest.mark.parametrize(
    "method_path",
    [
        ("GET", "/health"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("POST", PATH),
        ("GET", "/nothing"),
    ],
)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": f"Bearer {TOKEN[:-1]}"},
        {"authorization": f"Basic {TOKEN}"},
        {"x-api-key": "wrong"},
        {"authorization": "Bearer wrong", "x-api-key": TOKEN},
        {"cookie": f"token={TOKEN}"},
    ],
)
def test_without_the_token_nothing_is_told(
    port: int, method_path: tuple[str, str], headers: dict[str, str]
) -> None:
    method, path = method_path
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        response = client.request(
            method, path, headers=headers, json=BODY if method == "POST" else None
        )
    assert status(response) == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert TOKEN not in response.text


@pytest.mark.parametrize("headers", [{"authorization": f"bearer {TOKEN}"}, {"x-api-key": TOKEN}])
def test_with_the_token_all_is_well(port: int, headers: dict[str, str]) -> None:
    with httpx.Client(base_url=f"http://localhost:{port}", headers=headers) as client:
        assert status(client.post(PATH, json=BODY)) == 200
        assert status(client.get("/health")) == 200


def test_a_token_can_be_left_out_where_the_owner_says_so(
    engine: Engine, registry: Registry
) -> None:
    app = app_for(engine, registry, tcp=TcpAccess(None))
    with serving_tcp(app) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        assert status(client.post(PATH, json=BODY)) == 200
        assert status(client.post(PATH, json=BODY, headers={"origin": "http://evil.com"})) == 403
        assert status(client.post(PATH, json=BODY, headers={"host": "evil.com"})) == 403


def test_over_tcp_nobody_may_ask_unless_told_so(engine: Engine, registry: Registry) -> None:
    headers = {"authorization": f"Bearer {TOKEN}", "x-forwarded-for": ""}
    with serving_tcp(app_for(engine, registry, tcp=None)) as port:
        response = httpx.post(f"http://127.0.0.1:{port}{PATH}", json=BODY, headers=headers)
    assert status(response) == 403


@pytest.mark.parametrize(
    "host",
    [
        "evil.com",
        "evil.com:8712",
        "127.0.0.1.nip.io",
        "localhost.evil.com",
        "127.0.0.2",
        "0.0.0.0",
        "",
        "[::2]:80",
        "127.0.0.1@evil.com",
        "2130706433",
        "[::1]evil.com",
        "localhost:evil.com",
        "localhost.",
        "127.0.0.1:",
        "localhost:80:80",
        "localhost/evil.com",
        "localhost,evil.com",
    ],
)
def test_a_page_that_rebinds_its_name_to_this_machine_is_refused(
    client: httpx.Client, host: str
) -> None:
    assert status(client.post(PATH, json=BODY, headers={"host": host})) in (400, 403)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8712", "[::1]"])
def test_this_machine_has_several_names(client: httpx.Client, host: str) -> None:
    assert status(client.post(PATH, json=BODY, headers={"host": host})) == 200


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.com",
        "null",
        "https://localhost.evil.com",
        "file://",
        "chrome://x",
        "",
        "http://[",
        "http://127.0.0.1@evil.com",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_other_sites_pages_may_not_ask(client: httpx.Client, origin: str, method: str) -> None:
    headers = {"origin": origin, "access-control-request-method": "POST"}
    body = BODY if method == "POST" else None
    assert status(client.request(method, PATH, json=body, headers=headers)) == 403


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics", "/r/x/health"])
def test_what_other_sites_pages_load_without_saying_so_is_refused(
    client: httpx.Client, path: str
) -> None:
    """As an image or a script, which browsers send no Origin with."""
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert status(client.get(path, headers=headers)) == 403
    assert client.get(path, headers={"sec-fetch-site": "none"}).status_code == 200


def test_a_page_of_this_machine_may_ask_if_it_has_the_token(client: httpx.Client) -> None:
    headers = {"origin": "http://127.0.0.1:3000"}
    assert status(client.post(PATH, json=BODY, headers=headers)) == 200
    headers["authorization"] = ""
    assert status(client.post(PATH, json=BODY, headers=headers)) == 401


@pytest.mark.parametrize(
    "media_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None],
)
@pytest.mark.parametrize("path", [PATH, "/infill", "/completion", "/v1/chat/completions"])
def test_what_a_form_can_send_is_refused(
    client: httpx.Client, path: str, media_type: str | None
) -> None:
    headers = {} if media_type is None else {"content-type": media_type}
    response = client.post(path, content=json.dumps(BODY).encode(), headers=headers)
    assert status(response) == 415


@pytest.mark.parametrize(
    "path",
    [
        "/daemon/refresh",
        "/r/x/daemon/refresh",
        "/r/a/r/b/daemon/refresh",
        "/daemon/refresh/",
        "//daemon/refresh",
        "/daemon/%72efresh",
        "/r/x//daemon/refresh",
    ],
)
def test_the_daemons_own_routes_do_not_exist_over_tcp(client: httpx.Client, path: str) -> None:
    response = client.post(path, json={})
    assert "refreshed" not in response.text
    assert response.status_code in (307, 404)


SECRETS = [
    "../../../../etc/passwd",
    "/etc/passwd",
    "..",
    "a/../b",
    "a\\b",
    "%2e%2e%2f",
    "a\x00b",
    "~root",
    "file:///etc/passwd",
    "-rf",
    ".",
    "a" * 200,
]


@pytest.mark.parametrize("name", SECRETS)
def test_no_name_in_a_request_is_a_path(
    client: httpx.Client, registry: Registry, name: str
) -> None:
    registry.asked.clear()
    for body in (
        {"model": f"m@{name}"},
        {"model": f"m@{REPOSITORIES[0]}@{name}"},
        {"repository": name},
        {"repository": REPOSITORIES[0], "commit": name},
    ):
        assert status(client.post(PATH, json=BODY | body)) == 400
    assert registry.asked == []
    extra = {"input_extra": [{"filename": name, "text": "x"}], "n_predict": 1}
    assert "root:" not in client.post("/infill", json=extra).text


def test_a_model_id_that_is_a_path_is_only_a_name(client: httpx.Client) -> None:
    body = BODY | {"model": "/etc/passwd"}
    assert client.post(PATH, json=body).json()["model"] == "code2lora/tiny-qwen2.5-coder"


def raw(port: int, content: bytes, *, wait_s: float = 10.0) -> bytes:
    """Send bytes as they are and return what comes until the server hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait_s) as connection:
        try:
            connection.sendall(content)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        except (ConnectionResetError, BrokenPipeError):
            return answer
        return answer


def head(path: str, *fields: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: localhost", f"authorization: Bearer {TOKEN}", *fields]
    return "\r\n".join([*lines, "content-type: application/json", "", ""]).encode()


@pytest.mark.parametrize("path", ["/../../etc/passwd", "/r/../daemon/refresh", "/%00", "/r//x"])
def test_odd_paths_lead_nowhere(port: int, path: str) -> None:
    answer = raw(port, head(path, "content-length: 2", "connection: close") + b"{}")
    assert answer.split(b" ")[1] in (b"404", b"400")


HALF = "\ud83d"
LONE = [
    ("/v1/completions", {"prompt": HALF, "echo": True}),
    ("/v1/completions", {"prompt": [HALF, f"x{HALF}"], "echo": True, "logprobs": 2}),
    ("/v1/completions", {"prompt": f"a{HALF}", "suffix": f"{HALF}b", "stop": HALF}),
    ("/v1/completions", {"segments": {"prefix": HALF, "filepath": HALF}}),
    ("/fim/completions", {"prompt": HALF, "suffix": HALF, "stop": [HALF]}),
    ("/completion", {"prompt": f"a{HALF}", "stop": [HALF]}),
    ("/infill", {"input_prefix": HALF, "prompt": HALF, "input_suffix": HALF}),
    ("/infill", {"input_extra": [{"filename": HALF, "text": HALF}], "response_fields": [HALF]}),
]


@pytest.mark.parametrize(("path", "body"), LONE)
@pytest.mark.parametrize("stream", [False, True])
def test_half_a_character_is_answered(
    client: httpx.Client, path: str, body: dict[str, Any], stream: bool
) -> None:
    """Editors that count in UTF-16 cut characters in two, and JSON can say so."""
    content = json.dumps(body | {"max_tokens": 2, "n_predict": 2, "stream": stream})
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 200, response.text
    assert "ud83d" not in response.text.partition('"stop":')[0]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ('"temperature": 1e999', 400),
        ('"temperature": -1e999', 400),
        ('"temperature": 1e-320', 200),
        ('"temperature": 1.1e-5, "top_p": 5e-324', 200),
        ('"temperature": 1, "top_k": 99999999999999999999', 200),
        ('"temperature": 1, "seed": -' + "9" * 4000, 200),
        ('"n": 1e999', 400),
        ('"max_tokens": ' + "9" * 4000, 200),
        ('"logprobs": -' + "9" * 4000, 400),
        ('"prompt": [' + "9" * 4000 + "]", 400),
        ('"stop": ' + json.dumps(["x" * 256] * 32), 200),
        ('"stop": ' + json.dumps(["x"] * 1000), 400),
        ('"x": ' + "[" * 900 + "]" * 900, 200),
        ('"prompt": ' + "[" * 900 + "]" * 900, 400),
        ('"messages": ' + "[" * 40_000, 400),
        ('"x": ' + '{"x":' * 8000, 400),
    ],
)
def test_numbers_and_depths_at_their_limits(
    client: httpx.Client, fields: str, expected: int
) -> None:
    content = '{"prompt": "x", "max_tokens": 2, ' + fields + "}"
    response = client.post(PATH, content=content, headers={"content-type": "application/json"})
    assert status(response) == expected


HEADS = [
    (b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: evil.com", (b"400",)),
    (b"GET /health HTTP/1.0", (b"403",)),
    (b"GET http://evil.com/health HTTP/1.1\r\nhost: localhost", (b"404",)),
    (b"CONNECT evil.com:443 HTTP/1.1\r\nhost: localhost", (b"415", b"404")),
    (b"get /health HTTP/1.1\r\nhost: localhost", (b"415",)),
    (b"GET /\xff HTTP/1.1\r\nhost: localhost", (b"400",)),
    (b"GET /%ff%fe HTTP/1.1\r\nhost: localhost", (b"404",)),
    (b"GET /r/%ed%a0%80/health HTTP/1.1\r\nhost: localhost", (b"200",)),
    (b"POST /infill HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1", (b"400",)),
    (
        b"POST /infill HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2",
        (b"400",),
    ),
    (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: a\r\n b", (b"200", b"400")),
    (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: a\x00b", (b"400",)),
]


@pytest.mark.parametrize(("start", "expected"), HEADS)
def test_odd_heads_are_the_clients_mistake(
    port: int, start: bytes, expected: tuple[bytes, ...]
) -> None:
    rest = f"\r\nauthorization: Bearer {TOKEN}\r\nconnection: close\r\n\r\n".encode()
    assert raw(port, start + rest).split(b" ")[1] in expected


def test_huge_bodies_are_refused_before_they_are_read(port: int) -> None:
    answer = raw(port, head(PATH, "content-length: 99999999999", "connection: close"))
    assert answer.startswith(b"HTTP/1.1 413")
    answer = raw(port, head(PATH, f"content-length: {'9' * 5000}", "connection: close"))
    assert answer.split(b" ")[1] in (b"413", b"400")


def test_huge_heads_are_refused(port: int) -> None:
    answer = raw(port, b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 300_000)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")


def test_a_client_that_does_not_finish_asking_is_dropped(
    engine: Engine, registry: Registry
) -> None:
    class Hasty(BoundedProtocol):
        head_timeout_s = 0.2

    app = app_for(engine, registry, body_timeout_s=0.2)
    with serving_tcp(app, Hasty) as port:
        began_s = time.monotonic()
        assert raw(port, b"") == b""
        assert raw(port, b"GET /health HTTP/1.1\r\nhost:") == b""
        answer = raw(port, head(PATH, "content-length: 100", "connection: close") + b'{"prompt"')
        assert answer.startswith(b"HTTP/1.1 408")
        trickle = head(PATH, "transfer-encoding: chunked", "connection: close")
        assert raw(port, trickle + b"1\r\n{\r\n").startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began_s < 8
        whole = json.dumps(BODY).encode()
        fields = (f"content-length: {len(whole)}", "connection: close")
        assert raw(port, head(PATH, *fields) + whole).startswith(b"HTTP/1.1 200")


def test_a_long_completion_is_not_cut_by_the_wait_for_a_head(
    engine: Engine, registry: Registry
) -> None:
    class Hasty(BoundedProtocol):
        head_timeout_s = 0.1

    slow = PacedEngine(engine, pace_s=0.05)
    with serving_tcp(app_for(slow, registry), Hasty) as port:
        headers = {"authorization": f"Bearer {TOKEN}"}
        body = BODY | {"max_tokens": 10}
        response = httpx.post(f"http://127.0.0.1:{port}{PATH}", json=body, headers=headers)
    assert response.status_code == 200


def test_a_client_that_takes_nothing_holds_up_nobody(engine: Engine, registry: Registry) -> None:
    app = app_for(engine, registry, send_timeout_s=0.3, max_requests=2)
    body = {"prompt": "7" * 40, "max_tokens": 70, "stream": True, "logprobs": 20, "n": 8}
    content = json.dumps(body | {"temperature": 2.0}).encode()
    with serving_tcp(app) as port:
        stuck = []
        for _ in range(2):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.connect(("127.0.0.1", port))
            connection.sendall(head(PATH, f"content-length: {len(content)}") + content)
            stuck.append(connection)
        headers = {"authorization": f"Bearer {TOKEN}"}

        def served() -> bool:
            url = f"http://127.0.0.1:{port}{PATH}"
            return httpx.post(url, json=BODY, headers=headers).status_code == 200

        wait_until(served)
        for connection in stuck:
            connection.close()
        wait_until(lambda: engine.n_active == 0)


def test_the_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("code2lora.serving.guard.hmac.compare_digest", compare)
    httpx.get(f"http://127.0.0.1:{port}/health", headers={"x-api-key": "nö".encode()})
    assert compared and compared[0][1] == TOKEN.encode()


def test_the_unix_socket_needs_no_token(server: Path) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(server))
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: any\r\nconnection: close\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
