"""The sockets that editors find the worker on, and the token for the one that anybody can open."""

from __future__ import annotations

import logging
import os
import socket
import stat
from pathlib import Path

import httpx
import pytest

from code2lora.daemon.listening import ensure_token, listen_tcp, listen_unix, read_token
from code2lora.errors import UserError
from tests.daemon.conftest import Installation, fill, make_settings
from tests.gitrepo import GitRepo


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_token_is_made_once_and_for_the_owner_alone(home: Path) -> None:
    settings = make_settings(home)
    token = ensure_token(settings)
    assert len(token) > 40
    assert ensure_token(settings) == token == read_token(settings.http_token_file)
    assert stat.S_IMODE(settings.http_token_file.stat().st_mode) == 0o600


@pytest.mark.parametrize("spoil", ["open", "empty", "binary"])
def test_a_token_that_others_may_know_is_not_used(home: Path, spoil: str) -> None:
    settings = make_settings(home)
    file = settings.http_token_file
    token = ensure_token(settings)
    if spoil == "open":
        file.chmod(0o644)
    else:
        file.write_bytes(b"" if spoil == "empty" else b"\xff" * 50)
    assert read_token(file) is None
    assert ensure_token(settings) != token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_no_port_is_opened_unless_asked_for(home: Path) -> None:
    settings = make_settings(home)
    assert settings.http_port == 0
    assert listen_tcp(settings) is None
    assert not settings.http_token_file.exists()


def test_a_port_is_opened_for_this_machine_alone(home: Path) -> None:
    settings = make_settings(home, http_port=free_port())
    with listen_tcp(settings) as listener:  # type: ignore[union-attr]
        assert listener.getsockname() == ("127.0.0.1", settings.http_port)
    assert read_token(settings.http_token_file)


def test_a_port_that_is_taken_is_done_without(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        settings = make_settings(home, http_port=other.getsockname()[1])
        assert listen_tcp(settings) is None
    assert f"port {settings.http_port} cannot be opened" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def test_the_unix_socket_is_the_owners(home: Path) -> None:
    settings = make_settings(home)
    with listen_unix(settings):
        assert stat.S_IMODE(os.stat(settings.socket).st_mode) == 0o600


def test_a_path_that_no_unix_socket_can_have_is_told_of(home: Path) -> None:
    settings = make_settings(home / ("x" * 90))
    with pytest.raises(UserError, match="is longer than a Unix socket allows"):
        listen_unix(settings)


def test_an_editors_first_request_wakes_the_model(
    installation: Installation, repo: GitRepo
) -> None:
    head = fill(repo, 2)[-1]
    worktree = installation.register(repo)
    port = free_port()
    installation.environment["CODE2LORA_HTTP_PORT"] = str(port)
    installation.environment["CODE2LORA_IDLE_EXIT_S"] = "2"
    installation.start()
    installation.wait_live(worktree, head)
    installation.wait(lambda: installation.worker() is None, "the worker does not end")

    headers = {"authorization": f"Bearer {read_token(installation.settings.http_token_file)}"}
    body = {"prompt": "def function_1(", "max_tokens": 4}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=90) as client:
        named = {"model": f"code2lora/qwen2.5-coder-mini@{repo.path.name}"}
        answer = client.post("/v1/completions", json=body | named, headers=headers)
        only = client.post("/infill", json={"input_prefix": "x"}, headers=headers)
        refused = client.post("/daemon/refresh", json={"worktree": 1}, headers=headers)
        stranger = client.post("/v1/completions", json=body | named)
        models = client.get("/v1/models", headers=headers).json()["data"]
        pinned = models[-1]["id"]
        old = client.post("/v1/completions", json=body | {"model": pinned}, headers=headers)
        nothing = {"model": f"m@{repo.path.name}@0000"}
        unknown = client.post("/v1/completions", json=body | nothing, headers=headers)

    assert answer.status_code == 200, answer.text
    assert answer.headers["x-code2lora-generation"].startswith(head[:12])
    assert answer.json()["code2lora"]["repository"] == worktree.repository_id
    assert only.headers["x-code2lora-generation"] == answer.headers["x-code2lora-generation"]
    assert (refused.status_code, stranger.status_code) == (404, 401)
    assert models[0]["id"] == "code2lora/qwen2.5-coder-mini"
    assert pinned.startswith(f"{models[0]['id']}@{repo.path.name}@")
    assert old.json()["code2lora"]["commit"].startswith(pinned[-12:])
    assert unknown.json()["error"]["message"] == "no commits with a state begin with 0000"
    assert installation.worker() is not None
