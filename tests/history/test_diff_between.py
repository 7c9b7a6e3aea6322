"""Diffs between any two commits: what git prints, the same from both backends, bounded alike."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from code2lora.errors import UserError
from code2lora.history import open_history
from code2lora.history.rules import FileRules
from tests.gitrepo import GitRepo
from tests.history.comparing import EVERYTHING, git_patches_between, patches
from tests.history.conftest import Open
from tests.history.walks import play


def test_any_two_commits_differ_as_git_says(repo: GitRepo) -> None:
    play(repo, random.Random(3), 14)
    commits = repo.git("rev-list", "--all").split()
    draw = random.Random(4)
    fast, slow = (open_history(repo.path, backend=name) for name in ("pygit2", "git"))

    for commit in commits:
        for base in (None, draw.choice(commits), draw.choice(commits)):
            diff = fast.diff_between(base, commit, EVERYTHING)
            assert patches(diff) == git_patches_between(repo, base, commit)
            assert (diff.commit, diff.parent) == (commit, base)
            for rules in (EVERYTHING, FileRules.named("paper"), FileRules.named("source")):
                assert fast.diff_between(base, commit, rules) == slow.diff_between(
                    base, commit, rules
                )
    fast.close()
    slow.close()


def test_a_first_parent_gives_the_commits_own_diff(repo: GitRepo, opened: Open) -> None:
    root = repo.commit({"a.py": "x = 1\n", "b.bin": b"\0"})
    child = repo.commit({"a.py": "x = 2\n", "b.bin": b"\0\1"})
    history = opened(repo.path)

    assert history.diff_between(root, child, EVERYTHING) == history.diff(child, EVERYTHING)
    assert history.diff_between(None, root, EVERYTHING) == history.diff(root, EVERYTHING)


def test_what_lies_between_is_folded_into_one_change(repo: GitRepo, opened: Open) -> None:
    start = repo.commit({"a.py": "x = 1\n", "b.py": "y = 1\n"})
    repo.commit({"a.py": "x = 2\n", "b.py": None, "c.py": "y = 1\n"})
    repo.commit({"a.py": "x = 1\n", "gone.py": "z = 1\n"})
    end = repo.commit({"gone.py": None})
    history = opened(repo.path)

    diff = history.diff_between(start, end, EVERYTHING)
    back = history.diff_between(end, start, EVERYTHING)

    assert [(c.status, c.old_path, c.path) for c in diff.changes] == [("R", "b.py", "c.py")]
    assert [(c.status, c.old_path, c.path) for c in back.changes] == [("R", "c.py", "b.py")]
    assert history.diff_between(end, end, EVERYTHING).changes == ()


def test_the_bounds_are_those_of_a_commits_diff(repo: GitRepo, opened: Open) -> None:
    start = repo.commit({"a.py": "x = 1\n"})
    repo.commit({"big.py": "x = 1\n" * 1000, "lfs.py": b"version https://git-lfs.github.com/spec/"})
    repo.commit({"bin.py": b"\0", "latin.py": b"# caf\xe9\n"})
    (repo.path / "link.py").symlink_to("a.py")
    end = repo.commit()
    history = opened(repo.path)

    diff = history.diff_between(start, end, replace(EVERYTHING, max_file_bytes=2000))

    assert [change.path for change in diff.changes] == ["latin.py"]
    assert "caf\N{REPLACEMENT CHARACTER}" in diff.changes[0].added
    assert [(skip.path, skip.reason) for skip in diff.skipped] == [
        ("big.py", "too large"),
        ("bin.py", "binary"),
        ("lfs.py", "lfs pointer"),
        ("link.py", "symlink"),
    ]


def test_a_base_that_is_not_there_is_a_users_error(
    repo: GitRepo, tmp_path: Path, opened: Open
) -> None:
    repo.commit({"a.py": "x = 1\n"})
    root = repo.head
    newest = repo.commit({"a.py": "x = 2\n"})
    clone = repo.clone(tmp_path / "clone", "--depth=1")
    history = opened(clone.path)

    with pytest.raises(UserError, match=f"commit {root} is missing"):
        history.diff_between(root, newest, EVERYTHING)
    with pytest.raises(UserError, match="is not a full commit hash"):
        history.diff_between("HEAD~1", newest, EVERYTHING)
