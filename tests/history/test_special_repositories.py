"""Shallow, partial, bare, linked, nested and newer-format repositories, on both backends."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from code2lora.errors import UserError
from code2lora.history.model import Head, Skipped
from code2lora.history.open import open_history
from code2lora.history.rules import FileRules
from tests.gitrepo import GitRepo
from tests.history.comparing import git_patches, patches
from tests.history.conftest import Open

SOURCE = FileRules.named("source")


def commit_some(repo: GitRepo, n: int) -> list[str]:
    return [repo.commit({"a.py": f"x = {k}\n", f"{k}.py": f"{k}\n"}, f"c{k}") for k in range(n)]


def test_places_of_an_ordinary_repository(repo: GitRepo, opened: Open) -> None:
    repo.commit({"pkg/a.py": "1\n"})
    for place in (repo.path, repo.path / "pkg", repo.path / "pkg" / "a.py", repo.path / ".git"):
        history = opened(place)
        assert history.worktree == repo.path.resolve()
        assert history.git_dir == history.common_dir == repo.path.resolve() / ".git"


def test_symbolic_links_to_a_repository_are_resolved(repo: GitRepo, opened: Open) -> None:
    repo.commit({"a.py": "1\n"})
    link = repo.path.parent / "link"
    link.symlink_to(repo.path)
    assert opened(link).git_dir == opened(repo.path).git_dir


def test_bare_repository(tmp_path: Path, repo: GitRepo, opened: Open) -> None:
    commits = commit_some(repo, 2)
    bare = repo.clone(tmp_path / "bare.git", "--bare")
    history = opened(bare.path)
    assert history.worktree is None
    assert history.git_dir == history.common_dir == bare.path.resolve()
    assert history.head() == Head(commits[1], "main")
    assert history.diff(commits[1], SOURCE) == opened(repo.path).diff(commits[1], SOURCE)


def test_linked_worktree(tmp_path: Path, repo: GitRepo, opened: Open) -> None:
    commits = commit_some(repo, 2)
    linked = repo.worktree(tmp_path / "linked", "feature", commits[0])
    for place in (linked.path, repo.path / ".git" / "worktrees" / "linked"):
        history = opened(place)
        assert history.worktree == linked.path.resolve()
        assert history.git_dir == repo.path.resolve() / ".git" / "worktrees" / "linked"
        assert history.common_dir == repo.path.resolve() / ".git"
        assert history.head() == Head(commits[0], "feature")
    commit = linked.commit({"b.py": "2\n"})
    assert opened(linked.path).head() == Head(commit, "feature")
    assert opened(repo.path).head() == Head(commits[1], "main")
    assert opened(repo.path).diff(commit, SOURCE).parent == commits[0]


def test_submodule_checkout(tmp_path: Path, repo: GitRepo, opened: Open) -> None:
    inner = GitRepo(tmp_path / "inner")
    commit = inner.commit({"a.py": "1\n"})
    repo.git("-c", "protocol.file.allow=always", "submodule", "add", "-q", str(inner.path), "mod")
    for place in (repo.path / "mod", repo.path / ".git" / "modules" / "mod"):
        history = opened(place)
        assert history.worktree == repo.path.resolve() / "mod"
        assert history.git_dir == repo.path.resolve() / ".git" / "modules" / "mod"
        assert history.common_dir == history.git_dir
        assert history.head().commit == commit


def test_separate_git_directory(tmp_path: Path, opened: Open) -> None:
    apart = GitRepo(tmp_path / "work", options=[f"--separate-git-dir={tmp_path / 'store'}"])
    commit = apart.commit({"a.py": "1\n"})
    history = opened(apart.path)
    assert (history.worktree, history.git_dir) == (apart.path, tmp_path / "store")
    assert history.head().commit == commit
    assert opened(tmp_path / "store").worktree is None


def test_borrowed_objects(tmp_path: Path, repo: GitRepo, opened: Open) -> None:
    commits = commit_some(repo, 2)
    repo.git("repack", "-q", "-a", "-d")
    loose = repo.commit({"loose.py": "1\n"})
    borrower = repo.clone(tmp_path / "borrower", "--shared")
    twice = borrower.clone(tmp_path / "twice", "--shared")
    history = opened(twice.path)
    assert [commit.id for commit in history.first_parents(loose)] == [loose, *commits[::-1]]
    assert len(history.snapshot(loose, SOURCE).files) == 4


def test_shallow_clone(tmp_path: Path, repo: GitRepo, opened: Open) -> None:
    commits = commit_some(repo, 4)
    shallow = repo.clone(tmp_path / "shallow", "--depth=2")
    history = opened(shallow.path)
    assert [commit.id for commit in history.first_parents(commits[3])] == [commits[3], commits[2]]
    assert history.is_shallow_boundary(commits[2])
    assert not history.is_shallow_boundary(commits[3])
    assert history.commit(commits[2]).parents == ()
    boundary = history.diff(commits[2], SOURCE)
    assert (boundary.parent, boundary.changes, boundary.skipped) == (None, (), ())
    assert len(history.snapshot(commits[2], SOURCE).files) == 4
    assert patches(history.diff(commits[3], SOURCE)) == git_patches(repo, commits[3])
    with pytest.raises(UserError, match=f"commit {commits[1]} is missing from the repository"):
        history.commit(commits[1])
    shallow.git("fetch", "--quiet", "--unshallow")
    assert not history.is_shallow_boundary(commits[2])
    assert history.diff(commits[2], SOURCE).parent == commits[1]


def test_the_root_of_a_shallow_clone_that_reaches_it(
    tmp_path: Path, repo: GitRepo, opened: Open
) -> None:
    root = repo.commit({"a.py": "1\n"})
    shallow = repo.clone(tmp_path / "shallow", "--depth=1")
    (shallow.path / ".git" / "shallow").write_text(f"{root}\n")
    history = opened(shallow.path)
    assert not history.is_shallow_boundary(root)
    assert [change.path for change in history.diff(root, SOURCE).changes] == ["a.py"]


def partial_clone(tmp_path: Path, repo: GitRepo, filter: str) -> GitRepo:
    repo.git("config", "uploadpack.allowFilter", "true")
    clone = repo.clone(tmp_path / "partial", f"--filter={filter}", "--no-checkout")
    # Reading must not need the network, so there is none.
    repo.path.rename(tmp_path / "away")
    return clone


def test_partial_clone_without_blobs(tmp_path: Path, repo: GitRepo, opened: Open) -> None:
    commits = commit_some(repo, 3)
    clone = partial_clone(tmp_path, repo, "blob:none")
    history = opened(clone.path)
    assert [commit.id for commit in history.first_parents(commits[2])] == commits[::-1]
    diff = history.diff(commits[2], SOURCE)
    assert diff.changes == ()
    assert diff.skipped == (
        Skipped("2.py", "missing object"),
        Skipped("a.py", "missing object"),
    )
    snapshot = history.snapshot(commits[2], SOURCE)
    assert {skipped.reason for skipped in snapshot.skipped} == {"missing object"}
    clone.write({"2.py": "2\n"})
    clone.git("hash-object", "-w", "2.py")
    assert [change.path for change in history.diff(commits[2], SOURCE).changes] == ["2.py"]


def test_partial_clone_without_trees(tmp_path: Path, repo: GitRepo, opened: Open) -> None:
    commits = commit_some(repo, 3)
    clone = partial_clone(tmp_path, repo, "tree:0")
    history = opened(clone.path)
    assert len(list(history.first_parents(commits[2]))) == 3
    for ask in (history.diff, history.snapshot):
        with pytest.raises(UserError, match=r"tree \w{40} is missing from the repository") as told:
            ask(commits[2], SOURCE)
        assert told.value.hint is not None and "git fetch --refetch" in told.value.hint


@pytest.fixture(params=["sha256", "reftable"])
def newer(request: pytest.FixtureRequest, tmp_path: Path) -> GitRepo:
    option = {"sha256": "--object-format=sha256", "reftable": "--ref-format=reftable"}
    usage = subprocess.run(["git", "init", "-h"], capture_output=True, text=True, check=False)
    if option[request.param].partition("=")[0] not in usage.stdout:
        pytest.skip("this git does not know the format")
    return GitRepo(tmp_path / "newer", options=[option[request.param]])


def test_formats_that_libgit2_does_not_read(newer: GitRepo, opened_any: Open) -> None:
    history = opened_any(newer.path)
    assert history.backend == "git"
    assert history.head() == Head(None, "main")
    commits = commit_some(newer, 3)
    assert history.head() == Head(commits[2], "main")
    assert history.resolve("HEAD~1") == commits[1]
    assert [commit.id for commit in history.first_parents(commits[2])] == commits[::-1]
    for commit in commits:
        assert patches(history.diff(commit, SOURCE)) == git_patches(newer, commit)
    assert len(history.snapshot(commits[2], SOURCE).files) == 4
    newer.switch("side", create=True)
    assert history.head() == Head(commits[2], "side")
    with pytest.raises(UserError, match="libgit2 cannot read the repository"):
        open_history(newer.path, backend="pygit2")


def test_ordinary_repositories_are_read_in_process(repo: GitRepo, opened_any: Open) -> None:
    assert opened_any(repo.path).backend == "pygit2"


def test_an_open_history_sees_what_others_write(repo: GitRepo, opened: Open) -> None:
    history = opened(repo.path)
    ids = commit_some(repo, 3)
    assert len(history.snapshot(ids[0], SOURCE).files) == 2
    repo.git("gc", "--quiet", "--prune=now")
    assert len(history.snapshot(ids[2], SOURCE).files) == 4
    ids += [repo.commit({"late.py": "1\n"})]
    repo.git("repack", "-q", "-a", "-d", "-f")
    repo.git("pack-refs", "--all", "--prune")
    assert [commit.id for commit in history.first_parents(ids[3])] == ids[::-1]
    assert history.head().commit == ids[3]
    assert [change.path for change in history.diff(ids[3], SOURCE).changes] == ["late.py"]
