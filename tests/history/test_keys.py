"""Content keys: equal exactly when what an encoder reads is equal."""

from __future__ import annotations

from dataclasses import replace

from code2lora.history.keys import lines_key, unified_key
from code2lora.history.model import Diff, FileChange
from code2lora.history.rules import FileRules
from tests.gitrepo import GitRepo
from tests.history.conftest import Open

SOURCE = FileRules.named("source")
CHANGE = FileChange("a.py", None, "M", "x\n", "y\n", "patch\n")


def diff_of(*changes: FileChange) -> Diff:
    return Diff("c" * 40, "p" * 40, changes, ())


def test_an_amended_message_and_a_rebase_keep_both_keys(repo: GitRepo, opened: Open) -> None:
    base = repo.commit({"a.py": "1\n", "b.py": "1\n"})
    first = repo.commit({"a.py": "2\n"})
    amended = repo.commit(message="better words", amend=True)
    repo.switch("side", create=True)
    repo.reset(base)
    repo.commit({"b.py": "2\n"})
    repo.git("cherry-pick", amended)
    history = opened(repo.path)
    diffs = [history.diff(commit, SOURCE) for commit in (first, amended, repo.head)]
    assert len({diff.commit for diff in diffs}) == 3
    assert len({lines_key(diff) for diff in diffs}) == 1
    assert len({unified_key(diff) for diff in diffs}) == 1


def test_the_same_lines_elsewhere_keep_the_key_of_the_lines(repo: GitRepo, opened: Open) -> None:
    body = "".join(f"{n}\n" for n in range(50))
    repo.commit({"a.py": body})
    first = repo.commit({"a.py": body.replace("25\n", "25\nnew\n")})
    repo.reset("HEAD~1")
    repo.commit({"a.py": "0\n" * 30 + body})
    second = repo.commit({"a.py": "0\n" * 30 + body.replace("25\n", "25\nnew\n")})
    history = opened(repo.path)
    diffs = [history.diff(commit, SOURCE) for commit in (first, second)]
    assert lines_key(diffs[0]) == lines_key(diffs[1])
    assert unified_key(diffs[0]) != unified_key(diffs[1])


def test_every_field_counts() -> None:
    variants = [
        diff_of(CHANGE),
        diff_of(),
        diff_of(CHANGE, CHANGE),
        diff_of(replace(CHANGE, path="b.py")),
        diff_of(replace(CHANGE, old_path="b.py")),
        diff_of(replace(CHANGE, status="R")),
        diff_of(replace(CHANGE, added="x\ny\n", removed="")),
        diff_of(replace(CHANGE, added="", removed="x\ny\n")),
        diff_of(replace(CHANGE, path="a.pyM", status="")),
    ]
    assert len({lines_key(diff) for diff in variants}) == len(variants)
    assert lines_key(diff_of(replace(CHANGE, patch="other"))) == lines_key(diff_of(CHANGE))
    assert unified_key(diff_of(replace(CHANGE, patch="other"))) != unified_key(diff_of(CHANGE))


def test_keys_are_stable() -> None:
    """Keys are stored: a change here makes every stored feature useless."""
    diff = diff_of(CHANGE)
    lines = "877fee8375dc1dbba170dcf6fc3ffdeb9db9e2cd63c6d96daf187a7e26c6ad2a"
    unified = "4cda3cba7827b42c72c2034c9c505c86937b1b543a9da875191420a72969b6c0"
    assert (lines_key(diff), unified_key(diff)) == (lines, unified)
