"""Requests that share passes: each gets what it would get alone."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from code2lora.errors import UserError
from code2lora.serving.adapter_cache import LoadedAdapter
from code2lora.serving.completion import (
    AdapterIdentity,
    Completion,
    CompletionRequest,
    ExtraFile,
    Piece,
)
from code2lora.serving.engine import Engine
from code2lora.serving.model import BaseModel
from tests.serving.tiny import random_lora, wait_until

PROMPTS = [
    "def parse(line):",
    "class Store:\n    def __init__(self, path):\n",
    "7",
    "import os\n\n\nfor name in os.listdir('.'):\n    print(name)\n" * 2,
]
N_ADAPTERS = 3


class Together:
    """An engine under test and what every request gives alone."""

    def __init__(self, base_dir: Path, **options: int) -> None:
        self.engine = Engine(BaseModel.load(base_dir), **options)
        self._plain = Engine(BaseModel.load(base_dir), prefix_bytes=0, merged_bytes=0)
        loras = [random_lora(seed) for seed in range(N_ADAPTERS)]
        who = [AdapterIdentity(None, None, f"g{seed}") for seed in range(N_ADAPTERS)]
        self.adapters = [None, *map(self.engine.place, who, loras)]
        self._alone = [None, *map(self._plain.place, who, loras)]
        self._known: dict[tuple[CompletionRequest, int], list[Completion]] = {}

    def alone(self, request: CompletionRequest, which: int) -> list[Completion]:
        key = (request, which)
        if key not in self._known:
            self._known[key] = ask(self._plain, request, self._alone[which]).result(20)
        return self._known[key]

    def close(self) -> None:
        self.engine.close()
        self._plain.close()


def ask(
    engine: Engine,
    request: CompletionRequest,
    adapter: LoadedAdapter | None = None,
    *,
    on_piece: Callable[[int, Piece], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Future[list[Completion]]:
    future: Future[list[Completion]] = Future()

    def on_done(result: list[Completion] | Exception) -> None:
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    engine.submit(request, adapter, on_done=on_done, on_piece=on_piece, cancelled=cancelled)
    return future


def held(until: threading.Event) -> Callable[[], bool]:
    """Return what keeps the engine from its next pass until an event."""
    return lambda: not until.wait(9)


def said(completions: list[Completion]) -> list[tuple[object, ...]]:
    """Return what does not depend on the time it took."""
    return [
        (c.text, c.finish_reason, c.n_tokens, [t.text for t in c.tokens], c.adapter)
        for c in completions
    ]


@pytest.fixture(
    scope="module",
    params=[
        {},
        {"prefix_bytes": 0, "merged_bytes": 0},
        {"prefix_bytes": 60_000, "merged_bytes": 50_000, "max_rows": 4},
    ],
    ids=["default", "no caches", "tight"],
)
def together(base_dir: Path, request: pytest.FixtureRequest) -> Iterator[Together]:
    made = Together(base_dir, **request.param)
    yield made
    made.close()


REQUESTS = st.builds(
    CompletionRequest,
    prompt=st.sampled_from(PROMPTS),
    suffix=st.sampled_from([None, "\n    return x\n"]),
    max_tokens=st.sampled_from([0, 1, 5, 23]),
    n=st.sampled_from([1, 1, 1, 3]),
    temperature=st.sampled_from([0.0, 0.0, 1.2]),
    seed=st.sampled_from([1, 2]),
    logprobs=st.sampled_from([None, 0, 2]),
    stop=st.sampled_from([(), ("e",)]),
)


@settings(max_examples=15, deadline=None)
@given(
    mix=st.lists(
        st.tuples(REQUESTS, st.integers(0, N_ADAPTERS), st.sampled_from([0.0, 0.002])),
        min_size=2,
        max_size=10,
    )
)
def test_every_request_of_a_mix_gets_what_it_gets_alone(
    together: Together, mix: list[tuple[CompletionRequest, int, float]]
) -> None:
    expected = [said(together.alone(request, which)) for request, which, _ in mix]
    futures = []
    for request, which, pause_s in mix:
        futures.append(ask(together.engine, request, together.adapters[which]))
        time.sleep(pause_s)
    assert [said(future.result(20)) for future in futures] == expected


def test_passes_are_shared(together: Together) -> None:
    stats = together.engine.stats
    hold = threading.Event()
    blocker = ask(
        together.engine, CompletionRequest(prompt="7"), cancelled=lambda: not hold.wait(9)
    )
    request = CompletionRequest(prompt="class Store:", max_tokens=20, logprobs=0)
    futures = [ask(together.engine, request, adapter) for adapter in together.adapters]
    before = stats.n_passes
    hold.set()
    expected = [said(together.alone(request, which)) for which in range(N_ADAPTERS + 1)]
    assert [said(future.result(20)) for future in futures] == expected
    blocker.result(20)
    assert stats.widest_pass >= 3
    n_tokens = sum(future.result()[0].n_tokens for future in futures)
    assert stats.n_passes - before < 64 + n_tokens // 2


def test_an_adapter_in_steady_use_is_merged(base_dir: Path) -> None:
    both = Together(base_dir)
    request = CompletionRequest(prompt="class Store:", max_tokens=30)
    for _ in range(2):
        assert said(ask(both.engine, request, both.adapters[1]).result(20)) == said(
            both.alone(request, 1)
        )
    merged = both.engine.memory_bytes["merged"]
    assert merged > 0
    ask(both.engine, request, both.adapters[0]).result(20)
    ask(both.engine, request, both.adapters[2]).result(20)
    assert both.engine.memory_bytes["merged"] == 2 * merged
    assert said(ask(both.engine, request, None).result(20)) == said(both.alone(request, 0))
    both.close()


def test_a_long_prompt_does_not_hold_up_a_short_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("code2lora.serving.scheduler.PREFILL_TOKENS", 4)
    fresh = Engine(engine.model, prefix_bytes=0)
    order: list[str] = []
    hold = threading.Event()
    blocker = ask(
        fresh, CompletionRequest(prompt="7", max_tokens=1), cancelled=lambda: not hold.wait(9)
    )

    def begin(name: str, prompt: str, n: int) -> Future[list[Completion]]:
        return ask(
            fresh,
            CompletionRequest(prompt=prompt, max_tokens=n, logprobs=0),
            on_piece=lambda *_: order.append(name),
        )

    long = begin("long", "7" * 80, 2)
    short = [begin(name, "def", 6) for name in ("a", "b")]
    hold.set()
    for future in (blocker, long, *short):
        future.result(20)
    # the long one needs twenty passes to be read, and gets half of each
    assert order[-1] == "long"
    assert {"a", "b"} == set(order[:4])
    fresh.close()


def test_a_long_prompt_is_not_starved_by_short_ones(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("code2lora.serving.scheduler.PREFILL_TOKENS", 4)
    fresh = Engine(engine.model, prefix_bytes=0)
    long = ask(fresh, CompletionRequest(prompt="7" * 80, max_tokens=1))
    n_short = 0
    while not long.done():
        ask(fresh, CompletionRequest(prompt=f"def {n_short}", max_tokens=1)).result(20)
        n_short += 1
        assert n_short < 200
    fresh.close()


def test_a_prefix_is_remembered_for_its_adapter_alone(base_dir: Path) -> None:
    both = Together(base_dir)
    request = CompletionRequest(prompt="def parse(line):\n    return", max_tokens=9)
    longer = replace(request, prompt=request.prompt + " line")
    for which in (1, 2, 0):
        first = ask(both.engine, request, both.adapters[which]).result(20)[0]
        assert first.n_cached_tokens == 0
        second = ask(both.engine, longer, both.adapters[which]).result(20)[0]
        assert second.n_cached_tokens >= first.n_prompt_tokens - 2
        assert said([second]) == said(both.alone(longer, which))
        again = ask(both.engine, longer, both.adapters[which]).result(20)[0]
        assert again.n_cached_tokens == again.n_prompt_tokens - 1
        assert said([again]) == said([second])
    assert both.engine.stats.n_prefix_hits == 6
    both.close()


def test_remembered_prefixes_stay_within_their_bytes(base_dir: Path) -> None:
    engine = Engine(BaseModel.load(base_dir), prefix_bytes=100_000)
    for i in range(20):
        ask(engine, CompletionRequest(prompt=f"{i} class Store", max_tokens=3)).result(20)
        assert engine.memory_bytes["prefixes"] <= 100_000
    assert engine.memory_bytes["prefixes"] > 30_000
    engine.close()


def test_an_adapter_that_is_given_up_leaves_nothing_behind(base_dir: Path) -> None:
    engine = Engine(BaseModel.load(base_dir), adapter_bytes=1)

    def generation(i: int) -> LoadedAdapter:
        return engine.placed(i, lambda: (AdapterIdentity(None, None, str(i)), random_lora(i)))

    held = []
    for i in range(6):
        ask(engine, CompletionRequest(prompt="class", max_tokens=9), generation(i)).result(20)
        held.append(engine.memory_bytes)
    assert held[5] == held[1]
    engine.close()


def test_a_request_in_flight_keeps_the_adapter_that_it_came_with(base_dir: Path) -> None:
    both = Together(base_dir)
    old, new = both.adapters[1], both.adapters[2]
    request = CompletionRequest(prompt="class Store:", max_tokens=40)
    begun = threading.Event()
    flight = ask(both.engine, request, old, on_piece=lambda *_: begun.set())
    begun.wait(20)
    after = [ask(both.engine, request, new) for _ in range(3)]
    assert said(flight.result(20)) == said(both.alone(request, 1))
    assert all(said(a.result(20)) == said(both.alone(request, 2)) for a in after)
    both.close()


def test_requests_wait_where_memory_is_short(base_dir: Path) -> None:
    both = Together(base_dir, active_bytes=1)
    request = CompletionRequest(prompt="class Store:", max_tokens=9)
    futures = [ask(both.engine, request, adapter) for adapter in both.adapters]
    for which, future in enumerate(futures):
        assert said(future.result(20)) == said(both.alone(request, which))
    assert both.engine.stats.widest_pass == 1
    both.close()


def test_several_completions_share_the_reading_of_their_prompt(engine: Engine) -> None:
    request = CompletionRequest(prompt="import os, sys", max_tokens=12, temperature=1.5, seed=5)
    before = engine.stats.n_prompt_tokens
    four = ask(engine, replace(request, n=4)).result(20)
    assert engine.stats.n_prompt_tokens - before == four[0].n_prompt_tokens
    single = [ask(engine, replace(request, seed=5 + i)).result(20)[0].text for i in range(4)]
    assert [c.text for c in four] == single
    assert len(set(single)) > 1
    greedy = ask(engine, replace(request, n=2, greedy_first=True)).result(20)
    assert greedy[0].text == ask(engine, replace(request, temperature=0.0)).result(20)[0].text
    assert greedy[1].text == single[1]
    with pytest.raises(UserError, match="n is 17, but 16 completions can be under way"):
        ask(engine, replace(request, n=17))


def test_log_probabilities_are_the_models(engine: Engine, base_dir: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(base_dir, local_files_only=True)
    prompt = "class Store:"
    pieces: list[Piece] = []
    done = ask(
        engine,
        CompletionRequest(prompt=prompt, max_tokens=8, logprobs=3),
        on_piece=lambda _, piece: pieces.append(piece),
    ).result(20)[0]
    assert len(done.tokens) == done.n_tokens == 8
    ids = engine.model.encode(prompt)
    offset = 0
    for token in done.tokens:
        with torch.no_grad():
            chances = reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        values, top = chances.topk(3)
        assert [text for text, _ in token.top] == [engine.model.decode([i]) for i in top.tolist()]
        assert [v for _, v in token.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert token.logprob == pytest.approx(values[0].item(), abs=1e-4)
        assert token.offset == offset
        offset += len(token.text)
        ids.append(int(top[0]))
    assert tuple(token for piece in pieces for token in piece.tokens) == done.tokens


def test_tokens_behind_a_stop_string_are_not_told(engine: Engine) -> None:
    request = CompletionRequest(prompt="def parse(line):", max_tokens=20, logprobs=0)
    whole = ask(engine, request).result(20)[0]
    stop = whole.text[5:8]
    cut = ask(engine, replace(request, stop=(stop,))).result(20)[0]
    assert cut.stop_text == stop
    assert all(token.offset < len(cut.text) for token in cut.tokens)
    assert [t.text for t in cut.tokens] == [t.text for t in whole.tokens[: len(cut.tokens)]]


def forced(engine: Engine, monkeypatch: pytest.MonkeyPatch, text: str) -> Engine:
    """Return an engine that says `text`."""
    ids = iter(engine.model.encode(text) + [engine.model.separator_id] * 99)
    monkeypatch.setattr("code2lora.serving.sampling.Sampler.pick", lambda *_: next(ids))
    return engine


def test_the_text_ends_before_a_line_that_is_indented_less(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " = 1\n    b = 2\n      c\n  d = 3\n    e\n"
    engine = forced(engine, monkeypatch, text)
    pieces: list[str] = []
    done = ask(
        engine,
        CompletionRequest(prompt="a", max_tokens=60, min_indent=4),
        on_piece=lambda _, piece: pieces.append(piece.text),
    ).result(20)[0]
    assert done.text == "".join(pieces) == " = 1\n    b = 2\n      c\n"
    assert done.finish_reason == "stop"


def test_a_time_limit_ends_the_text_once_it_has_a_line(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = forced(engine, monkeypatch, "abc def ghi\njkl mno\n")
    request = CompletionRequest(prompt="a", max_tokens=60, predict_limit_ms=0.0)
    done = ask(engine, request).result(20)[0]
    assert done.text == "abc def ghi\n"
    assert done.finish_reason == "length"


def test_other_files_are_read_where_there_is_room(engine: Engine) -> None:
    request = CompletionRequest(prompt="x", suffix="y", max_tokens=1)
    few = replace(request, extra=(ExtraFile("a.py", "import os\n"),))
    many = replace(request, extra=tuple(ExtraFile(f"{i}.py", "7" * 50) for i in range(9)))
    counts = [ask(engine, r).result(20)[0].n_prompt_tokens for r in (request, few, many)]
    assert counts[0] < counts[1] < counts[2] == engine.context_tokens - 1


def test_a_cancelled_request_leaves_and_the_others_go_on(engine: Engine) -> None:
    fresh = Engine(engine.model)
    request = CompletionRequest(prompt="def parse(line):", max_tokens=60, temperature=1.0, seed=1)
    alone = fresh.complete(request)
    gone = threading.Event()
    first = ask(fresh, request, cancelled=gone.is_set, on_piece=lambda *_: gone.set())
    second = ask(fresh, request)
    ended = first.result(20)[0]
    assert ended.finish_reason == "cancelled"
    assert ended.n_tokens < alone.n_tokens
    assert second.result(20)[0].text == alone.text
    waiting = [fresh.submit(request, on_done=lambda _: None) for _ in range(40)]
    for ticket in waiting:
        ticket.cancel()
    wait_until(lambda: fresh.n_active + fresh.n_waiting == 0)
    assert fresh.stats.n_cancelled >= 20
    fresh.close()


def test_a_pass_that_fails_ends_its_requests_and_no_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = Engine(engine.model)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(fresh._decoder, "read", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            ask(fresh, CompletionRequest(prompt="x")).result(20)
    assert "out of memory" in caplog.text
    assert ask(fresh, CompletionRequest(prompt="x")).result(20)
    fresh.close()


def test_an_engine_that_cannot_go_on_tells_everybody_and_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = Engine(engine.model)

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(fresh._scheduler._prefixes, "find", fail)
        futures = [ask(fresh, CompletionRequest(prompt="x")) for _ in range(3)]
        for future in futures:
            with pytest.raises(MemoryError):
                future.result(20)
    assert ask(fresh, CompletionRequest(prompt="x")).result(20)
    assert (fresh.n_active, fresh.n_waiting) == (0, 0)
    fresh.close()


def test_a_broken_adapter_spoils_no_other_request(base_dir: Path) -> None:
    both = Together(base_dir)
    lora = random_lora(0)
    nan = replace(lora, b={t: v * float("nan") for t, v in lora.b.items()})
    broken = both.engine.place(AdapterIdentity(None, None, "broken"), nan)
    request = CompletionRequest(prompt="class Store:", max_tokens=20)
    rng = random.Random(0)
    asked = []
    for _ in range(20):
        which = rng.randrange(N_ADAPTERS + 1)
        asked.append((which, ask(both.engine, request, both.adapters[which])))
        with pytest.raises(UserError, match="not finite"):
            ask(both.engine, request, broken).result(20)
    for which, future in asked:
        assert said(future.result(20)) == said(both.alone(request, which))
    both.close()
