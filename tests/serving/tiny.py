"""The smallest model directory and adapters that still behave like the large ones."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from starlette.applications import Starlette
from transformers import Qwen2Config, Qwen2ForCausalLM

from code2lora.adapters.layout import AdapterMetadata
from code2lora.adapters.publish import publish
from code2lora.errors import UserError
from code2lora.hypernetwork.lora import Lora
from code2lora.serving.adapter_cache import LoadedAdapter
from code2lora.serving.answering import Known
from code2lora.serving.completion import Completion, CompletionRequest, Piece, Use
from code2lora.serving.engine import Engine
from code2lora.serving.scheduler import Ticket
from code2lora.serving.server import BoundedProtocol, server_config
from code2lora.training.pretraining.tokenizer import save_tokenizer, train_tokenizer

CONTEXT_TOKENS = 160
VOCABULARY = 320
N_LAYERS = 2
RANK = 3
ALPHA = 6.0
WIDTHS = {"hidden": 32, "inner": 48, "kv": 16}
REPOSITORIES = ("a" * 32, "b" * 32)
COMMITS = ("1" * 40, "2" * 40)

CORPUS = [
    "def parse(line):\n    return line.split(',')\n",
    "class Store:\n    def __init__(self, path):\n        self.path = path\n",
    "import os\n\n\nfor name in os.listdir('.'):\n    print(name)\n",
]


def save_base(path: Path) -> None:
    """Write a random decoder with its tokenizer; its weights are large, so its text is lively."""
    tokenizer = train_tokenizer(CORPUS * 4, vocab_size=VOCABULARY)
    save_tokenizer(tokenizer, path, max_length=CONTEXT_TOKENS)
    torch.manual_seed(4)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTHS["hidden"],
        intermediate_size=WIDTHS["inner"],
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    broken = [i for i in range(VOCABULARY) if "\ufffd" in tokenizer.decode([i])]
    with torch.no_grad():  # most of its text is then text
        model.lm_head.weight[broken] = 0.0
    model.save_pretrained(path)


def random_lora(seed: int, *, hidden: int = WIDTHS["hidden"]) -> Lora:
    """Return weights large enough to change what is decoded."""
    inner, kv = WIDTHS["inner"], WIDTHS["kv"]
    dims = {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (hidden, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(N_LAYERS, *shape, generator=random) * 0.3

    return Lora(
        a={t: draw(RANK, d_in) for t, (d_in, _) in dims.items()},
        b={t: draw(d_out, RANK) for t, (_, d_out) in dims.items()},
        rank=RANK,
        alpha=ALPHA,
    )


def publish_adapter(root: Path, which: int) -> Path:
    """Write the adapter of one of the two repositories and return its directory."""
    origin = AdapterMetadata(
        repository=REPOSITORIES[which],
        commit=COMMITS[which],
        state_sha256="5" * 64,
        checkpoint="c" * 64,
        base_model="tiny",
    )
    made = publish(random_lora(which), origin, root, n_layers=N_LAYERS, dtype=torch.float32)
    return made.path


class Provider:
    """Has the engine, or not yet, or never."""

    model_id = "code2lora/tiny-qwen2.5-coder"

    def __init__(self, engine: object) -> None:
        self.now = engine

    def engine(self) -> Engine | None:
        if isinstance(self.now, UserError):
            raise self.now
        return self.now  # type: ignore[return-value]


class Registry:
    """Knows two repositories by their ids; waits for `gate` before it answers."""

    def __init__(self, engine: Engine, paths: tuple[Path, Path]) -> None:
        self._engine = engine
        self._paths = dict(zip(REPOSITORIES, paths, strict=True))
        self.asked: list[tuple[str | None, str | None, Use]] = []
        self.gate = threading.Event()
        self.gate.set()

    def known(self) -> list[Known]:
        return [Known(REPOSITORIES[0], "alpha", COMMITS[:1]), Known(REPOSITORIES[1], "two words")]

    def resolve(
        self, repository: str | None, commit: str | None, use: Use, files: Sequence[str] = ()
    ) -> LoadedAdapter | None:
        self.asked.append((repository, commit, use))
        self.gate.wait(20)
        if repository is None or use == "base":
            return None
        if repository not in self._paths:
            raise UserError(f"repository {repository} is not registered", hint="`code2lora init`")
        return self._engine.adapter(self._paths[repository])


class PacedEngine:
    """An engine whose every pass takes a while; remembers how its completions ended."""

    def __init__(self, engine: Engine, pace_s: float) -> None:
        self._engine = engine
        self._pace_s = pace_s
        self.ended: list[Completion] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(
        self,
        request: CompletionRequest,
        adapter: LoadedAdapter | None = None,
        *,
        on_done: Callable[[list[Completion] | Exception], None],
        on_piece: Callable[[int, Piece], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Ticket:
        def slowly() -> bool:
            time.sleep(self._pace_s)
            return cancelled()

        def done(result: list[Completion] | Exception) -> None:
            if isinstance(result, list):
                self.ended.extend(result)
            on_done(result)

        return self._engine.submit(
            request, adapter, on_done=done, on_piece=on_piece, cancelled=slowly
        )


@contextmanager
def socket_path() -> Iterator[Path]:
    """Yield a path short enough for a Unix socket."""
    with tempfile.TemporaryDirectory(prefix="c2l-", dir="/tmp") as folder:
        yield Path(folder) / "worker.sock"


@contextmanager
def serving(app: Starlette) -> Iterator[Path]:
    """Yield the Unix socket on which a real server answers."""
    with socket_path() as path, running(server_config(app, graceful_s=5, uds=str(path))):
        yield path


@contextmanager
def serving_tcp(app: Starlette, protocol: type[BoundedProtocol] = BoundedProtocol) -> Iterator[int]:
    """Yield the port of 127.0.0.1 on which a real server answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        config = server_config(app, graceful_s=5)
        config.http = protocol
        with running(config, [listener]):
            yield listener.getsockname()[1]


@contextmanager
def running(config: uvicorn.Config, sockets: list[socket.socket] | None = None) -> Iterator[None]:
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=(sockets,))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def http(path: Path) -> httpx.Client:
    """Return a plain HTTP client for a socket."""
    transport = httpx.HTTPTransport(uds=os.fspath(path))
    return httpx.Client(transport=transport, base_url="http://localhost", timeout=20)


def wait_until(what: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end_s, "it never came"
        time.sleep(0.005)
