"""The application over a real Unix socket, asked by a real HTTP client."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from code2lora.errors import UserError
from code2lora.serving.app import create_app
from code2lora.serving.completion import CompletionRequest, Piece
from code2lora.serving.engine import Engine
from tests.serving.tiny import (
    COMMITS,
    CONTEXT_TOKENS,
    REPOSITORIES,
    PacedEngine,
    Provider,
    Registry,
    http,
    serving,
    wait_until,
)

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def client(server: Path) -> Iterator[httpx.Client]:
    with http(server) as made:
        yield made


def asked(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def refused(response: httpx.Response) -> tuple[int, str, str | None]:
    """Return status, message and field of an answer in OpenAI's error shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "hint"}
    assert error["code"] == response.status_code
    return response.status_code, error["message"], error["param"]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the events of a stream, after checking its framing byte by byte."""
    assert response.headers["content-type"] == "text/event-stream"
    assert response.content.isascii()
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(part.startswith("data: {") and "\n" not in part for part in parts[:-2])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def counts(body: dict[str, Any]) -> dict[str, int]:
    """Return the token counts, without how many were remembered from another test."""
    return {key: value for key, value in body["usage"].items() if key.endswith("_tokens")}


def test_health_and_models(client: httpx.Client) -> None:
    assert (client.get("/health").status_code, client.get("/health").json()) == (
        200,
        {"status": "ok"},
    )
    for path in ("/v1/models", "/models"):
        models = client.get(path).json()["data"]
        name = "code2lora/tiny-qwen2.5-coder"
        assert [model["id"] for model in models] == [
            name,
            f"{name}@base",
            f"{name}@generic",
            f"{name}@alpha",
            f"{name}@alpha@{COMMITS[0][:12]}",
            f"{name}@{REPOSITORIES[1]}",
        ]
        model = models[0]
        assert (model["object"], model["max_model_len"]) == ("model", CONTEXT_TOKENS)


def test_a_completion_in_the_openai_shape(client: httpx.Client, engine: Engine) -> None:
    expected = engine.complete(CompletionRequest(prompt="import os", max_tokens=12))
    body = asked(client, model="any", prompt="import os", max_tokens=12, unknown={"a": 1})
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["model"] == "code2lora/tiny-qwen2.5-coder"
    assert body["choices"] == [
        {
            "index": 0,
            "text": expected.text,
            "logprobs": None,
            "finish_reason": expected.finish_reason,
        }
    ]
    n_prompt, n_new = expected.n_prompt_tokens, expected.n_tokens
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] >= 0
    assert counts(body) == {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_new,
        "total_tokens": n_prompt + n_new,
    }
    assert body["code2lora"].keys() >= {"repository", "commit", "generation"}
    assert body["code2lora"]["generation"] is None


def test_a_stream_ends_with_the_reason_and_joins_to_the_same_text(client: httpx.Client) -> None:
    request = {"prompt": "class Store:\n", "max_tokens": 30, "repository": REPOSITORIES[0]}
    whole = asked(client, **request)
    for path in (PATH, "/completions"):
        chunks = events(client.post(path, json=request | {"stream": True}))
        assert (
            "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
        )
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
        assert reasons == [None] * (len(chunks) - 1) + [whole["choices"][0]["finish_reason"]]
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert counts(chunks[-1]) == counts(whole)
        assert chunks[-1]["code2lora"]["commit"] == COMMITS[0]
    assert len(chunks) > 5


def test_a_suffix_fills_in_the_middle(client: httpx.Client, engine: Engine) -> None:
    request = CompletionRequest(prompt="def f(", suffix="):\n", max_tokens=9)
    body = asked(client, prompt="def f(", suffix="):\n", max_tokens=9)
    assert body["choices"][0]["text"] == engine.complete(request).text
    written = asked(
        client,
        prompt="<|fim_prefix|>def f(<|fim_suffix|>):\n<|fim_middle|>",
        suffix=False,
        max_tokens=9,
    )
    assert written["choices"] == body["choices"]
    assert counts(written) == counts(body)


def test_sampling_fields_reach_the_engine(client: httpx.Client, engine: Engine) -> None:
    fields = {"max_tokens": 20, "temperature": 1.3, "top_p": 0.9, "seed": 11}
    expected = engine.complete(CompletionRequest(prompt="x", **fields)).text  # type: ignore[arg-type]
    assert asked(client, prompt="x", **fields)["choices"][0]["text"] == expected
    stop = expected[3:5]
    cut = asked(client, prompt="x", stop=[stop], **fields)["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (expected[: expected.index(stop)], "stop")
    assert asked(client, prompt=["x"], stop=stop, **fields)["choices"][0] == cut


@pytest.mark.parametrize(
    ("headers", "body", "which"),
    [
        ({"X-Code2lora-Repo": REPOSITORIES[0]}, {}, 0),
        ({}, {"repository": REPOSITORIES[1]}, 1),
        ({}, {"model": f"code2lora/tiny@{REPOSITORIES[1]}"}, 1),
        ({"X-Code2lora-Repo": REPOSITORIES[0]}, {"repository": REPOSITORIES[1]}, 0),
        ({}, {"repository": REPOSITORIES[0], "model": f"tiny@{REPOSITORIES[1]}"}, 0),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_repository_is_named_by_header_field_or_model(
    client: httpx.Client,
    engine: Engine,
    adapter_paths: tuple[Path, Path],
    headers: dict[str, str],
    body: dict[str, Any],
    which: int,
    stream: bool,
) -> None:
    request = {"prompt": "x", "max_tokens": 8, "stream": stream, **body}
    response = client.post(PATH, json=request, headers=headers)
    assert response.headers["X-Code2lora-Generation"] == adapter_paths[which].name
    answer = events(response)[-1] if stream else response.json()
    told = answer["code2lora"]
    assert (told["repository"], told["commit"]) == (REPOSITORIES[which], COMMITS[which])
    assert told["generation"] == adapter_paths[which].name
    if not stream:
        adapter = engine.adapter(adapter_paths[which])
        expected = engine.complete(CompletionRequest(prompt="x", max_tokens=8), adapter)
        assert answer["choices"][0]["text"] == expected.text


def test_what_is_asked_of_the_resolver(client: httpx.Client, registry: Registry) -> None:
    registry.asked.clear()
    response = client.post(PATH, json={"prompt": "x", "max_tokens": 1, "use": "base"})
    assert response.headers["X-Code2lora-Generation"] == "base"
    asked(
        client, prompt="x", max_tokens=1, repository=REPOSITORIES[0], commit="abc1", use="generic"
    )
    assert registry.asked == [(None, None, "base"), (REPOSITORIES[0], "abc1", "generic")]


BAD = [
    *(
        (body, "prompt is not a string, a list of token ids, or a list of such prompts", "prompt")
        for body in (
            {},
            {"prompt": 7},
            {"prompt": None},
            {"prompt": []},
            {"prompt": [[]]},
            {"prompt": ["a", 1]},
            {"prompt": ["a", None]},
            {"prompt": [1, True]},
            {"prompt": [1.0]},
            {"prompt": [[[1]]]},
        )
    ),
    ({"prompt": ["x"] * 129}, "prompt has 129 prompts, more than 128", "prompt"),
    ({"prompt": [1, -1]}, "prompt has the token id -1, not 0 to 319", "prompt"),
    ({"prompt": ["x", [320]]}, "prompt has the token id 320, not 0 to 319", "prompt"),
    ({"prompt": [10**300]}, f"prompt has the token id {10**300}, not 0 to 319", "prompt"),
    (
        {"prompt": [1], "suffix": "x"},
        "a prompt of token ids has no suffix: put both into the ids",
        "suffix",
    ),
    ({"prompt": "x", "suffix": 7}, "suffix is not a string", "suffix"),
    ({"prompt": "x", "max_tokens": -1}, "max_tokens is -1, less than 0", "max_tokens"),
    ({"prompt": "x", "max_tokens": 1.5}, "max_tokens is not a whole number", "max_tokens"),
    ({"prompt": "x", "max_tokens": True}, "max_tokens is not a whole number", "max_tokens"),
    ({"prompt": "x", "temperature": "hot"}, "temperature is not a number", "temperature"),
    ({"prompt": "x", "temperature": -1}, "temperature is not between 0 and 100", "temperature"),
    ({"prompt": "x", "top_p": 1.1}, "top_p is not between 0 and 1", "top_p"),
    ({"prompt": "x", "seed": "a"}, "seed is not a whole number", "seed"),
    ({"prompt": "x", "stop": 7}, "stop is not a string or a list of strings", "stop"),
    ({"prompt": "x", "stop": ["a", 7]}, "stop is not a string or a list of strings", "stop"),
    (
        {"prompt": "x", "stop": ["a"] * 33},
        "stop has more than 32 strings or one over 256 characters",
        "stop",
    ),
    ({"prompt": "x", "n": 9}, "n is 9, more than 8", "n"),
    ({"prompt": "x", "n": 0}, "n is 0, less than 1", "n"),
    ({"prompt": "x", "n": [1]}, "n is not a whole number", "n"),
    (
        {"prompt": "x", "n": 2, "best_of": 4},
        "best_of is 4, but all completions are given",
        "best_of",
    ),
    ({"prompt": "x", "logprobs": 21}, "logprobs is 21, more than 20", "logprobs"),
    ({"prompt": "x", "logprobs": True}, "logprobs is not a whole number", "logprobs"),
    (
        {"prompt": "x", "suffix": "y", "logprobs": 1, "echo": True},
        "logprobs of a prompt are not given where there is a suffix",
        "suffix",
    ),
    (
        {"prompt": ["x"] * 16, "n": 2, "logprobs": 8, "echo": True},
        "16 prompts, n 2 and logprobs 8 with echo are 288 lists of log-probabilities, "
        "more than 256",
        "prompt",
    ),
    ({"prompt": "x", "stream_options": 1}, "stream_options is not an object", "stream_options"),
    ({"segments": {"suffix": "x"}}, "segments is not an object with a prefix", "segments"),
    ({"prompt": "x", "model": "m@r@HEAD"}, "commit is not a hexadecimal commit hash", "commit"),
    ({"prompt": "x", "stream": "yes"}, "stream is not true or false", "stream"),
    ({"prompt": "x", "use": "best"}, "use is 'best', not own, generic or base", "use"),
    ({"prompt": "x", "commit": "HEAD~1"}, "commit is not a hexadecimal commit hash", "commit"),
    ({"prompt": "x", "model": 7}, "model is not a string", "model"),
    ({"prompt": "x", "repository": "../etc"}, "repository is not a repository's id", "repository"),
    ({"prompt": "x", "repository": "/etc"}, "repository is not a repository's id", "repository"),
    ({"prompt": "x", "repository": "a\n"}, "repository is not a repository's id", "repository"),
    ({"prompt": "x", "model": "m@a/b"}, "repository is not a repository's id", "repository"),
]


@pytest.mark.parametrize(("body", "message", "param"), BAD)
def test_a_wrong_field_is_named(
    client: httpx.Client, registry: Registry, body: dict[str, Any], message: str, param: str
) -> None:
    registry.asked.clear()
    assert refused(client.post(PATH, json=body)) == (400, message, param)
    assert registry.asked == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_malformed_body_is_the_clients_mistake(client: httpx.Client, content: bytes) -> None:
    response = client.post(PATH, content=content, headers={"content-type": "application/json"})
    assert refused(response) == (400, "the body is not valid JSON", None)


def test_a_body_that_is_no_object(client: httpx.Client) -> None:
    assert refused(client.post(PATH, json=["x"])) == (400, "the body is not a JSON object", None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
FIELDS = ["suffix", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "n"]
FIELDS += ["best_of", "use", "commit", "repository", "model", "prompt"]


@settings(max_examples=60, deadline=None)
@given(body=st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_no_body_is_our_mistake(client: httpx.Client, body: dict[str, Any]) -> None:
    content = json.dumps({"prompt": "x", "max_tokens": 2} | body)
    response = client.post(PATH, content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text


@pytest.mark.parametrize("text", ["\ud83d", "😀" * 300, "\x00", "<|endoftext|>" * 50])
def test_strange_prompts_are_completed(client: httpx.Client, text: str) -> None:
    content = json.dumps({"prompt": text, "suffix": text, "stop": text[:9], "max_tokens": 3})
    response = client.post(PATH, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "media_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"]
)
@pytest.mark.parametrize("path", [PATH, "/daemon/shout"])
def test_only_json_may_be_posted(client: httpx.Client, path: str, media_type: str | None) -> None:
    headers = {} if media_type is None else {"content-type": media_type}
    response = client.post(path, content=b'{"prompt": "x"}', headers=headers)
    assert refused(response) == (415, "the content type is not application/json", None)


def test_a_charset_beside_the_media_type_is_fine(client: httpx.Client) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    content = b'{"prompt": "x", "max_tokens": 1}'
    assert client.post(PATH, content=content, headers=headers).status_code == 200


@pytest.mark.parametrize("path", [PATH, "/daemon/shout"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused(client: httpx.Client, path: str, chunked: bool) -> None:
    content = json.dumps({"prompt": "x" * 200_000, "say": "x"}).encode()
    parts = (content[i : i + 5000] for i in range(0, len(content), 5000))
    response = client.post(
        path,
        content=parts if chunked else content,
        headers={"content-type": "application/json"},
    )
    assert refused(response) == (413, "the body has more than 100000 bytes", None)


def test_unknown_paths_and_methods(client: httpx.Client) -> None:
    assert refused(client.get("/nothing")) == (404, "Not Found", None)
    assert refused(client.get(PATH)) == (405, "Method Not Allowed", None)
    assert "POST" in client.get(PATH).headers["allow"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_repository_is_not_found(client: httpx.Client, stream: bool) -> None:
    response = client.post(PATH, json={"prompt": "x", "repository": "c", "stream": stream})
    assert refused(response) == (404, "repository c is not registered", None)
    assert response.json()["error"]["hint"] == "`code2lora init`"


def test_other_routes_share_the_guard_and_the_error_shape(client: httpx.Client) -> None:
    assert client.post("/daemon/shout", json={"say": "hi"}).json() == {"heard": "HI"}
    response = client.post("/daemon/shout", json={"fail": True})
    assert refused(response) == (400, "it cannot be shouted", None)


def test_adapters_do_not_mix_over_http(server: Path, adapter_paths: tuple[Path, Path]) -> None:
    def text(which: int | None) -> tuple[str, str]:
        name = {} if which is None else {"repository": REPOSITORIES[which]}
        with http(server) as client:
            response = client.post(PATH, json={"prompt": "class", "max_tokens": 15, **name})
        return response.json()["choices"][0]["text"], response.headers["X-Code2lora-Generation"]

    order = [0, 1, None] * 5
    alone = {which: text(which) for which in (0, 1, None)}
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(text, order)) == [alone[which] for which in order]
    assert len({text for text, _ in alone.values()}) == 3


@contextmanager
def paced(engine: Engine, registry: Registry, **options: Any) -> Iterator[tuple[Path, PacedEngine]]:
    slow = PacedEngine(engine, pace_s=0.02)
    with serving(create_app(Provider(slow), registry, **options)) as path:
        yield path, slow


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_completion(
    engine: Engine, registry: Registry, stream: bool
) -> None:
    with paced(engine, registry) as (path, slow):
        registry.asked.clear()
        body = json.dumps({"prompt": "7", "max_tokens": 140, "stream": stream, "seed": 1})
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        with socket.socket(socket.AF_UNIX) as gone:
            gone.connect(str(path))
            gone.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
            wait_until(lambda: bool(registry.asked))
        wait_until(lambda: bool(slow.ended))
        assert slow.ended[0].finish_reason == "cancelled"
        assert slow.ended[0].n_tokens < 20


def test_a_client_that_goes_away_half_way_through_its_body(server: Path) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.connect(str(server))
        gone.sendall(f'{head}content-length: 100\r\n\r\n{{"prompt"'.encode())
    with http(server) as client:
        assert client.get("/health").status_code == 200


def test_too_many_requests_are_told_at_once_and_the_others_go_on(
    engine: Engine, registry: Registry
) -> None:
    with paced(engine, registry, max_requests=2) as (path, _), http(path) as client:
        registry.gate.clear()
        body = {"prompt": "x", "max_tokens": 1}
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(client.post, PATH, json=body) for _ in range(4)]
            wait_until(lambda: sum(job.done() for job in jobs) == 2)
            for job in jobs:
                if job.done():
                    assert refused(job.result()) == (429, "too many requests are waiting", None)
                    assert job.result().headers["retry-after"] == "1"
            registry.gate.set()
            assert sorted(job.result().status_code for job in jobs) == [200, 200, 429, 429]
        assert client.post(PATH, json=body).status_code == 200


def test_a_waiting_client_that_goes_away_frees_its_place(
    engine: Engine, registry: Registry
) -> None:
    with paced(engine, registry, max_requests=2) as (path, _), http(path) as client:
        registry.gate.clear()
        registry.asked.clear()
        body = {"prompt": "x", "max_tokens": 1}
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(client.post, PATH, json=body)
            wait_until(lambda: bool(registry.asked))
            for _ in range(3):
                with pytest.raises(httpx.ReadTimeout):
                    client.post(PATH, json=body, timeout=0.3)
                threading.Event().wait(0.3)
            last = pool.submit(client.post, PATH, json=body)
            threading.Event().wait(0.1)
            registry.gate.set()
            assert (first.result().status_code, last.result().status_code) == (200, 200)


def test_a_loading_model_says_so_and_then_serves(engine: Engine, registry: Registry) -> None:
    provider = Provider(None)
    app = create_app(provider, registry, load_wait_s=0.0)
    with serving(app) as path, http(path) as client:
        for response in (
            client.get("/health"),
            client.get("/v1/models"),
            client.post(PATH, json={"prompt": "x"}),
        ):
            assert refused(response) == (503, "Loading model", None)
            assert response.headers["retry-after"] == "1"
        provider.now = engine
        assert client.get("/health").json() == {"status": "ok"}


def test_a_request_waits_for_a_model_that_loads(engine: Engine, registry: Registry) -> None:
    provider = Provider(None)
    with (
        serving(create_app(provider, registry)) as path,
        http(path) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        body = {"prompt": "x", "max_tokens": 1}
        jobs = [pool.submit(client.post, PATH, json=body), pool.submit(client.get, "/v1/models")]
        threading.Event().wait(0.1)
        assert client.get("/health").status_code == 503
        provider.now = engine
        assert [job.result().status_code for job in jobs] == [200, 200]


def test_a_model_that_cannot_be_loaded_says_why(registry: Registry) -> None:
    provider = Provider(UserError("the model is damaged", hint="download it again"))
    with serving(create_app(provider, registry)) as path, http(path) as client:
        response = client.get("/health")
        assert refused(response) == (503, "the model is damaged", None)
        assert response.json()["error"]["hint"] == "download it again"
        assert "retry-after" not in response.headers


class Broken:
    """Fails as a bug does, after `after` pieces."""

    context_tokens = 10

    def __init__(self, engine: Engine, after: int) -> None:
        self.model = engine.model
        self._after = after

    def submit(self, request: Any, adapter: Any, *, on_done: Any, on_piece: Any, **_: Any) -> None:
        for _ in range(self._after):
            on_piece(0, Piece("piece"))
        raise RuntimeError("secret")


@pytest.mark.parametrize(("stream", "after"), [(False, 0), (True, 0), (True, 2)])
def test_a_bug_is_not_shown_but_logged(
    engine: Engine, registry: Registry, stream: bool, after: int, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        serving(create_app(Provider(Broken(engine, after)), registry)) as path,
        http(path) as client,
    ):
        response = client.post(PATH, json={"prompt": "x", "stream": stream})
        assert "internal error" in response.text
        assert "secret" not in response.text
        if stream:
            assert response.text.count('"piece"') == after
            assert "[DONE]" not in response.text
        else:
            assert refused(response) == (500, "internal error", None)
        with http(path) as another:
            assert another.get("/health").status_code == 200
    assert "secret" in caplog.text
