"""The official client of OpenAI's API against a real server over TCP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import openai
import pytest

from code2lora.serving.app import create_app
from code2lora.serving.completion import CompletionRequest
from code2lora.serving.engine import Engine
from code2lora.serving.guard import TcpAccess
from code2lora.serving.model import BaseModel
from tests.serving.test_shapes import TEMPLATE
from tests.serving.tiny import (
    COMMITS,
    REPOSITORIES,
    Provider,
    Registry,
    serving_tcp,
    wait_until,
)

TOKEN = "a-token-that-is-long-enough-to-be-one"
MODEL = "code2lora/tiny-qwen2.5-coder"


@pytest.fixture(scope="module")
def chatty(base_dir: Path) -> Engine:
    return Engine(replace(BaseModel.load(base_dir), chat_template=TEMPLATE))


@pytest.fixture(scope="module")
def port(chatty: Engine, adapter_paths: tuple[Path, Path]) -> Iterator[int]:
    registry = Registry(chatty, adapter_paths)
    with serving_tcp(create_app(Provider(chatty), registry, tcp=TcpAccess(TOKEN))) as made:
        yield made


@pytest.fixture
def client(port: int) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key=TOKEN, max_retries=0, timeout=20
    ) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    ids = [model.id for model in client.models.list()]
    assert ids[:3] == [MODEL, f"{MODEL}@base", f"{MODEL}@generic"]
    assert f"{MODEL}@alpha" in ids


def test_a_completion(client: openai.OpenAI, chatty: Engine) -> None:
    expected = chatty.complete(CompletionRequest(prompt="class Store:", max_tokens=9))
    done = client.completions.create(model=f"{MODEL}@base", prompt="class Store:", max_tokens=9)
    assert done.choices[0].text == expected.text
    assert done.choices[0].finish_reason == "length"
    assert done.model == MODEL
    assert done.usage is not None
    assert done.usage.total_tokens == expected.n_prompt_tokens + expected.n_tokens


def test_a_repository_and_a_commit_are_chosen_by_model(client: openai.OpenAI) -> None:
    texts = set()
    for model in (f"{MODEL}@{REPOSITORIES[0]}", f"{MODEL}@{REPOSITORIES[1]}", f"{MODEL}@base"):
        raw = client.completions.with_raw_response.create(
            model=model, prompt="class Store:", max_tokens=9
        )
        texts.add(raw.parse().choices[0].text)
        assert raw.parse().model == (MODEL if model.endswith("@base") else model)
    assert len(texts) == 3
    pinned = f"{MODEL}@{REPOSITORIES[0]}@{COMMITS[0][:12]}"
    assert client.completions.create(model=pinned, prompt="x", max_tokens=1).model == pinned


def test_a_stream_with_its_usage(client: openai.OpenAI, chatty: Engine) -> None:
    expected = chatty.complete(CompletionRequest(prompt="def f(", suffix="):\n", max_tokens=9))
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt="def f(",
            suffix="):\n",
            max_tokens=9,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == expected.n_tokens
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected.text
    assert chunks[-2].choices[0].finish_reason == expected.finish_reason


def test_several_completions_with_log_probabilities(client: openai.OpenAI) -> None:
    arguments = {"model": MODEL, "prompt": "import os", "max_tokens": 6, "n": 3, "seed": 4}
    done = client.completions.create(**arguments, temperature=1.5, logprobs=2)  # type: ignore[call-overload]
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert len({choice.text for choice in done.choices}) > 1
    for choice in done.choices:
        told = choice.logprobs
        assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset)
        assert all(len(top) == 2 for top in told.top_logprobs)
        assert all(value <= 0 for value in told.token_logprobs)
    assert done.usage.completion_tokens == sum(len(c.logprobs.tokens) for c in done.choices)
    streamed: dict[int, str] = {0: "", 1: "", 2: ""}
    tokens: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for chunk in client.completions.create(  # type: ignore[call-overload]
        **arguments, temperature=1.5, logprobs=2, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
    assert streamed == {choice.index: choice.text for choice in done.choices}
    assert tokens == {choice.index: choice.logprobs.tokens for choice in done.choices}


def test_echo_and_stop(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="import os", max_tokens=9)
    text = whole.choices[0].text
    cut = client.completions.create(
        model=MODEL, prompt="import os", max_tokens=9, echo=True, stop=[text[4:6]]
    )
    assert cut.choices[0].text == "import os" + text[: text.index(text[4:6])]
    assert cut.choices[0].finish_reason == "stop"
    chunks = client.completions.create(
        model=MODEL, prompt="import os", max_tokens=9, echo=True, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == "import os" + text


def test_a_chat(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "hi"}]
    arguments = {"model": MODEL, "messages": messages, "max_completion_tokens": 7}
    done = client.chat.completions.create(**arguments, logprobs=True, top_logprobs=2)  # type: ignore[call-overload]
    text = done.choices[0].message.content
    assert text
    told = done.choices[0].logprobs.content
    assert "".join(token.token for token in told).startswith(text[:3])
    assert all(len(token.top_logprobs) == 2 for token in told)
    chunks = list(client.chat.completions.create(**arguments, stream=True))  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_what_is_wrong_is_raised_as_such(client: openai.OpenAI, port: int) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens is -1"):
        client.completions.create(model=MODEL, prompt="x", max_tokens=-1)
    with pytest.raises(openai.NotFoundError, match="not registered"):
        client.completions.create(model=f"{MODEL}@nobody", prompt="x")
    stranger = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError, match="token"):
        stranger.completions.create(model=MODEL, prompt="x")


def test_closing_a_stream_ends_the_work(client: openai.OpenAI, chatty: Engine) -> None:
    before = chatty.stats.n_cancelled
    stream = client.completions.create(
        model=MODEL, prompt="class", max_tokens=150, temperature=1.0, seed=1, stream=True, n=8
    )
    next(iter(stream))
    stream.close()
    wait_until(lambda: chatty.n_active == 0)
    assert chatty.stats.n_cancelled in (before, before + 1)  # it may have been quicker
