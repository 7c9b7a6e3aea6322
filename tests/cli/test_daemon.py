"""`daemon`: its log, its status when it does not run, and the service file."""

from __future__ import annotations

import json
import stat
import threading
import time
from pathlib import Path

import pytest

from code2lora.cli import daemon
from code2lora.settings import Settings
from tests.cli.conftest import Run


@pytest.fixture
def log(home: Settings) -> Path:
    home.prepare()
    return home.log_dir / "daemon.log"


def test_the_status_of_none(code2lora: Run, home: Settings) -> None:
    done = code2lora("daemon", "status")
    assert (done.status, done.err) == (1, "")
    assert done.out == (
        "  daemon    not running\n"
        "  worker    not loaded\n"
        f"  socket    {home.socket}\n"
        f"  logs      {home.log_dir / 'daemon.log'}\n"
        f"            {home.log_dir / 'worker.log'}\n"
        "  at login  no: `code2lora daemon install`\n"
    )
    view = json.loads(code2lora("daemon", "status", "--json").out)
    assert (view["running"], view["worker"], view["service"]) == (False, None, None)
    assert view["logs"] == [str(home.log_dir / "daemon.log"), str(home.log_dir / "worker.log")]


def test_stopping_none(code2lora: Run) -> None:
    done = code2lora("daemon", "stop")
    assert (done.status, done.out, done.err) == (0, "was not running\n", "")


def test_a_daemon_without_a_model_does_not_start(
    code2lora: Run, home: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODE2LORA_MODEL", "/nowhere/model")
    done = code2lora("daemon", "start")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("error: the daemon did not start: ")
    assert str(home.log_dir / "daemon.log") in done.err


def test_the_last_lines(code2lora: Run, log: Path) -> None:
    log.write_text("".join(f"line {n}\n" for n in range(100)))
    assert code2lora("daemon", "logs", "-n", "2").out == "line 98\nline 99\n"
    assert len(code2lora("daemon", "logs").out.splitlines()) == 20
    assert code2lora("daemon", "logs", "-n", "0").out == ""


def test_no_log_yet(code2lora: Run, log: Path) -> None:
    done = code2lora("daemon", "logs")
    assert (done.status, done.out, done.err) == (0, "", f"nothing is logged yet in {log}\n")


@pytest.mark.parametrize("width", [1, 4000])
def test_last_lines_of_any_length(tmp_path: Path, width: int) -> None:
    file = tmp_path / "log"
    lines = [f"{n}" * width for n in range(10, 60)]
    file.write_text("\n".join(lines) + "\n")
    assert daemon.last_lines(file, 3) == lines[-3:]
    assert daemon.last_lines(file, 99) == lines


def test_following_sees_what_is_added_and_rotated(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("old\n")
    following = daemon.added_lines(file)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.extend(next(following) for _ in range(3)))
    reader.start()
    time.sleep(0.1)
    with file.open("a") as added:
        added.write("first\nsecond, in ")
        added.flush()
        time.sleep(0.3)
        added.write("two parts\n")
    time.sleep(0.4)
    file.write_text("new\n")
    reader.join(10)
    assert found == ["first", "second, in two parts", "new"]


def test_a_log_cannot_draw_on_the_terminal(code2lora: Run, log: Path) -> None:
    log.write_text("poke from \x1b[2J/evil\n")
    assert code2lora("daemon", "logs").out == "poke from \ufffd[2J/evil\n"


def test_the_service_is_written_and_removed(
    code2lora: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the service manager: the real one is the machine's, not the test's."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name in ("systemctl", "launchctl"):
        (bin_ / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n')
        (bin_ / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{bin_}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))

    done = code2lora("daemon", "install")

    path = Path(done.out.removeprefix("installed ").strip())
    assert (done.status, done.err) == (0, "")
    assert path.is_relative_to(tmp_path) and path.is_file()
    assert json.loads(code2lora("daemon", "status", "--json").out)["service"] == str(path)
    assert code2lora("daemon", "uninstall").out == "removed\n"
    assert not path.exists()
    assert code2lora("daemon", "uninstall").out == "was not installed\n"
    assert len((tmp_path / "calls").read_text().splitlines()) == 2
