"""What editors send, as captured, and what they read of the answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from code2lora.serving.app import create_app
from code2lora.serving.completion import CompletionRequest
from code2lora.serving.engine import Engine
from code2lora.serving.model import BaseModel
from tests.serving.tiny import (
    COMMITS,
    CONTEXT_TOKENS,
    REPOSITORIES,
    Provider,
    Registry,
    http,
    serving,
)

CAPTURED = sorted((Path(__file__).parent / "captured").glob("*.json"))
MODEL = f"code2lora/tiny-qwen2.5-coder@{REPOSITORIES[0]}"
TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.fixture(scope="module")
def chatty(base_dir: Path) -> Engine:
    """An engine whose model has a chat template."""
    return Engine(replace(BaseModel.load(base_dir), chat_template=TEMPLATE))


@pytest.fixture(scope="module")
def client(chatty: Engine, adapter_paths: tuple[Path, Path]) -> Iterator[httpx.Client]:
    app = create_app(Provider(chatty), Registry(chatty, adapter_paths))
    with serving(app) as path, http(path) as made:
        yield made


def sse(response: httpx.Response) -> list[str]:
    """Return the data of every event, reading as strictly as the strictest client."""
    assert response.headers["content-type"] == "text/event-stream"
    lines = response.text.split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def read(response: httpx.Response, how: str) -> str:
    """Return the text that a client finds where it looks for it."""
    assert response.status_code == 200, response.text
    if how in ("sse-text", "sse-strict"):
        *events, last = sse(response)
        assert last == "[DONE]"
        choices = [json.loads(event)["choices"][0] for event in events]
        assert choices[-1]["finish_reason"] in ("stop", "length")
        return "".join(choice["text"] for choice in choices)
    if how == "sse-content":
        events = [json.loads(event) for event in sse(response)]
        assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]
        return "".join(event["content"] for event in events)
    if how in ("sse-delta", "chat-sse"):
        *events, last = sse(response)
        assert last == "[DONE]"
        parsed = [json.loads(event) for event in events]
        if how == "chat-sse":
            assert parsed.pop()["choices"] == []
        deltas = [event["choices"][0]["delta"] for event in parsed]
        assert deltas[0]["role"] == "assistant"
        return "".join(delta.get("content", "") for delta in deltas)
    body = response.json()
    return str(body["choices"][0]["text"] if how == "text" else body["content"])


@pytest.mark.parametrize("file", CAPTURED, ids=lambda file: file.stem)
def test_what_an_editor_sends_is_answered(
    client: httpx.Client, chatty: Engine, registry: Registry, file: Path
) -> None:
    captured = json.loads(file.read_text())
    if captured["method"] == "GET":
        check_get(client.get(captured["path"]), captured["reads"])
        return
    body = json.loads(json.dumps(captured["body"]).replace("MODEL", MODEL))
    response = client.post(captured["path"], json=body)
    if captured["reads"] == "infill-list":
        proposals = response.json()
        assert len(proposals) == 3
        assert len({proposal["content"] for proposal in proposals}) > 1
        assert all(proposal["timings"]["predicted_n"] > 0 for proposal in proposals)
        return
    if captured["reads"] == "empty-object":
        assert response.json() == {}
        return
    text = read(response, captured["reads"])
    assert text
    if "model" in body:
        assert response.headers["x-code2lora-generation"].startswith(COMMITS[0][:12])
        assert float(response.headers["x-code2lora-swap-ms"]) > 0
    else:
        assert response.headers["x-code2lora-generation"] == "base"


def check_get(response: httpx.Response, how: str) -> None:
    body: Any = response.json()
    if how == "health":
        assert body == {"status": "ok"}
    elif how == "models":
        assert "qwen" in body["data"][0]["id"] and "coder" in body["data"][0]["id"]
        assert body["data"][0]["max_model_len"] == CONTEXT_TOKENS
    else:
        assert body["default_generation_settings"]["n_ctx"] == CONTEXT_TOKENS
        assert body["total_slots"] == 16
        assert "/" not in body["model_path"].removeprefix("code2lora/")


def test_infill_is_the_fill_in_the_middle_of_its_parts(
    client: httpx.Client, chatty: Engine
) -> None:
    expected = chatty.complete(
        CompletionRequest(prompt="import os\nfor name in os.", suffix="\nprint", max_tokens=9)
    )
    body = {"input_prefix": "import os\n", "prompt": "for name in os.", "input_suffix": "\nprint"}
    answer = client.post("/infill", json={**body, "n_predict": 9}).json()
    assert answer["content"] == expected.text
    assert answer["tokens_predicted"] == answer["timings"]["predicted_n"] == expected.n_tokens
    assert (answer["stop"], answer["stop_type"]) == (True, "limit")
    asked = {**body, "n_predict": 9, "response_fields": ["content", "timings/predicted_n", "no/no"]}
    assert client.post("/infill", json=asked).json() == {
        "content": expected.text,
        "timings/predicted_n": expected.n_tokens,
    }


def test_a_warm_up_makes_the_next_request_cheap(client: httpx.Client) -> None:
    body = {"input_prefix": "class Warm:\n    x = 1\n", "prompt": "", "input_suffix": "\n"}
    warm = client.post("/infill", json={**body, "n_predict": 0}).json()
    assert (warm["content"], warm["tokens_predicted"]) == ("", 0)
    then = client.post("/infill", json={**body, "n_predict": 2}).json()
    assert then["timings"]["cache_n"] == then["tokens_evaluated"] - 1


def test_the_first_of_several_proposals_is_the_likeliest(client: httpx.Client) -> None:
    body = {"input_prefix": "def f(x):\n", "input_suffix": "\n", "n_predict": 9, "seed": 3}
    one = client.post("/infill", json=body).json()
    several = client.post("/infill", json={**body, "n_cmpl": 3}).json()
    assert several[0]["content"] == one["content"]
    assert [proposal["index"] for proposal in several] == [0, 1, 2]


def test_the_repository_may_stand_in_the_address(client: httpx.Client) -> None:
    body = {"input_prefix": "class", "n_predict": 4}
    by_path = client.post(f"/r/{REPOSITORIES[1]}/infill", json=body)
    by_model = client.post("/infill", json={**body, "model": f"m@{REPOSITORIES[1]}"})
    assert by_path.json()["content"] == by_model.json()["content"]
    assert by_path.headers["x-code2lora-generation"].startswith(COMMITS[1][:12])
    assert client.get(f"/r/{REPOSITORIES[1]}/health").json() == {"status": "ok"}
    for bad in ("/r/%2e%2e/infill", "/r/a%2Fb/infill", "/r/a%00/infill"):
        assert client.post(bad, json=body).status_code in (400, 404)


def test_a_model_without_a_template_does_not_chat(server: Path) -> None:
    with http(server) as client:
        body = {"messages": [{"role": "user", "content": "hi"}]}
        response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "has no chat template" in response.json()["error"]["message"]


def test_a_chat_is_the_completion_of_its_template(client: httpx.Client, chatty: Engine) -> None:
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    expected = chatty.complete(CompletionRequest(prompt=prompt, max_tokens=7))
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 7}
    answer = client.post("/chat/completions", json=body).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected.text}
    assert answer["usage"]["prompt_tokens"] == expected.n_prompt_tokens


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system turn') }}", "{{ messages[0].nothing.more }}", "{% if %}"],
)
def test_a_template_that_refuses_is_the_clients_error(
    base_dir: Path, adapter_paths: tuple[Path, Path], template: str
) -> None:
    engine = Engine(replace(BaseModel.load(base_dir), chat_template=template))
    with (
        serving(create_app(Provider(engine), Registry(engine, adapter_paths))) as path,
        http(path) as client,
    ):
        body = {"messages": [{"role": "user", "content": "hi"}]}
        response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "template refuses the messages" in response.json()["error"]["message"]
    engine.close()


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/infill", {"input_prefix": 7}, "input_prefix"),
        ("/infill", {"input_extra": [{"filename": "a"}]}, "input_extra"),
        ("/infill", {"input_extra": [{"text": "x"}] * 257}, "input_extra"),
        ("/infill", {"n_cmpl": 9}, "n_cmpl"),
        ("/infill", {"response_fields": "content"}, "response_fields"),
        ("/infill", {"n_predict": "7"}, "n_predict"),
        ("/completion", {}, "prompt"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "cook"}]}, "messages"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"image_url": "x"}]}]},
            "messages",
        ),
    ],
)
def test_a_wrong_field_is_named(
    client: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    response = client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_metrics_count_what_was_served(chatty: Engine, adapter_paths: tuple[Path, Path]) -> None:
    registry = Registry(chatty, adapter_paths)
    with serving(create_app(Provider(chatty), registry)) as path, http(path) as client:
        for which in (0, 0, 1):
            body = {"prompt": "class", "max_tokens": 3, "repository": REPOSITORIES[which]}
            client.post("/v1/completions", json=body)
        client.post("/infill", json={"n_predict": "x"})
        response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    values = dict(
        line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#")
    )
    assert values['code2lora_requests_total{endpoint="completions",status="200"}'] == "3.0"
    assert values['code2lora_requests_total{endpoint="infill",status="400"}'] == "1.0"
    assert values["code2lora_first_token_seconds_count"] == "3.0"
    swaps = {name: v for name, v in values.items() if name.startswith("code2lora_adapter_swaps_t")}
    assert set(swaps.values()) == {"1.0"} and len(swaps) == 2
    generation = adapter_paths[0].name
    live = f'generation="{generation}",repository="{REPOSITORIES[0]}"'
    assert values[f"code2lora_adapter_generation{{{live}}}"] == "1.0"
    assert values["code2lora_requests_active"] == "0.0"
    assert float(values["code2lora_completion_tokens_total"]) >= 9
