"""Whatever is sent to whichever endpoint, the answer is the client's mistake or a completion."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from code2lora.serving.app import create_app
from code2lora.serving.engine import Engine
from code2lora.serving.model import BaseModel
from tests.serving.test_dashboard import (  # noqa: F401
    Served,
    browser,
    home,
    served,
    store,
)
from tests.serving.test_shapes import CAPTURED, TEMPLATE
from tests.serving.tiny import REPOSITORIES, Provider, Registry, http, serving

POSTS = ["/v1/completions", "/v1/chat/completions", "/fim/completions", "/infill", "/completion"]
GETS = ["/health", "/v1/models", "/props", "/metrics"]
FIELDS = [
    "prompt",
    "suffix",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "n",
    "best_of",
    "echo",
    "logprobs",
    "top_logprobs",
    "use",
    "commit",
    "repository",
    "model",
    "segments",
    "messages",
    "max_completion_tokens",
    "input_prefix",
    "input_suffix",
    "input_extra",
    "n_predict",
    "n_cmpl",
    "n_indent",
    "n_probs",
    "t_max_predict_ms",
    "response_fields",
    "id_slot",
    "cache_prompt",
    "lora",
    "samplers",
]

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.text(st.characters(categories=["Cs", "Cc", "So", "Ll"]), max_size=12)
    | st.sampled_from(["own", "base", f"m@{REPOSITORIES[0]}", "m@generic", "<|fim_middle|>", "\n"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "text", "filename", "prefix", "include_usage"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
BODIES = [json.loads(file.read_text())["body"] for file in CAPTURED]


@pytest.fixture(scope="module")
def client(base_dir: Path, adapter_paths: tuple[Path, Path]) -> Iterator[httpx.Client]:
    engine = Engine(replace(BaseModel.load(base_dir), chat_template=TEMPLATE))
    app = create_app(Provider(engine), Registry(engine, adapter_paths), max_body_bytes=20_000)
    with serving(app) as path, http(path) as made:
        yield made
    engine.close()


def check(response: httpx.Response) -> None:
    assert response.status_code in (200, 400, 404, 405, 408, 413, 415), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["code"] == response.status_code
        assert error["message"]
    assert "internal error" not in response.text


QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@QUICK
@given(
    path=st.sampled_from(POSTS),
    start=st.sampled_from([body for body in BODIES if body]),
    changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
)
def test_no_field_breaks_an_endpoint(
    client: httpx.Client, path: str, start: dict[str, Any], changes: dict[str, Any]
) -> None:
    content = json.dumps(start | changes)
    check(client.post(path, content=content, headers={"content-type": "application/json"}))


@QUICK
@given(path=st.sampled_from(POSTS), content=st.binary(max_size=60) | st.text().map(str.encode))
def test_no_body_breaks_an_endpoint(client: httpx.Client, path: str, content: bytes) -> None:
    check(client.post(path, content=content, headers={"content-type": "application/json"}))


SEGMENT = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="?#"), max_size=9
)


@QUICK
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]),
    start=st.sampled_from(["/", "/r/", "/v1/", *POSTS, *GETS]),
    rest=SEGMENT,
    header=st.sampled_from(["x-code2lora-repo", "content-type", "accept", "range", "origin"]),
    value=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20),
)
def test_no_address_breaks_the_server(
    client: httpx.Client, method: str, start: str, rest: str, header: str, value: str
) -> None:
    url = httpx.URL("http://localhost").copy_with(raw_path=(start + rest).encode())
    response = client.request(method, url, headers={header: value.strip()})
    assert response.status_code < 500, response.text


PLACES = "/dashboard/api/places"
NUMBERS = st.integers(-2, 3).map(str) | st.integers().map(str) | SEGMENT | st.just("9" * 5000)


@settings(parent=QUICK, max_examples=60, suppress_health_check=[*HealthCheck])
@given(
    number=NUMBERS,
    rest=st.sampled_from(["", "/", "/commits", "/commits/x", "/../1"]),
    query=st.dictionaries(st.sampled_from(["before", "limit", "x"]), NUMBERS, max_size=2),
    tag=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=9),
)
def test_no_question_breaks_the_dashboards_data(
    browser: httpx.Client,  # noqa: F811
    number: str,
    rest: str,
    query: dict[str, str],
    tag: str,
) -> None:
    response = browser.get(
        f"{PLACES}/{number}{rest}", params=query, headers={"if-none-match": f'"{tag}"'}
    )
    assert response.status_code in (200, 307, 400, 404), response.text
    if response.status_code != 307:
        check(response)


@settings(parent=QUICK, max_examples=40, suppress_health_check=[*HealthCheck])
@given(
    start=st.sampled_from([body for body in BODIES if body]),
    changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
)
def test_no_field_breaks_the_playground(
    served: Served,  # noqa: F811
    browser: httpx.Client,  # noqa: F811
    start: dict[str, Any],
    changes: dict[str, Any],
) -> None:
    headers = {"content-type": "application/json", "origin": served.origin}
    content = json.dumps(start | changes)
    check(browser.post("/dashboard/api/completions", content=content, headers=headers))


@settings(parent=QUICK, max_examples=20, suppress_health_check=[*HealthCheck])
@given(code=NUMBERS, place=NUMBERS)
def test_no_login_breaks_the_door(
    served: Served,  # noqa: F811
    code: str,
    place: str,
) -> None:
    """Whoever is on this machine may ask for it, without a token."""
    with served.client() as stranger:
        response = stranger.get("/dashboard/login", params={"code": code, "place": place})
        assert response.status_code == 401
        code = served.door.new_code()
        entered = stranger.get("/dashboard/login", params={"code": code, "place": place})
        assert entered.status_code == 303
        onward = entered.headers["location"]
        assert onward == "/dashboard" or onward.removeprefix("/dashboard?place=").isdigit()
