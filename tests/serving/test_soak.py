"""Many clients and many new generations at once: nothing fails, nothing mixes, nothing grows."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from code2lora.adapters.layout import AdapterMetadata
from code2lora.adapters.publish import publish
from code2lora.serving.app import create_app
from code2lora.serving.completion import CompletionRequest
from code2lora.serving.engine import Engine
from code2lora.serving.model import BaseModel
from tests.serving.test_shapes import sse
from tests.serving.tiny import (
    N_LAYERS,
    REPOSITORIES,
    Provider,
    Registry,
    http,
    random_lora,
    serving,
    wait_until,
)

N_CLIENTS = 16
N_KINDS = 6
"""Different weights that the generations take in turns, so that what each says is known."""
PROMPTS = ["def parse(line):", "class Store:\n    def", "import os", "7", "for name in héllo"]
N_NEW = 12


@dataclass
class Generations:
    """Publishes one adapter after another for both repositories and makes them live."""

    root: Path
    registry: Registry
    kinds: dict[str, int] = field(default_factory=dict)
    """Generation -> which weights it has."""
    n_published: int = 0

    def publish(self) -> None:
        kind, repository = self.n_published % N_KINDS, REPOSITORIES[self.n_published % 2]
        origin = AdapterMetadata(
            repository=repository,
            commit=f"{self.n_published + 1:012x}" + "0" * 28,
            state_sha256="5" * 64,
            checkpoint="c" * 64,
            base_model="tiny",
        )
        made = publish(random_lora(kind), origin, self.root, n_layers=N_LAYERS, dtype=torch.float32)
        self.kinds[made.path.name] = kind
        self.registry._paths[repository] = made.path
        self.n_published += 1


@pytest.fixture(scope="module")
def expected(
    base_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], str]:
    """What each kind of weights says alone, without any cache."""
    engine = Engine(BaseModel.load(base_dir), prefix_bytes=0, merged_bytes=0)
    root = tmp_path_factory.mktemp("alone")
    registry = Registry(engine, (root, root))
    generations = Generations(root, registry)
    said = {}
    for kind in range(N_KINDS):
        generations.publish()
        adapter = engine.adapter(registry._paths[REPOSITORIES[kind % 2]])
        for prompt in PROMPTS:
            request = CompletionRequest(prompt=prompt, max_tokens=N_NEW)
            said[kind, prompt] = engine.complete(request, adapter).text
    engine.close()
    assert len(set(said.values())) > len(said) // 2
    return said


@pytest.fixture
def stage(base_dir: Path, tmp_path: Path) -> Iterator[tuple[Engine, Generations, Path]]:
    # little room, so that adapters, prefixes and merged weights are evicted all the time
    engine = Engine(
        BaseModel.load(base_dir), adapter_bytes=200_000, prefix_bytes=400_000, merged_bytes=200_000
    )
    generations = Generations(tmp_path, Registry(engine, (tmp_path, tmp_path)))
    for _ in REPOSITORIES:
        generations.publish()
    with serving(create_app(Provider(engine), generations.registry)) as path:
        yield engine, generations, path
    engine.close()


def ask_until(
    stop: threading.Event,
    path: Path,
    seed: int,
    generations: Generations,
    expected: dict[tuple[int, str], str],
) -> int:
    """Ask without a pause; return how many answers were right. Raises on any that is not."""
    choose = random.Random(seed)
    n_right = 0
    with http(path) as client:
        while not stop.is_set():
            prompt, repository = choose.choice(PROMPTS), choose.choice(REPOSITORIES)
            stream = choose.random() < 0.3
            body = {"prompt": prompt, "max_tokens": N_NEW, "stream": stream}
            response = client.post("/v1/completions", json=body | {"repository": repository})
            assert response.status_code == 200, response.text
            kind = generations.kinds[response.headers["x-code2lora-generation"]]
            assert text_of(response, stream) == expected[kind, prompt], (kind, prompt)
            n_right += 1
    return n_right


def text_of(response: httpx.Response, stream: bool) -> str:
    if not stream:
        return str(response.json()["choices"][0]["text"])
    return "".join(json.loads(event)["choices"][0]["text"] for event in sse(response)[:-1])


def soak(
    stage: tuple[Engine, Generations, Path],
    expected: dict[tuple[int, str], str],
    n_swaps: int,
    pause_s: float,
) -> tuple[int, list[float]]:
    """Swap under load; return the number of answers, and the resident bytes at each tenth."""
    engine, generations, path = stage
    stop = threading.Event()
    process = psutil.Process()
    resident: list[float] = []
    with ThreadPoolExecutor(N_CLIENTS) as pool:
        clients = [
            pool.submit(ask_until, stop, path, seed, generations, expected)
            for seed in range(N_CLIENTS)
        ]
        try:
            for i in range(n_swaps):
                generations.publish()
                time.sleep(pause_s)
                if i % (n_swaps // 10) == 0:
                    resident.append(process.memory_info().rss)
                if any(client.done() for client in clients):
                    break
        finally:
            stop.set()
        n_right = sum(client.result(60) for client in clients)
    wait_until(lambda: engine.n_active == 0)
    return n_right, resident


def check(engine: Engine, generations: Generations, n_swaps: int) -> None:
    assert generations.n_published == n_swaps + 2
    assert engine.stats.widest_pass > 4
    assert engine.memory_bytes["adapters"] <= 200_000
    assert engine.memory_bytes["prefixes"] <= 400_000
    assert engine.memory_bytes["merged"] <= 200_000


def test_swaps_under_load_mix_nothing(
    stage: tuple[Engine, Generations, Path], expected: dict[tuple[int, str], str]
) -> None:
    n_right, _ = soak(stage, expected, n_swaps=60, pause_s=0.03)
    check(stage[0], stage[1], 60)
    assert n_right > 60


@pytest.mark.slow
def test_a_thousand_swaps_under_load_mix_nothing_and_grow_nothing(
    stage: tuple[Engine, Generations, Path],
    expected: dict[tuple[int, str], str],
    record_property: Callable[[str, object], None],
) -> None:
    n_right, resident = soak(stage, expected, n_swaps=1000, pause_s=0.05)
    record_property("answers", n_right)
    record_property("resident_mb", [round(n_bytes / 2**20) for n_bytes in resident])
    check(stage[0], stage[1], 1000)
    assert n_right > 1000
    half = len(resident) // 2
    assert max(resident[half:]) - max(resident[:half]) < 32 * 2**20, resident
