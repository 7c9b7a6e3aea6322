from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from code2lora.errors import UserError
from code2lora.serving.app import create_app
from code2lora.serving.client import Health, WorkerClient
from code2lora.serving.completion import Completion, CompletionRequest
from code2lora.serving.engine import Engine
from tests.serving.tiny import (
    REPOSITORIES,
    PacedEngine,
    Provider,
    Registry,
    serving,
    socket_path,
    wait_until,
)

REQUEST = CompletionRequest(
    prompt="def f(", suffix="):\n", max_tokens=30, temperature=0.7, top_p=0.9, seed=3
)


@pytest.fixture(scope="module")
def client(server: Path) -> Iterator[WorkerClient]:
    with WorkerClient(server, timeout_s=20) as made:
        yield made


def same(left: Completion | None, right: Completion) -> bool:
    """Compare all but the timings."""
    assert left is not None
    return all(
        getattr(left, name) == getattr(right, name)
        for name in ("text", "finish_reason", "n_prompt_tokens", "n_tokens", "adapter")
    )


def test_a_completion_arrives_as_the_engine_gave_it(
    client: WorkerClient, engine: Engine, adapter_paths: tuple[Path, Path]
) -> None:
    adapter = engine.adapter(adapter_paths[0])
    got = client.complete(REQUEST, repository=REPOSITORIES[0])
    assert same(got, engine.complete(REQUEST, adapter))
    assert got.first_token_ms is not None
    assert 0 < got.first_token_ms <= got.total_ms
    got = client.complete(REQUEST, repository=REPOSITORIES[0], use="base")
    assert same(got, engine.complete(REQUEST))


def test_a_stream_gives_pieces_and_then_the_whole(client: WorkerClient) -> None:
    whole = client.complete(REQUEST, repository=REPOSITORIES[1])
    stream = client.complete_stream(REQUEST, repository=REPOSITORIES[1])
    assert stream.completion is None
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == whole.text
    assert same(stream.completion, whole)


def test_leaving_a_stream_cancels_the_rest(engine: Engine, registry: Registry) -> None:
    slow = PacedEngine(engine, pace_s=0.02)
    with serving(create_app(Provider(slow), registry)) as path, WorkerClient(path) as client:
        with client.complete_stream(CompletionRequest(prompt="7", max_tokens=140)) as stream:
            assert next(iter(stream))
        wait_until(lambda: bool(slow.ended))
    assert slow.ended[0].finish_reason == "cancelled"


def test_a_refusal_keeps_its_message_and_hint(client: WorkerClient) -> None:
    asks: list[Callable[[], object]] = [
        lambda: client.complete(REQUEST, repository="c"),
        lambda: client.complete_stream(REQUEST, repository="c"),
    ]
    for ask in asks:
        with pytest.raises(UserError) as caught:
            ask()
        assert caught.value.message == "repository c is not registered"
        assert caught.value.hint == "`code2lora init`"


def test_other_routes_are_posted_to(client: WorkerClient) -> None:
    assert client.post("/daemon/shout", {"say": "hi"}) == {"heard": "HI"}
    with pytest.raises(UserError) as caught:
        client.post("/daemon/shout", {"fail": 1})
    assert (caught.value.message, caught.value.hint) == ("it cannot be shouted", "whisper")


