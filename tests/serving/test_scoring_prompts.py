"""Lists of prompts and the log-probabilities of what was sent, as evaluation harnesses ask for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from code2lora.serving.app import create_app
from code2lora.serving.completion import CompletionRequest
from code2lora.serving.engine import Engine
from code2lora.serving.guard import TcpAccess
from code2lora.serving.model import BaseModel
from tests.serving.tiny import (
    CONTEXT_TOKENS,
    REPOSITORIES,
    PacedEngine,
    Provider,
    Registry,
    serving_tcp,
    wait_until,
)

MODEL = "code2lora/tiny-qwen2.5-coder"
PROMPTS = ["import os\n\nfor name", "def f(x):\n    return é€😀", "class"]


@pytest.fixture(scope="module")
def port(engine: Engine, registry: Registry) -> Iterator[int]:
    with serving_tcp(create_app(Provider(engine), registry, tcp=TcpAccess(None))) as made:
        yield made


@pytest.fixture
def client(port: int) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=30
    ) as made:
        yield made


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.completions.create(**{"model": MODEL, **fields})


def reference(model: BaseModel, ids: list[int]) -> torch.Tensor:
    """Return transformers' log-probabilities (n, V) of what follows each token."""
    with torch.inference_mode():
        logits = model.module(input_ids=torch.tensor([ids])).logits[0]
    return logits.float().log_softmax(-1)


def check(told: Any, model: BaseModel, ids: list[int], *, n_top: int) -> None:
    """Compare what is told of tokens, which begin with the whole prompt, with transformers."""
    expected = reference(model, ids)
    assert told.tokens == [model.decode([i]) for i in ids]
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    for at in range(1, len(ids)):
        row = expected[at - 1]
        assert told.token_logprobs[at] == pytest.approx(float(row[ids[at]]), abs=1e-4)
        values, best = row.topk(n_top)
        top = told.top_logprobs[at]
        assert max(top.values()) == pytest.approx(float(values[0]), abs=1e-4)
        assert model.decode([int(best[0])]) in top
        assert len(top) <= n_top  # tokens that are no text by themselves look alike


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_log_probabilities_of_a_prompt_are_those_of_transformers(
    client: openai.OpenAI, engine: Engine, model: BaseModel, prompt: str, max_tokens: int
) -> None:
    done = ask(client, prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=3)
    choice, told = done.choices[0], done.choices[0].logprobs
    after = engine.complete(CompletionRequest(prompt=prompt, max_tokens=max_tokens))
    assert choice.text == prompt + after.text
    ids = model.encode(prompt)
    assert done.usage.prompt_tokens == len(ids)
    n_new = len(told.tokens) - len(ids)
    assert n_new == max_tokens  # also where the model ends the text there
    check(told, model, [*ids, *tokens_after(model, ids, n_new)], n_top=3)
    # offsets lead into the text
    assert told.text_offset == sorted(told.text_offset)
    for text, begin in zip(told.tokens, told.text_offset, strict=True):
        if text.isascii() and begin + len(text) <= len(choice.text):
            assert choice.text[begin : begin + len(text)] == text


def tokens_after(model: BaseModel, ids: list[int], n: int) -> list[int]:
    """Return the likeliest tokens that follow, as transformers picks them."""
    all_ids = list(ids)
    for _ in range(n):
        all_ids.append(int(reference(model, all_ids)[-1].argmax()))
    return all_ids[len(ids) :]


def test_an_adapter_scores_otherwise(client: openai.OpenAI) -> None:
    def total(model: str) -> float:
        done = ask(client, model=model, prompt=PROMPTS[0], max_tokens=0, echo=True, logprobs=0)
        values: list[float] = done.choices[0].logprobs.token_logprobs[1:]
        return sum(values)

    totals = [total(f"{MODEL}@{name}") for name in ("base", *REPOSITORIES)]
    assert len(set(totals)) == 3


def test_what_was_remembered_of_a_prompt_changes_no_score(client: openai.OpenAI) -> None:
    fields = {"prompt": PROMPTS[0], "max_tokens": 0, "echo": True, "logprobs": 1}
    before = ask(client, **fields).choices[0].logprobs
    ask(client, prompt=PROMPTS[0], max_tokens=4)  # is remembered
    assert ask(client, **fields).choices[0].logprobs == before


@pytest.mark.parametrize("as_ids", [False, True])
def test_several_prompts_give_choices_prompt_by_prompt(
    client: openai.OpenAI, engine: Engine, model: BaseModel, as_ids: bool
) -> None:
    prompts: Any = [model.encode(text) for text in PROMPTS] if as_ids else PROMPTS
    one = CompletionRequest(prompt="", max_tokens=7)
    alone = [engine.complete(CompletionRequest(prompt=text, max_tokens=7)).text for text in PROMPTS]
    done = ask(client, prompt=prompts, max_tokens=one.max_tokens)
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert [choice.text for choice in done.choices] == alone
    assert done.usage.prompt_tokens == sum(len(model.encode(text)) for text in PROMPTS)
    assert done.usage.completion_tokens <= 7 * 3

    each = [
        ask(client, prompt=text, n=2, max_tokens=7, temperature=1.5, seed=5) for text in prompts
    ]
    several = ask(client, prompt=prompts, n=2, max_tokens=7, temperature=1.5, seed=5)
    assert [choice.index for choice in several.choices] == list(range(6))
    assert [c.text for c in several.choices] == [c.text for one in each for c in one.choices]
    for field in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(several.usage, field) == sum(getattr(one.usage, field) for one in each)


