"""The port that the dashboard needs: closed until it is wanted, open from then on."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest

from code2lora.daemon.listening import is_listening, read_token, reserve_tcp
from code2lora.serving.client import WorkerClient
from tests.daemon.conftest import Installation, make_settings


def test_nobody_can_connect_to_a_reserved_port(home: Path) -> None:
    settings = make_settings(home)
    with reserve_tcp(settings) as reserved:  # type: ignore[union-attr]
        address = reserved.getsockname()
        assert address[0] == "127.0.0.1" and not is_listening(reserved)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=5)
        assert read_token(settings.http_token_file)
        with reserved.dup() as lent:
            lent.listen()
        assert is_listening(reserved)
        socket.create_connection(address, timeout=5).close()


def test_the_page_outlives_the_worker(installation: Installation) -> None:
    installation.start()
    with WorkerClient(installation.settings.socket, timeout_s=90) as client:
        first = client.post("/daemon/dashboard", {})
        second = client.post("/daemon/dashboard", {})
    assert first["port"] == second["port"] and first["code"] != second["code"]
    with httpx.Client(base_url=f"http://127.0.0.1:{first['port']}", timeout=90) as browser:
        assert browser.get("/dashboard").status_code == 401
        login = browser.get("/dashboard/login", params={"code": first["code"], "place": "7"})
        assert (login.status_code, login.headers["location"]) == (303, "/dashboard?place=7")
        worker = installation.worker()
        assert worker is not None
        worker.terminate()
        worker.wait(30)
        again = browser.get("/dashboard/api/places")  # which wakes the next worker
        assert (again.status_code, again.json()) == (200, {"places": []})
        refused = browser.post("/daemon/dashboard", json={})
        assert refused.status_code == 401  # codes are given out on the Unix socket alone
        token = read_token(installation.settings.http_token_file)
        headers = {"authorization": f"Bearer {token}"}
        assert browser.post("/daemon/dashboard", json={}, headers=headers).status_code == 404
    assert installation.worker() != worker
