"""Our section of a repository's own git configuration."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from code2lora.errors import UserError
from code2lora.history import gitconfig
from code2lora.history.open import open_history
from tests.gitrepo import GitRepo
from tests.history.conftest import Open

A, B, C = ("a" * 40, "b" * 40, "c" * 64)


def test_an_id_is_made_once_and_only_when_asked(repo: GitRepo, opened: Open) -> None:
    history = opened(repo.path)
    before = (repo.path / ".git" / "config").read_bytes()
    assert gitconfig.repository_id(history) is None
    assert (repo.path / ".git" / "config").read_bytes() == before
    made = gitconfig.repository_id(history, create=True)
    assert made is not None and len(made) == 32
    assert gitconfig.repository_id(history, create=True) == made
    assert repo.git("config", "--local", "code2lora.id") == made


def test_worktrees_share_and_a_moved_folder_keeps(
    tmp_path: Path, repo: GitRepo, opened_any: Open
) -> None:
    repo.commit({"a.py": "1\n"})
    linked = repo.worktree(tmp_path / "linked", "side")
    made = gitconfig.repository_id(opened_any(linked.path), create=True)
    assert gitconfig.repository_id(opened_any(repo.path)) == made
    repo.path.rename(tmp_path / "moved")
    assert gitconfig.repository_id(opened_any(tmp_path / "moved")) == made


def test_an_id_that_is_no_id(repo: GitRepo, opened_any: Open) -> None:
    repo.git("config", "code2lora.id", "../../etc")
    with pytest.raises(UserError, match=r"is not 32 hex digits: '../../etc'"):
        gitconfig.repository_id(opened_any(repo.path), create=True)


def test_many_at_once_agree_on_one_id(repo: GitRepo) -> None:
    def make(_: int) -> str | None:
        history = open_history(repo.path)
        try:
            return gitconfig.repository_id(history, create=True)
        finally:
            history.close()

    with ThreadPoolExecutor(6) as pool:
        made = set(pool.map(make, range(6)))
    assert len(made) == 1


def test_anchors(repo: GitRepo, opened: Open) -> None:
    history = opened(repo.path)
    assert gitconfig.anchors(history) == ()
    gitconfig.add_anchor(history, A)
    gitconfig.add_anchor(history, C)
    gitconfig.add_anchor(history, A)
    assert gitconfig.anchors(history) == (A, C)


def test_anchors_are_full_hashes(repo: GitRepo, opened_any: Open) -> None:
    history = opened_any(repo.path)
    for wrong in ("HEAD", A[:12], ".*"):
        with pytest.raises(UserError, match="is not a full commit hash"):
            gitconfig.add_anchor(history, wrong)
    repo.git("config", "code2lora.anchor", "HEAD")
    with pytest.raises(UserError, match="is not a full commit hash: 'HEAD'"):
        gitconfig.anchors(history)


def test_the_user_s_own_configuration_is_not_the_repository_s(
    repo: GitRepo, hermetic_home: Path, opened_any: Open
) -> None:
    own = hermetic_home / "home" / ".gitconfig"
    own.write_text("[code2lora]\n\tmodel = global\n\tid = global\n")
    try:
        history = opened_any(repo.path)
        assert gitconfig.anchors(history) == ()
        assert gitconfig.repository_id(history) is None
    finally:
        own.unlink()


def test_forgetting_leaves_the_file_as_it_was(repo: GitRepo, opened_any: Open) -> None:
    config = repo.path / ".git" / "config"
    with config.open("a") as file:
        file.write("; the user's words\n[user]\n\tname = Me  # and so on\n")
    before = config.read_bytes()
    history = opened_any(repo.path)
    gitconfig.forget(history)
    assert config.read_bytes() == before
    gitconfig.repository_id(history, create=True)
    gitconfig.add_anchor(history, A)
    repo.git("config", "code2lora.model", "x")
    gitconfig.forget(history)
    assert config.read_bytes() == before
    assert gitconfig.anchors(history) == ()


def test_a_lock_that_is_released_is_waited_for(repo: GitRepo, opened_any: Open) -> None:
    lock = repo.path / ".git" / "config.lock"
    lock.touch()
    release = f"import time, os; time.sleep(0.3); os.unlink({str(lock)!r})"
    with subprocess.Popen([sys.executable, "-c", release]):
        assert gitconfig.repository_id(opened_any(repo.path), create=True) is not None


def test_a_lock_that_stays_is_named(
    repo: GitRepo, opened_any: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gitconfig, "_LOCK_TRIES", 2)
    (repo.path / ".git" / "config.lock").touch()
    with pytest.raises(UserError, match=r"cannot write .*config: could not lock") as told:
        gitconfig.add_anchor(opened_any(repo.path), A)
    assert told.value.hint is not None and "config.lock" in told.value.hint


def test_a_damaged_file_is_named(repo: GitRepo, opened_any: Open) -> None:
    history = opened_any(repo.path)
    with open(repo.path / ".git" / "config", "a") as file:
        file.write("[[[\n")
    with pytest.raises(UserError, match=r"git cannot read .*config: bad config line"):
        gitconfig.anchors(history)
