"""The hook managers themselves, fetched from their registries: `pytest -m slow tests/hooks`."""

from __future__ import annotations

import os
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

from code2lora.hooks import inspect, install, remove
from tests.gitrepo import GitRepo
from tests.hooks.conftest import Daemon, target_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("method")]

FETCH_TIMEOUT_S = 200
PRE_COMMIT_CONFIG = """\
repos:
- repo: local
  hooks:
  - id: hello
    name: hello from pre-commit
    entry: echo
    language: system
    always_run: true
    verbose: true
    stages: [post-commit]
"""
LEFTHOOK_CONFIG = "post-commit:\n  commands:\n    hello:\n      run: echo hello from lefthook\n"


def fetch(*command: str, folder: Path) -> None:
    """Run an installer; skip the test where it does not get through to its registry."""
    try:
        subprocess.run(
            command, cwd=folder, check=True, capture_output=True, timeout=FETCH_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"cannot fetch it: {error}")


@pytest.fixture(scope="module")
def pre_commit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pre-commit command in an environment of its own."""
    folder = tmp_path_factory.mktemp("pre-commit")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv/bin/python"
    fetch(str(python), "-m", "pip", "install", "--quiet", "pre-commit", folder=folder)
    return folder / "venv/bin/pre-commit"


@pytest.fixture(scope="module")
def node_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the commands `husky` and `lefthook`."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"private": true}')
    fetch("npm", "install", "--silent", "husky@9", "lefthook@2", folder=folder)
    return folder / "node_modules/.bin"


def call(repo: GitRepo, *command: str | Path) -> None:
    """Run a tool in the repository."""
    environment = repo.environment | {"CI": "false"}
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=repo.path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"


def commit(repo: GitRepo) -> bytes:
    """Commit something and return all that was printed."""
    done = repo.run("commit", "--allow-empty", "--message", "x")
    return done.stdout + done.stderr


def test_pre_commit(repo: GitRepo, daemon: Daemon, pre_commit: Path) -> None:
    repo.commit({".pre-commit-config.yaml": PRE_COMMIT_CONFIG})
    install(target_of(repo), daemon.spec)
    call(repo, pre_commit, "install", "--hook-type", "post-commit")  # moves ours aside
    assert install(target_of(repo), daemon.spec).complete

    said = commit(repo)
    pokes = daemon.take()
    remove(target_of(repo), daemon.spec)

    assert b"hello from pre-commit" in said
    assert set(pokes) == {"post-commit"}
    assert b"hello from pre-commit" in commit(repo)
    assert daemon.take() == []
    call(repo, pre_commit, "uninstall", "--hook-type", "post-commit")
    commit(repo)
    assert daemon.take() == []


def test_pre_commit_leaves_with_us_in_its_file(
    repo: GitRepo, daemon: Daemon, pre_commit: Path
) -> None:
    repo.commit({".pre-commit-config.yaml": PRE_COMMIT_CONFIG})
    call(repo, pre_commit, "install", "--hook-type", "post-commit")
    install(target_of(repo), daemon.spec)

    call(repo, pre_commit, "uninstall", "--hook-type", "post-commit")

    assert install(target_of(repo), daemon.spec).complete
    commit(repo)
    assert daemon.take() == ["post-commit"]


def test_lefthook(
    repo: GitRepo, daemon: Daemon, node_tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.commit({"lefthook.yml": LEFTHOOK_CONFIG})
    call(repo, node_tools / "lefthook", "install")
    monkeypatch.setenv("PATH", f"{node_tools}{os.pathsep}{os.environ['PATH']}")
    alone = commit(repo)

    assert install(target_of(repo), daemon.spec).complete
    together = commit(repo)
    pokes = daemon.take()
    remove(target_of(repo), daemon.spec)

    assert b"hello from lefthook" in alone
    assert b"hello from lefthook" in together
    assert pokes == ["post-commit"]
    assert b"hello from lefthook" in commit(repo)
    assert daemon.take() == []


def test_husky(repo: GitRepo, daemon: Daemon, node_tools: Path) -> None:
    repo.commit({".husky/post-commit": "echo hello from husky\n"})
    call(repo, node_tools / "husky")
    generated = repo.path / ".husky/_"
    before = {path: path.read_bytes() for path in generated.iterdir()}

    assert install(target_of(repo), daemon.spec).complete
    together = commit(repo)
    pokes = daemon.take()
    call(repo, node_tools / "husky")  # as every `npm install` does
    report = inspect(target_of(repo), daemon.spec)
    assert install(target_of(repo), daemon.spec).complete
    remove(target_of(repo), daemon.spec)

    assert b"hello from husky" in together
    assert pokes == ["post-commit"]
    assert {state.how for state in report.states} <= {"config", None}
    assert {path: path.read_bytes() for path in generated.iterdir()} == before
    assert b"hello from husky" in commit(repo)
    assert repo.git("status", "--porcelain") == ""