def test_a_client_serves_several_threads(client: WorkerClient) -> None:
    expected = client.complete(REQUEST, repository=REPOSITORIES[0])
    got: list[Completion] = []
    threads = [
        threading.Thread(
            target=lambda: got.append(client.complete(REQUEST, repository=REPOSITORIES[0]))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4
    assert all(same(one, expected) for one in got)


def test_a_loading_model_is_waited_for(engine: Engine, registry: Registry) -> None:
    provider = Provider(None)
    with serving(create_app(provider, registry)) as path, WorkerClient(path) as client:
        assert client.health() == Health(ready=False, message="Loading model")
        timer = threading.Timer(0.3, lambda: setattr(provider, "now", engine))
        timer.start()
        assert client.complete(REQUEST).n_tokens
        assert client.health() == Health(ready=True, message="ok")
        timer.join()


def test_a_model_that_keeps_loading_is_given_up(registry: Registry) -> None:
    with serving(create_app(Provider(None), registry, load_wait_s=0.0)) as path:
        began_s = time.monotonic()
        with WorkerClient(path, timeout_s=0.3) as client, pytest.raises(UserError) as caught:
            client.complete(REQUEST)
        assert caught.value.message == "Loading model"
        assert time.monotonic() - began_s < 5


def test_a_model_that_cannot_be_loaded_is_not_waited_for(registry: Registry) -> None:
    provider = Provider(UserError("the model is damaged", hint="download it again"))
    with serving(create_app(provider, registry)) as path, WorkerClient(path) as client:
        assert client.health() == Health(ready=False, message="the model is damaged")
        with pytest.raises(UserError, match="the model is damaged"):
            client.complete(REQUEST)


@pytest.mark.parametrize("state", ["missing", "refused", "too long"])
def test_without_a_worker_the_hint_is_to_start_the_daemon(state: str) -> None:
    with socket_path() as path:
        if state == "refused":
            with socket.socket(socket.AF_UNIX) as closed:
                closed.bind(str(path))
        if state == "too long":
            path = path.with_name("x" * 200)
        with WorkerClient(path) as client:
            asks: list[Callable[[], object]] = [
                client.health,
                lambda: client.complete(REQUEST),
                lambda: client.complete_stream(REQUEST),
                lambda: client.post("/daemon/refresh", {}),
            ]
            for ask in asks:
                with pytest.raises(UserError) as caught:
                    ask()
                assert caught.value.message == f"no model worker answers at {path}"
                assert caught.value.hint == "`code2lora daemon start`"


@contextmanager
def answering(*parts: bytes, hold_s: float = 0.0) -> Iterator[Path]:
    """Yield a socket that answers one connection with bytes and closes it."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            for part in parts:
                connection.sendall(part)
            time.sleep(hold_s)

    with socket_path() as path, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield path
        thread.join()


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n"
ENDED = "the model worker ended before it had answered"


def chunk(text: str) -> bytes:
    event = {"choices": [{"text": text, "finish_reason": None}]}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def test_a_worker_that_dies_before_it_answers() -> None:
    with answering() as path, WorkerClient(path) as client:
        with pytest.raises(UserError) as caught:
            client.complete(REQUEST)
        assert (caught.value.message, caught.value.hint) == (ENDED, "`code2lora daemon logs`")


@pytest.mark.parametrize("length", [b"content-length: 9999\r\n", b""])
def test_a_worker_that_dies_in_the_middle_of_a_stream(length: bytes) -> None:
    with answering(HEAD + length + b"\r\n", chunk("one ")) as path, WorkerClient(path) as client:
        stream = iter(client.complete_stream(REQUEST))
        assert next(stream) == "one "
        with pytest.raises(UserError, match=ENDED):
            next(stream)


def test_an_error_in_the_middle_of_a_stream() -> None:
    error = b'data: {"error": {"message": "it broke", "hint": "mend it"}}\n\n'
    with answering(HEAD + b"\r\n", chunk("a"), error) as path, WorkerClient(path) as client:
        stream = iter(client.complete_stream(REQUEST))
        assert next(stream) == "a"
        with pytest.raises(UserError) as caught:
            next(stream)
        assert (caught.value.message, caught.value.hint) == ("it broke", "mend it")


def test_a_worker_that_says_nothing_is_given_up() -> None:
    with answering(hold_s=0.5) as path, WorkerClient(path, timeout_s=0.2) as client:
        with pytest.raises(UserError) as caught:
            client.complete(REQUEST)
        assert caught.value.message == "the model worker has said nothing for 0.2 s"


def test_closing_ends_what_other_threads_wait_for() -> None:
    with answering(hold_s=1.0) as path, WorkerClient(path) as client:
        timer = threading.Timer(0.2, client.close)
        timer.start()
        with pytest.raises(UserError, match=ENDED):
            client.complete(REQUEST)
        timer.join()


def test_a_prompt_that_is_too_large_is_refused_and_not_a_broken_pipe(
    client: WorkerClient,
) -> None:
    with pytest.raises(UserError) as caught:
        client.complete(CompletionRequest(prompt="x" * 5_000_000))
    assert caught.value.message == "the body has more than 100000 bytes"


def test_a_server_that_is_not_ours() -> None:
    answer = b"HTTP/1.1 418 Teapot\r\ncontent-length: 2\r\n\r\nhi"
    with answering(answer) as path, WorkerClient(path) as client:
        with pytest.raises(UserError) as caught:
            client.post("/x", {})
        assert caught.value.message == "the model worker answered with status 418"


def test_the_client_starts_without_torch() -> None:
    code = (
        "import sys, code2lora.serving.client\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'numpy', 'starlette'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