def test_one_prompt_of_token_ids(client: openai.OpenAI, model: BaseModel) -> None:
    ids = model.encode(PROMPTS[1])
    done = ask(client, prompt=ids, max_tokens=1, echo=True, logprobs=1)
    assert done.choices[0].text.startswith(PROMPTS[1])
    check(done.choices[0].logprobs, model, [*ids, *tokens_after(model, ids, 1)], n_top=1)
    assert ask(client, prompt=ids, max_tokens=5).choices[0].text == (
        ask(client, prompt=PROMPTS[1], max_tokens=5).choices[0].text
    )


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_stream_of_several_echoed_prompts_joins_to_the_same(
    client: openai.OpenAI, logprobs: int | None
) -> None:
    fields = {"prompt": PROMPTS, "n": 2, "max_tokens": 5, "echo": True, "logprobs": logprobs}
    fields |= {"temperature": 1.5, "seed": 3}
    whole = ask(client, **fields)
    told: list[dict[str, list[Any]]] = [{} for _ in whole.choices]
    texts = [""] * len(whole.choices)
    for chunk in ask(client, **fields, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            for name, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
                told[choice.index].setdefault(name, []).extend(values)
    assert texts == [choice.text for choice in whole.choices]
    assert told == [c.logprobs.model_dump() if c.logprobs else {} for c in whole.choices]


def test_nothing_of_a_scored_prompt_is_left_out(client: openai.OpenAI, model: BaseModel) -> None:
    ids = (model.encode("import os\n") * CONTEXT_TOKENS)[:CONTEXT_TOKENS]
    done = ask(client, prompt=ids, max_tokens=0, echo=True, logprobs=1)
    check(done.choices[0].logprobs, model, ids, n_top=1)
    done = ask(client, prompt=ids[:-1], max_tokens=9, echo=True, logprobs=1)
    assert len(done.choices[0].logprobs.tokens) == CONTEXT_TOKENS
    for prompt in (ids, model.decode(ids), "x" * 100_000, [ids, [1]]):
        with pytest.raises(openai.BadRequestError, match="the prompt has"):
            ask(client, prompt=prompt, max_tokens=1, echo=True, logprobs=1)
    with pytest.raises(openai.BadRequestError, match="161 tokens, but there is room for 160"):
        ask(client, prompt=[*ids, 1], max_tokens=0)


def test_a_long_list_leaves_places_for_others(
    engine: Engine, adapter_paths: tuple[Path, Path]
) -> None:
    slow = PacedEngine(engine, pace_s=0.002)
    with serving_tcp(
        create_app(Provider(slow), Registry(engine, adapter_paths), tcp=TcpAccess(None))
    ) as port:
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            widest = []
            many = threading.Thread(
                target=lambda: widest.append(
                    len(ask(client, prompt=["def f("] * 60, max_tokens=30).choices)
                )
            )
            many.start()
            wait_until(lambda: engine.n_active > 0)
            n_most = 0
            for _ in range(3):
                ask(client, prompt="import", max_tokens=2)
                n_most = max(n_most, engine.n_active + engine.n_waiting)
            assert many.is_alive() and 0 < n_most <= engine.max_rows // 2
            many.join(60)
            assert widest == [60]


def test_a_client_that_goes_away_ends_all_its_prompts(
    client: openai.OpenAI, engine: Engine
) -> None:
    stream = ask(client, prompt=["class A:"] * 100, max_tokens=100, stream=True)
    next(iter(stream))
    n_requests = engine.stats.n_requests
    stream.close()
    wait_until(lambda: engine.n_active == engine.n_waiting == 0)
    assert engine.stats.n_requests < n_requests + 60


def test_the_token_that_ends_a_text_is_scored_too(client: openai.OpenAI, model: BaseModel) -> None:
    """Harnesses ask for one new token and take the last one told to be it."""
    ends = (
        text for text in "KWn" if tokens_after(model, model.encode(text), 1)[0] in model.end_ids
    )
    text = next(ends)
    ids = [*model.encode(text), *tokens_after(model, model.encode(text), 1)]
    done = ask(client, prompt=text, max_tokens=1, echo=True, logprobs=1)
    assert (done.choices[0].text, done.choices[0].finish_reason) == (text, "stop")
    check(done.choices[0].logprobs, model, ids, n_top=1)
    assert done.usage.completion_tokens == 0


def test_a_model_that_is_unloaded_says_so(base_dir: Path, adapter_paths: tuple[Path, Path]) -> None:
    engine = Engine(BaseModel.load(base_dir))
    app = create_app(
        Provider(PacedEngine(engine, pace_s=0.02)),
        Registry(engine, adapter_paths),
        tcp=TcpAccess(None),
    )
    with serving_tcp(app) as port:
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:
            closing = threading.Timer(0.3, engine.close)
            closing.start()
            with pytest.raises(openai.APIStatusError, match="is being unloaded") as refused:
                ask(client, prompt=["def f("] * 100, max_tokens=100)
            assert refused.value.status_code == 503
            closing.join()
