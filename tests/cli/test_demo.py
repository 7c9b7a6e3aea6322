"""`demo`: the whole loop with a daemon of its own, and nothing left behind however it ends."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from code2lora.cli.demo_project import ASKED, BEGUN, COMMITS
from code2lora.settings import Settings

COMMAND = [sys.executable, "-m", "code2lora.cli", "demo"]


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch, home: Settings) -> Path:
    """Where the demo makes its directory."""
    path = home.state_dir.parent / "t"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    tempfile.tempdir = None
    return path


def left_behind(scratch: Path) -> list[str]:
    """Return what lies in the scratch directory, and processes that go on working there."""
    ours = [
        process
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get("CODE2LORA_STATE_DIR", "").startswith(str(scratch))
    ]
    # A daemon that was stopped gives up its lock a moment before its process is gone.
    _, alive = psutil.wait_procs(ours, timeout=10)
    return [*map(str, scratch.iterdir()), *(str(process.cmdline()) for process in alive)]


def test_the_project_is_code_and_asks_where_it_says() -> None:
    for _, files in COMMITS:
        for name, text in files.items():
            ast.parse(text, name)
    name, _, line = ASKED.partition(":")
    assert BEGUN[name].splitlines()[int(line) - 1].endswith("surge_level_m(")


def test_a_demo_that_fails_leaves_nothing(
    scratch: Path, home: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODE2LORA_MODEL", "/nowhere/model")
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.endswith(
        "error: `code2lora init` ended with status 1\nhint: `code2lora doctor`\n"
    )
    assert "$ git log --oneline\n" in done.stdout
    assert left_behind(scratch) == []
    assert not home.state_dir.exists(), "the user's own state was touched"


@pytest.mark.slow
def test_the_whole_loop(scratch: Path, home: Settings) -> None:
    began_s = time.monotonic()
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=240)
    took_s = time.monotonic() - began_s
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert [command.split()[1:3] for command in commands] == [
        ["git", "log"],
        ["code2lora", "init"],
        ["git", "commit"],
        ["code2lora", "status"],
        ["git", "switch"],
        ["git", "switch"],
        ["code2lora", "log"],
        ["code2lora", "complete"],
        ["code2lora", "deinit"],
    ]
    assert done.stdout.count("is live") == 3
    assert "removed 5 hooks" in done.stdout
    assert took_s < 60
    assert left_behind(scratch) == []
    assert not home.state_dir.exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(scratch: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        COMMAND,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("daemon started"):
            break
    os.killpg(process.pid, number)  # the terminal signals the whole foreground group
    process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert left_behind(scratch) == []
