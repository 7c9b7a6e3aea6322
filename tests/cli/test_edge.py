"""How commands end: what stands on stderr, and the exit status."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import click
import pytest

from code2lora.cli import app
from code2lora.errors import UserError
from code2lora.settings import Settings
from tests.cli.conftest import Known, Run
from tests.gitrepo import GitRepo


class Ending:
    """What `code2lora status` raises."""

    raised: BaseException


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Ending:
    """Put a command that raises in the place of `code2lora status`."""
    made = Ending()

    def callback(**_: object) -> None:
        raise made.raised

    command = click.Command("status", callback=callback)
    monkeypatch.setattr(app.Root, "get_command", lambda *_: command)
    return made


def test_a_user_error_is_two_lines_and_status_1(code2lora: Run, ending: Ending) -> None:
    ending.raised = UserError("the disk is full", hint="`df`")
    done = code2lora("status")
    assert (done.status, done.out) == (1, "")
    assert done.err == "error: the disk is full\nhint: `df`\n"


def test_a_user_error_without_a_hint_is_one_line(code2lora: Run, ending: Ending) -> None:
    ending.raised = UserError("the disk is full")
    assert code2lora("status").err == "error: the disk is full\n"


def test_training_without_its_packages_names_the_extra(code2lora: Run, ending: Ending) -> None:
    ending.raised = ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")
    done = code2lora("status")
    assert (done.status, done.out) == (1, "")
    assert done.err == (
        "error: training needs the package pyarrow\nhint: `pip install 'code2lora-daemon[train]'`\n"
    )


def test_wrong_usage_is_status_2(code2lora: Run) -> None:
    done = code2lora("log", "--max", "3")
    assert (done.status, done.out) == (2, "")
    assert done.err == "error: no such option '--max'\nhint: did you mean `--max-count`?\n"
    done = code2lora("log", "--xyzzy")
    assert done.err == "error: no such option '--xyzzy'\nhint: `code2lora log --help`\n"


def test_a_value_out_of_range_is_named(code2lora: Run) -> None:
    done = code2lora("log", "-n", "0")
    assert done.status == 2
    assert done.err == (
        "error: invalid value for '-n' / '--max-count': 0 is not in the range x>=1\n"
        "hint: `code2lora log --help`\n"
    )


def test_a_misspelt_command_gets_the_nearest(code2lora: Run) -> None:
    done = code2lora("stauts")
    assert done.status == 2
    assert done.err == (
        "error: there is no command `code2lora stauts`\nhint: did you mean `code2lora status`?\n"
    )
    done = code2lora("adapter", "pth")
    assert done.err == (
        "error: there is no command `code2lora adapter pth`\n"
        "hint: did you mean `code2lora adapter path`?\n"
    )


def test_an_unknown_command_gets_the_help(code2lora: Run) -> None:
    done = code2lora("xyzzy")
    assert done.err == "error: there is no command `code2lora xyzzy`\nhint: `code2lora --help`\n"


def test_a_bug_leaves_its_traceback_in_a_private_file(
    code2lora: Run, ending: Ending, home: Settings
) -> None:
    ending.raised = AssertionError("two and two make five")
    done = code2lora("status")
    (file,) = home.log_dir.glob("crash-*.txt")
    assert (done.status, done.out) == (3, "")
    assert done.err == (
        "error: this is a bug: AssertionError: two and two make five\n"
        f"hint: the traceback is in {file}\n"
    )
    text = file.read_text()
    assert "Traceback" in text and "in callback" in text and "arguments: ['status']" in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_bug_shows_its_traceback_when_no_file_can_be_written(
    code2lora: Run, ending: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODE2LORA_STATE_DIR", "/dev/null/nowhere")
    ending.raised = KeyError("x")
    done = code2lora("status")
    assert done.status == 3
    assert done.err.startswith("Traceback")
    assert done.err.endswith("error: this is a bug: KeyError: 'x'\n")


def test_an_interrupt_is_130(code2lora: Run, ending: Ending) -> None:
    ending.raised = KeyboardInterrupt()
    done = code2lora("status")
    assert done.status == 130
    assert done.err.strip() == "error: interrupted"


def test_wrong_settings_name_their_key(code2lora: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODE2LORA_KEEP_ADAPTERS", "0")
    done = code2lora("models", "list")
    assert done.status == 1
    assert done.err.splitlines()[0].startswith("error: CODE2LORA_KEEP_ADAPTERS is '0'")


def test_no_repository_is_said(code2lora: Run, tmp_path: Path) -> None:
    done = code2lora("status", tmp_path)
    assert done.status == 1
    assert done.err.startswith("error: ") and str(tmp_path) in done.err


def test_not_registered_says_what_to_do(code2lora: Run, repo: GitRepo, home: Settings) -> None:
    for command in ("status", "log", "refresh"):
        done = code2lora(command, repo.path)
        assert (done.status, done.out) == (1, "")
        assert done.err == (
            f"error: {repo.path} is not registered\nhint: `code2lora init {repo.path}`\n"
        )
    assert not (home.state_dir / "state.db").exists(), "asking made a database"


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "code2lora.cli", "completion", "bash"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(30), errors) == (0, b"")


@pytest.mark.parametrize("group", [(), ("daemon",), ("adapter",)])
def test_a_group_alone_shows_its_help(code2lora: Run, group: tuple[str, ...]) -> None:
    done = code2lora(*group)
    assert (done.status, done.out) == (2, "")
    assert done.err == code2lora(*group, "--help").out


def test_a_file_in_the_place_of_a_directory(code2lora: Run, tmp_path: Path) -> None:
    file = tmp_path / "app.py"
    file.touch()
    for arguments in (["status", file], ["deinit", file], ["show", "HEAD", "--repo", file]):
        done = code2lora(*arguments)
        assert (done.status, done.out) == (2, "")
        assert done.err == (
            f"error: a directory is expected, but {file} is a file\n"
            f"hint: give the directory that it is in: {tmp_path}\n"
        )


def test_a_place_that_is_not_registered_is_absolute(code2lora: Run, here: Path) -> None:
    assert code2lora("deinit", "--yes").err.startswith(f"error: {here} is not registered\n")


def test_before_the_first_commit_all_say_the_same(code2lora: Run, known: Known, here: Path) -> None:
    fresh = GitRepo(here.parent / "fresh")
    Known(known.settings, known.store, fresh)
    for arguments in (["show", "HEAD"], ["adapter", "path"], ["complete", "-p", "x"]):
        done = code2lora(*arguments, "--repo", fresh.path)
        assert (done.status, done.out) == (1, "")
        assert done.err == "error: there is no commit yet: the first one makes the adapter\n"
