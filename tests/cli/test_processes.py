"""The installed command in processes of its own: it starts light, and works as a script."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from code2lora import __version__
from code2lora.settings import Settings
from tests.cli.conftest import Known
from tests.cli.models import make_model
from tests.gitrepo import GitRepo

LIGHT = """
import sys
from code2lora.cli import waiting
waiting.ensure_daemon = lambda settings: False
from code2lora.cli import main
try:
    main()
except SystemExit as ending:
    status = ending.code
heavy = {"torch", "transformers", "peft", "sentence_transformers"} & set(sys.modules)
assert not heavy, heavy
sys.exit(status)
"""


def script() -> str:
    """Return the console script of the environment that runs the tests."""
    found = shutil.which("code2lora", path=str(Path(sys.executable).parent))
    assert found is not None, "the package is not installed here: `pip install -e .`"
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["init"],
        ["status"],
        ["status", "--all", "--json"],
        ["log"],
        ["show", "HEAD"],
        ["refresh"],
        ["adapter", "path"],
        ["adapter", "list"],
        ["daemon", "stop"],
        ["daemon", "logs"],
        ["models", "list"],
        ["models", "show", "tiny"],
        ["doctor"],
        ["deinit", "--yes"],
        ["completion", "zsh"],
    ],
    ids=" ".join,
)
def test_a_command_that_needs_no_model_imports_no_torch(
    known: Known, here: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    known.repo.reset("HEAD~1")
    make_model(known.settings.models_dir / "tiny")
    monkeypatch.setenv("CODE2LORA_MODEL", "tiny")
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_console_script() -> None:
    done = subprocess.run([script(), "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"code2lora {__version__}\n", "")


def test_the_script_in_a_worktree_with_a_dead_daemon(known: Known, here: Path) -> None:
    """The pid file and the socket are left over, the lock is free: nothing hangs on them."""
    known.settings.pid_file.write_text("999999")
    known.settings.socket.touch()
    done = subprocess.run(
        [script(), "status", "--json"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["daemon"]["running"] is False


def test_a_terminal_without_unicode(known: Known, here: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(
        [script(), "status"], capture_output=True, text=True, timeout=60, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u2588" in done.stdout


def test_an_interrupt_while_waiting(home: Settings, repo: GitRepo) -> None:
    """^C while `logs -f` follows, the way to leave it, ends it with 130 and in silence."""
    home.prepare()
    (home.log_dir / "daemon.log").write_text("hello\n")
    process = subprocess.Popen(
        [script(), "daemon", "logs", "-f"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "hello\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_reads_the_completion_script(tmp_path: Path, shell: str) -> None:
    executable = shutil.which(shell)
    if executable is None:
        pytest.skip(f"{shell} is not installed")
    made = subprocess.run([script(), "completion", shell], capture_output=True, timeout=60)
    (tmp_path / "script").write_bytes(made.stdout)
    command = [executable, "-n", str(tmp_path / "script")]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_bash_completes_commands(home: Settings) -> None:
    environment = os.environ | {
        "_CODE2LORA_COMPLETE": "bash_complete",
        "COMP_WORDS": "code2lora de",
        "COMP_CWORD": "1",
    }
    done = subprocess.run([script()], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.split() == ["plain,deinit", "plain,demo"]
