"""What a caller is told when git cannot answer, and what the room must not drag in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from code2lora.errors import UserError
from code2lora.hooks import HookTarget, inspect, install
from tests.gitrepo import GitRepo
from tests.hooks.conftest import Daemon, target_of


def told(target: HookTarget, daemon: Daemon, git: str = "git") -> tuple[str, str | None]:
    """Return message and hint of the error that both reading and writing raise."""
    with pytest.raises(UserError) as reading:
        inspect(target, daemon.spec, git=git)
    with pytest.raises(UserError) as writing:
        install(target, daemon.spec, git=git)
    assert reading.value.message == writing.value.message
    return writing.value.message, writing.value.hint


@pytest.mark.usefixtures("by_file")
def test_no_repository(daemon: Daemon, tmp_path: Path) -> None:
    assert told(HookTarget(tmp_path, tmp_path, None), daemon) == (
        f"{tmp_path} is not a git directory: not a git repository: '{tmp_path}'",
        "run the command inside a git repository",
    )


def test_no_folder(daemon: Daemon, tmp_path: Path) -> None:
    gone = tmp_path / "gone"

    assert told(HookTarget(gone, gone, None), daemon) == (f"{gone} does not exist", None)


def test_no_git(repo: GitRepo, daemon: Daemon) -> None:
    assert told(target_of(repo), daemon, git="git-nowhere") == (
        "there is no command 'git-nowhere'",
        "install git",
    )


def test_no_git_that_can_run(repo: GitRepo, daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "git").write_text("")

    assert told(target_of(repo), daemon, git=str(tmp_path / "git")) == (
        f"cannot run '{tmp_path}/git': Permission denied",
        None,
    )


def test_another_program(repo: GitRepo, daemon: Daemon) -> None:
    assert told(target_of(repo), daemon, git="true") == (
        "`true version` says '', not a version",
        None,
    )


def test_the_environment_of_a_hook_does_not_lead_elsewhere(
    repo: GitRepo, daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Called from within another repository's hook, git is told of that repository."""
    other = GitRepo(tmp_path / "other")
    before = (other.path / ".git/config").read_bytes()
    target = target_of(repo)
    monkeypatch.setenv("GIT_DIR", str(other.path / ".git"))
    monkeypatch.setenv("GIT_COMMON_DIR", str(other.path / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other.path / ".git/index"))

    report = install(target, daemon.spec)
    repo.commit({"a.py": ""})

    assert report.complete
    assert daemon.take() == ["post-commit"]
    assert (other.path / ".git/config").read_bytes() == before
    assert not (other.path / ".git/hooks/post-commit").exists()


def test_nothing_heavy_is_imported() -> None:
    heavy = "torch", "numpy", "sqlalchemy", "transformers", "code2lora.hypernetwork"
    code = f"import sys, code2lora.hooks; print([m for m in {heavy!r} if m in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"
