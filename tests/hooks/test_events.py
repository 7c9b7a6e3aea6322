"""Real git commands: which lines arrive, and what the user notices (nothing)."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from code2lora.hooks import EVENTS, inspect, install, remove
from tests.gitrepo import GitRepo
from tests.hooks.conftest import Daemon, make_daemon, target_of, write_hook

PATCH = b"""From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: Ada Author <ada@example.com>
Date: Tue, 14 Nov 2023 22:13:20 +0000
Subject: [PATCH] patched

---
diff --git a/n.py b/n.py
new file mode 100644
--- /dev/null
+++ b/n.py
@@ -0,0 +1 @@
+n = 1
"""


@pytest.fixture
def hooked(repo: GitRepo, daemon: Daemon, method: str) -> GitRepo:
    """A repository with a commit on `main`, one more on `side`, and our hooks."""
    repo.commit({"a.py": "a = 1\n"}, "first")
    repo.switch("side", create=True)
    repo.commit({"b.py": "b = 1\n"}, "second")
    repo.switch("main")
    report = install(target_of(repo), daemon.spec)
    assert report.complete and report.changed
    assert {state.how for state in report.states} == {method}
    return repo


def _commit(repo: GitRepo) -> None:
    repo.commit({"c.py": "c = 1\n"})


def _commit_without_verifying(repo: GitRepo) -> None:
    repo.git("commit", "--quiet", "--no-verify", "--allow-empty", "--message", "x")


def _amend(repo: GitRepo) -> None:
    repo.commit({"c.py": "c = 1\n"}, amend=True)


def _merge(repo: GitRepo) -> None:
    repo.merge("side")


def _fast_forward(repo: GitRepo) -> None:
    repo.git("merge", "--quiet", "--ff-only", "side")


def _cherry_pick(repo: GitRepo) -> None:
    repo.git("cherry-pick", "--no-ff", "side")


def _revert(repo: GitRepo) -> None:
    repo.git("revert", "--no-edit", "HEAD")


def _checkout(repo: GitRepo) -> None:
    repo.git("checkout", "--quiet", "side")


def _rebase(repo: GitRepo) -> None:
    repo.git("rebase", "--quiet", "--no-ff", "--onto", "main", "main", "side")


def _rebase_by_patches(repo: GitRepo) -> None:
    repo.git("rebase", "--quiet", "--apply", "--no-ff", "main", "side")


def _am(repo: GitRepo) -> None:
    patch = repo.run("format-patch", "--stdout", "main..side").stdout
    repo.git("am", "--quiet", data=patch)


def _pull(repo: GitRepo) -> None:
    repo.git("pull", "--quiet", "--ff-only", ".", "side")


@pytest.mark.parametrize(
    ("act", "events"),
    [
        (_commit, ["post-commit"]),
        (_commit_without_verifying, ["post-commit"]),
        (_amend, ["post-commit", "post-rewrite"]),
        (_merge, ["post-merge"]),
        (_fast_forward, ["post-merge"]),
        (_pull, ["post-merge"]),
        (_cherry_pick, ["post-commit"]),
        (_revert, ["post-commit"]),
        (_checkout, ["post-checkout"]),
        (_rebase, ["post-checkout", "post-commit", "post-rewrite"]),
        (_rebase_by_patches, ["post-checkout", "post-applypatch", "post-rewrite"]),
        (_am, ["post-applypatch"]),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_each_event_is_one_line(
    hooked: GitRepo, daemon: Daemon, act: Callable[[GitRepo], None], events: list[str]
) -> None:
    act(hooked)

    assert {tuple(fields[1:]) for fields in daemon.lines} == {(str(hooked.path), "")}
    assert daemon.take() == events


def test_after_removal_no_line_comes(hooked: GitRepo, daemon: Daemon) -> None:
    report = remove(target_of(hooked), daemon.spec)

    _commit(hooked)
    _amend(hooked)
    _merge(hooked)

    assert report.removed == EVENTS
    assert report.left == ()
    assert daemon.lines == []
    assert {s.status for s in inspect(target_of(hooked), daemon.spec).states} == {"missing"}


def test_worktrees_share_the_hooks_and_tell_their_git_dir(
    hooked: GitRepo, daemon: Daemon, tmp_path: Path
) -> None:
    linked = hooked.worktree(tmp_path / "linked", "third")
    assert inspect(target_of(linked), daemon.spec).complete
    daemon.take()

    linked.commit({"c.py": "c = 1\n"})
    lines = daemon.lines
    daemon.take()
    removed = remove(target_of(linked), daemon.spec)
    _commit(hooked)

    git_dir = hooked.path / ".git/worktrees/linked"
    assert lines == [["post-commit", str(linked.path), str(git_dir)]]
    assert removed.removed == EVENTS
    assert daemon.lines == []


def test_installed_from_a_linked_worktree(
    repo: GitRepo, daemon: Daemon, tmp_path: Path, method: str
) -> None:
    repo.commit({"a.py": ""})
    linked = repo.worktree(tmp_path / "linked", "third")

    report = install(target_of(linked), daemon.spec)
    _commit(repo)
    linked.commit({"b.py": ""})

    assert report.complete
    assert [fields[1] for fields in daemon.lines] == [str(repo.path), str(linked.path)]


def test_worktrees_of_a_bare_repository(daemon: Daemon, tmp_path: Path, method: str) -> None:
    source = GitRepo(tmp_path / "source")
    source.commit({"a.py": ""})
    bare = source.clone(tmp_path / "bare.git", "--bare")
    inside = bare.worktree(tmp_path / "bare.git/work", "third")

    reports = [install(target_of(bare), daemon.spec), install(target_of(inside), daemon.spec)]
    inside.commit({"b.py": ""})

    assert [(report.complete, report.changed) for report in reports] == [
        (True, True),
        (True, False),
    ]
    assert daemon.take() == ["post-commit"]


def test_submodule(daemon: Daemon, tmp_path: Path, method: str) -> None:
    inner = GitRepo(tmp_path / "inner")
    inner.commit({"a.py": ""})
    outer = GitRepo(tmp_path / "outer")
    outer.git("submodule", "--quiet", "add", inner.path.as_uri(), "sub")
    sub = GitRepo(outer.path / "sub", init=False)

    report = install(target_of(sub), daemon.spec)
    sub.commit({"b.py": ""})

    assert report.complete
    git_dir = outer.path / ".git/modules/sub"
    assert daemon.lines == [["post-commit", str(sub.path), str(git_dir)]]


@pytest.mark.parametrize("name", ["with space", "it's", 'a "b" $c `d`', "two\nlines", "naïve-日本"])
def test_awkward_places(name: str, tmp_path: Path, method: str) -> None:
    daemon = make_daemon(tmp_path / name / "state")
    repo = GitRepo(tmp_path / name / "repo")

    report = install(target_of(repo), daemon.spec)
    repo.commit({"a.py": ""})

    assert report.complete
    assert (daemon.spec.inbox / "pokes").read_text() == f"post-commit\t{repo.path}\t\n"
    assert inspect(target_of(repo), daemon.spec).complete
    assert remove(target_of(repo), daemon.spec).removed == EVENTS


@pytest.mark.parametrize("shell", ["/bin/sh -eu", "/usr/bin/env bash"])
def test_users_hooks_run_as_before(
    repo: GitRepo, daemon: Daemon, method: str, shell: str, tmp_path: Path
) -> None:
    """The user's script has the same input and arguments, and git the same output and status."""
    for event in EVENTS:
        text = f'#!{shell}\necho {event} $# "$(cat | wc -c)"\necho oops >&2\nexit 3\n'
        write_hook(repo, event, text)
    seen = [_session(repo, tmp_path / "before")]
    report = install(target_of(repo), daemon.spec)
    seen.append(_session(repo, tmp_path / "during"))
    arrived = set(daemon.take())
    for trouble in (daemon.die, daemon.spec.inbox.rmdir):
        trouble()
        seen.append(_session(repo, tmp_path / f"trouble{len(seen)}"))
        for name in ("pokes", "starts", "start.log"):
            (daemon.spec.inbox / name).unlink(missing_ok=True)
    remove(target_of(repo), daemon.spec)
    seen.append(_session(repo, tmp_path / "after"))

    assert report.complete
    assert arrived == set(EVENTS)
    assert b"post-rewrite 1 82" in seen[0][1][1]  # the fixture does see what hooks are given
    assert seen[0][2][0] != 0  # and git passes on the status of post-checkout
    assert all(outcome == seen[0] for outcome in seen)


def _session(repo: GitRepo, folder: Path) -> list[tuple[int, bytes]]:
    """Do the same work in a fresh copy of the repository; return each step's status and output."""
    subprocess.run(["cp", "-a", str(repo.path), str(folder)], check=True)
    work = GitRepo(folder, init=False)
    work.write({"a.py": "a = 1\n"})
    work.git("add", "--all")
    steps = [
        ("commit", "--message", "first"),
        ("commit", "--amend", "--message", "again"),
        ("checkout", "-b", "side"),
        ("commit", "--allow-empty", "--message", "second"),
        ("checkout", "main"),
        ("merge", "side"),
    ]
    done = [work.run(*step, check=False) for step in steps]
    done.append(work.run("am", data=PATCH, check=False))
    return [(process.returncode, process.stdout + process.stderr) for process in done]


def test_a_script_that_ends_at_once_does_not_hide_ours(
    repo: GitRepo, daemon: Daemon, method: str
) -> None:
    write_hook(repo, "post-commit", "#!/bin/sh\nexec true\n")

    install(target_of(repo), daemon.spec)
    repo.commit({"a.py": ""})

    assert daemon.take() == ["post-commit"]
