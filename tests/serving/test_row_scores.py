"""Rows under several adapters at once: the same losses as one by one, and nobody waits for them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from code2lora.serving import scoring
from code2lora.serving.completion import CompletionRequest
from code2lora.serving.engine import Engine
from code2lora.serving.model import BaseModel
from code2lora.serving.scoring import score_rows
from tests.serving.tiny import CONTEXT_TOKENS

ROWS = [
    ("def parse(line):\n", "    return line.split(',')\n"),
    ("", "import os\n"),
    ("class Store:\n" * 9, "    def __init__(self, path):\n        self.path = path\n"),
]


def test_the_losses_are_those_of_each_adapter_alone(
    engine: Engine, adapter_paths: tuple[Path, Path]
) -> None:
    adapters = (None, engine.adapter(adapter_paths[0]), engine.adapter(adapter_paths[1]))

    losses = score_rows(engine, ROWS, adapters)

    assert losses is not None
    for adapter, nats in zip(adapters, losses.nats, strict=True):
        alone = [engine.score(above, wanted, adapter) for above, wanted in ROWS]
        assert nats == pytest.approx(sum(score.nll for score in alone), rel=1e-5)
        assert losses.n_tokens == sum(score.n_tokens for score in alone)
    assert len({round(nats, 3) for nats in losses.nats}) == 3


@pytest.mark.parametrize("size", [1, 5, 64])
def test_pieces_of_any_size_give_the_same(
    engine: Engine,
    adapter_paths: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    size: int,
) -> None:
    adapters = (engine.adapter(adapter_paths[0]), None)
    expected = score_rows(engine, ROWS, adapters)
    for name in ("_FIRST_PIECE", "_LEAST_PIECE", "_MOST_PIECE"):
        monkeypatch.setattr(scoring, name, size)
    found = score_rows(engine, ROWS, adapters)

    assert expected is not None and found is not None
    assert found.nats == pytest.approx(expected.nats, rel=1e-5)


def test_long_rows_fit_the_window_and_are_asked_in_part(engine: Engine) -> None:
    losses = score_rows(engine, [("7" * 500, "8" * 500)], [None])
    assert losses is not None
    assert losses.n_tokens == min(scoring.TARGET_TOKENS, CONTEXT_TOKENS * 3 // 4)
    empty = score_rows(engine, [("x", "")], [None, None])
    assert empty is not None and (empty.n_tokens, empty.nats) == (0, (0.0, 0.0))
    assert score_rows(engine, [], [None]) == scoring.Losses(0, (0.0,))


def test_names_of_control_tokens_are_mere_text(engine: Engine) -> None:
    losses = score_rows(engine, [("<|fim_prefix|>", "<|endoftext|>")], [None])
    assert losses is not None and losses.n_tokens > 3


def test_nothing_is_remembered_or_merged(base_dir: Path, adapter_paths: tuple[Path, Path]) -> None:
    """A score must not push out what completions live on."""
    engine = Engine(BaseModel.load(base_dir))
    adapter = engine.adapter(adapter_paths[0])
    before = engine.memory_bytes
    score_rows(engine, ROWS, (None, adapter))
    assert engine.memory_bytes == before
    assert engine.stats.n_requests == 0
    engine.close()


def test_a_score_is_given_up_when_it_may_not_go_on(engine: Engine) -> None:
    asked: list[None] = []

    def twice() -> bool:
        asked.append(None)
        return len(asked) <= 2

    assert score_rows(engine, ROWS * 9, [None], may_go_on=twice) is None
    assert len(asked) == 3


def test_a_completion_does_not_wait_for_the_whole_score(engine: Engine) -> None:
    ended = threading.Event()

    def score() -> None:
        score_rows(engine, ROWS * 300, [None, None])
        ended.set()

    thread = threading.Thread(target=score)
    thread.start()
    time.sleep(0.02)
    done = engine.complete(CompletionRequest(prompt="def parse(", max_tokens=8))
    assert done.n_tokens > 0
    assert not ended.is_set(), "the score was over too soon to tell"
    thread.join()
