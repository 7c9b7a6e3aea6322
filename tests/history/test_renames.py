"""Renames: paired as git pairs them, within bounds."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from code2lora.history import renames
from code2lora.history.rules import FileRules
from tests.gitrepo import GitRepo
from tests.history.comparing import EVERYTHING, git_patches, patches
from tests.history.conftest import Open

SOURCE = FileRules.named("source")


def body(seed: int, n_lines: int = 60) -> list[str]:
    rng = random.Random(seed)
    return [f"{rng.randrange(10 ** rng.randrange(2, 12))}\n" for _ in range(n_lines)]


def edited(lines: list[str], n_changed: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    lines = list(lines)
    for at in rng.sample(range(len(lines)), n_changed):
        lines[at] = f"changed {rng.random()}\n"
    return "".join(lines)


@pytest.mark.parametrize("n_changed", [0, 5, 15, 25, 35, 50])
def test_similarity_is_that_of_git(repo: GitRepo, opened: Open, n_changed: int) -> None:
    lines = body(n_changed)
    repo.commit({"old.py": "".join(lines)})
    commit = repo.commit({"old.py": None, "new.py": edited(lines, n_changed)})
    diff = opened(repo.path).diff(commit, EVERYTHING)
    assert patches(diff) == git_patches(repo, commit)
    if n_changed in (0, 50):
        assert "".join(change.status for change in diff.changes) == ("AD" if n_changed else "R")


def test_a_moved_package(repo: GitRepo, opened: Open) -> None:
    bodies = {f"m{n}.py": body(n) for n in range(12)}
    same = {"a/__init__.py": "", "a/x/__init__.py": ""}
    repo.commit({f"a/{name}": "".join(lines) for name, lines in bodies.items()} | same)
    moved = {f"b/c/{name}": edited(lines, 9) for name, lines in bodies.items()}
    gone = dict.fromkeys([*(f"a/{name}" for name in bodies), *same])
    commit = repo.commit({**gone, **moved, "b/c/__init__.py": "", "b/c/x/__init__.py": ""})
    diff = opened(repo.path).diff(commit, EVERYTHING)
    assert patches(diff) == git_patches(repo, commit)
    assert {change.status for change in diff.changes} == {"R"}
    assert diff.changes[1].old_path == "a/m0.py"


def test_renamed_and_moved_at_once(repo: GitRepo, opened: Open) -> None:
    bodies = [body(n) for n in range(6)]
    repo.commit({f"old{n}.py": "".join(lines) for n, lines in enumerate(bodies)})
    gone = {f"old{n}.py": None for n in range(6)}
    new = {f"new{5 - n}.py": edited(lines, 5 * n) for n, lines in enumerate(bodies)}
    commit = repo.commit(gone | new)
    diff = opened(repo.path).diff(commit, EVERYTHING)
    assert patches(diff) == git_patches(repo, commit)
    assert ("new3.py", "old2.py") in [(change.path, change.old_path) for change in diff.changes]


def test_an_unchanged_original_is_no_source(repo: GitRepo, opened: Open) -> None:
    repo.commit({"a.py": "".join(body(1))})
    commit = repo.commit({"b.py": "".join(body(1))})
    (change,) = opened(repo.path).diff(commit, SOURCE).changes
    assert (change.status, change.old_path) == ("A", None)


def test_mode_and_name_change_at_once(repo: GitRepo, opened: Open) -> None:
    lines = body(1)
    repo.commit({"a.py": "".join(lines)})
    repo.write({"a.py": None, "b.py": edited(lines, 3)})
    (repo.path / "b.py").chmod(0o755)
    commit = repo.commit()
    diff = opened(repo.path).diff(commit, SOURCE)
    assert patches(diff) == git_patches(repo, commit)
    assert diff.changes[0].status == "R"


def test_moves_across_the_border_of_what_counts(repo: GitRepo, opened: Open) -> None:
    repo.commit({"in.py": "".join(body(1)), "vendor/out.py": "".join(body(2))})
    gone = {"in.py": None, "vendor/out.py": None}
    commit = repo.commit({**gone, "vendor/in.py": "".join(body(1)), "out.py": edited(body(2), 4)})
    diff = opened(repo.path).diff(commit, SOURCE)
    (change,) = diff.changes
    assert (change.path, change.old_path, change.status) == ("out.py", "vendor/out.py", "R")
    assert [(s.path, s.reason) for s in diff.skipped] == [("vendor/in.py", "vendored")]


def test_too_many_pairs_are_not_compared(
    repo: GitRepo, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = [body(n) for n in range(4)]
    repo.commit({f"old{n}.py": "".join(lines) for n, lines in enumerate(bodies)})
    new = {f"new{n}.py": edited(lines, 3) for n, lines in enumerate(bodies)}
    commit = repo.commit({f"old{n}.py": None for n in range(4)} | new)
    history = opened(repo.path)
    assert {change.status for change in history.diff(commit, SOURCE).changes} == {"R"}
    for bound, value in {"MAX_PAIRS": 15, "MAX_COMPARED_BYTES": 1_000}.items():
        with monkeypatch.context() as patch:
            patch.setattr(renames, bound, value)
            assert {c.status for c in history.diff(commit, SOURCE).changes} == {"A", "D"}
    stingy = replace(SOURCE, max_read_bytes=500)
    assert "R" not in {change.status for change in history.diff(commit, stingy).changes}
