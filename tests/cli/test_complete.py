"""`complete`: what is asked of the worker and what is printed; a stand-in answers in our format."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from code2lora.cli import waiting
from code2lora.serving.completion import AdapterIdentity, Completion
from code2lora.serving.openai import (
    ApiError,
    Chunks,
    completion_body,
    error_body,
    parse_call,
)
from code2lora.settings import Settings
from tests.cli.conftest import Known, Run


class Worker:
    """Answers every completion with what it was asked; refuses a prompt that says so."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        no_model: Any = None  # asked only about prompts that are token ids
        call = parse_call(body, no_model, repository_header=None)
        if "refuse" in call.request.prompt:
            error = ApiError(404, "the repository has no adapter yet", hint="`code2lora status`")
            return JSONResponse(error_body(error), status_code=404)
        adapter = None
        if call.use != "base":
            adapter = AdapterIdentity(call.repository, call.commit, f"{call.use}-adapter")
        completion = Completion(
            text=f" {call.use}\n\x1b[2J",
            finish_reason="stop",
            n_prompt_tokens=3,
            n_tokens=2,
            first_token_ms=1.0,
            total_ms=12.0,
            adapter=adapter,
        )
        if not call.stream:
            return JSONResponse(completion_body(completion, model_id="tiny"))
        chunks = Chunks("tiny")
        pieces = [chunks.text(completion.text[:3]), chunks.text(completion.text[3:])]
        return StreamingResponse(
            iter([*pieces, chunks.end(completion)]), media_type="text/event-stream"
        )


@pytest.fixture
def worker(home: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """A server on the worker's socket; nobody starts a real daemon."""
    home.prepare()
    monkeypatch.setattr(waiting, "ensure_daemon", lambda settings: False)
    made = Worker()
    app = Starlette(routes=[Route("/v1/completions", made.complete, methods=["POST"])])
    config = uvicorn.Config(
        app, uds=str(home.socket), lifespan="off", ws="none", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        time.sleep(0.005)
    yield made
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def code(here: Path) -> Path:
    file = here / "sub" / "app.py"
    file.parent.mkdir()
    file.write_text("def f(\n    pass\n")
    return file


def test_the_completion_alone_is_data(
    code2lora: Run, known: Known, worker: Worker, code: Path
) -> None:
    done = code2lora("complete", f"{code}:1", "-n", "9", "-t", "0.5", "--seed", "3", "--stop", "#")
    assert (done.status, done.out) == (0, " own\n\x1b[2J\n")
    assert done.err == "adapter own-adapter, 2 tokens, 12 ms\n"
    (asked,) = worker.asked
    assert asked == {
        "prompt": "def f(",
        "suffix": "\n    pass\n",
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 1.0,
        "seed": 3,
        "stop": ["#"],
        "stream": False,
        "repository": f"{known.repository_id}:{known.worktree.id}",
        "commit": None,
        "use": "own",
    }


def test_the_repository_is_the_files_own(
    code2lora: Run, known: Known, worker: Worker, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    assert code2lora("complete", f"{code}:1").status == 0
    done = code2lora("complete", "--prompt", "x")
    assert done.status == 1, "the current directory is in no repository"
    assert code2lora("complete", "--prompt", "x", "--repo", code.parent).status == 0


@pytest.mark.parametrize("use", ["base", "generic"])
def test_without_the_repositorys_adapter(
    code2lora: Run, known: Known, worker: Worker, here: Path, use: str
) -> None:
    done = code2lora("complete", "-p", "def ", f"--{use}")
    assert done.out == f" {use}\n\x1b[2J\n"
    assert worker.asked[0]["use"] == use
    who = "base model" if use == "base" else "adapter generic-adapter"
    assert done.err == f"{who}, 2 tokens, 12 ms\n"


def test_a_commit_is_resolved_here(
    code2lora: Run, known: Known, worker: Worker, here: Path
) -> None:
    code2lora("complete", "-p", "def ", "--commit", "HEAD~2")
    assert worker.asked[0]["commit"] == known.repo.git("rev-parse", "HEAD~2")
    done = code2lora("complete", "-p", "def ", "--commit", "nonsense")
    assert done.status == 1
    assert done.err.startswith("error: 'nonsense' names no commit of ")


def test_standard_input_is_a_prompt(
    code2lora: Run, known: Known, worker: Worker, here: Path
) -> None:
    code2lora("complete", "-", text="import os\n")
    code2lora("complete", "--suffix", "end", text="import re\n")
    assert [(asked["prompt"], asked["suffix"]) for asked in worker.asked] == [
        ("import os\n", None),
        ("import re\n", "end"),
    ]


def test_a_stream_prints_the_same(code2lora: Run, known: Known, worker: Worker, here: Path) -> None:
    done = code2lora("complete", "-p", "def ", "--stream")
    assert (done.status, done.out) == (0, " own\n\x1b[2J\n")
    assert done.err == "adapter own-adapter, 2 tokens, 12 ms\n"
    assert worker.asked[0]["stream"] is True


def test_json_of_one(code2lora: Run, known: Known, worker: Worker, here: Path) -> None:
    view = json.loads(code2lora("complete", "-p", "def ", "--json").out)
    assert (view["text"], view["finish_reason"], view["n_tokens"]) == (" own\n\x1b[2J", "stop", 2)
    assert view["adapter"]["generation"] == "own-adapter"


def test_side_by_side(code2lora: Run, known: Known, worker: Worker, code: Path) -> None:
    done = code2lora("complete", f"{code}:1", "--compare")
    assert (done.status, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["base", "adapter"]
    assert lines[2] == ["def", "f(", "base", "def", "f(", "own"]
    assert lines[3] == ["\ufffd[2J", "\ufffd[2J"], "a table is no place for escape sequences"
    base, adapter = "base model, 2 tokens, 12 ms", "adapter own-adapter, 2 tokens, 12 ms"
    assert lines[5] == [*base.split(), *adapter.split()]
    assert [asked["use"] for asked in worker.asked] == ["base", "own"]
    view = json.loads(code2lora("complete", f"{code}:1", "--compare", "--json").out)
    assert (view["base"]["adapter"], view["own"]["text"]) == (None, " own\n\x1b[2J")


def test_a_refusal_is_an_error(code2lora: Run, known: Known, worker: Worker, here: Path) -> None:
    for extra in ([], ["--stream"]):
        done = code2lora("complete", "-p", "refuse", *extra)
        assert (done.status, done.out) == (1, "")
        assert done.err == ("error: the repository has no adapter yet\nhint: `code2lora status`\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base", "--generic"], "--base and --generic exclude each other"),
        (["--compare", "--base"], "--compare and --base exclude each other"),
        (["--commit", "HEAD", "--generic"], "--commit and --generic exclude each other"),
        (["--stream", "--json"], "--stream and --json exclude each other"),
        (["--stream", "--compare"], "--stream and --compare exclude each other"),
    ],
)
def test_what_cannot_be_meant(
    code2lora: Run, known: Known, here: Path, options: list[str], message: str
) -> None:
    done = code2lora("complete", "-p", "x", *options)
    assert (done.status, done.out) == (2, "")
    assert done.err == f"error: {message}\nhint: `code2lora complete --help`\n"
