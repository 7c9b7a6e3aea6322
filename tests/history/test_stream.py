"""Which commits are steps, on real repositories, against a walk that compares whole trees."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from code2lora.errors import UserError
from code2lora.history import open_history
from code2lora.history import stream as streams
from code2lora.history.assertions import AssertionFinder, is_test_path
from code2lora.history.model import Commit, History
from code2lora.history.stream import Step, stream_named
from tests.gitrepo import GitRepo
from tests.history.conftest import Open
from tests.history.walks import brute_force, make_test, play

ASSERTIONS = stream_named("assertions")


def line_of(history: History, head: str) -> list[Commit]:
    """Return the first parents up to `head`, oldest first."""
    return list(history.first_parents(head))[::-1]


def walked(history: History, head: str) -> list[tuple[str, str | None]]:
    """Return the steps of the whole line up to `head`: (commit, base)."""
    steps = ASSERTIONS.steps(history, None, line_of(history, head), begun=False)
    return [(step.commit.id, step.base) for step in steps]


def test_every_commit_is_a_step_by_default(repo: GitRepo, opened: Open) -> None:
    commits = [repo.commit({"a.py": f"x = {i}\n"}) for i in range(3)]
    history = opened(repo.path)
    line = line_of(history, commits[-1])

    steps = list(stream_named("commits").steps(history, commits[0], line[1:], begun=False))

    assert steps == [Step(line[1], commits[0]), Step(line[2], commits[1])]
    assert not any(stream_named("commits").opens(history, commit) for commit in line)


def test_an_unknown_stream_is_named() -> None:
    with pytest.raises(UserError) as caught:
        stream_named("days")
    assert caught.value.message == "there is no stream 'days'; known are assertions, commits"


def test_only_new_assertions_make_a_step(repo: GitRepo, opened: Open) -> None:
    start = repo.commit({"lib.py": "def total(x):\n    return x + 1\n"})
    first = repo.commit({"tests/test_a.py": make_test(1, 2)})
    repo.commit({"lib.py": "def total(x):\n    return 1 + x\n"})
    repo.commit({"tests/test_a.py": make_test(1, 2, head="import os\n\n\n")})  # moved down
    repo.commit({"tests/test_a.py": make_test(2, head="import os\n\n\n")})  # one removed
    modified = repo.commit({"tests/test_a.py": make_test(3)})
    repo.commit({"tests/test_b.py": make_test(3, name="moved"), "tests/test_a.py": None})
    repo.commit({"notes.md": "assert total(5) == 6\n", "lib_checks.py": make_test(7)})
    repo.commit({"tests/test_c.py": "def test_broken(:\n    assert total(8) == 9\n"})
    mended = repo.commit({"tests/test_c.py": make_test(8)})
    repo.git("mv", "tests/test_c.py", "tests/test_d.py")
    repo.commit()
    repo.commit({"tests/test_d.py": None})
    again = repo.commit({"tests/test_d.py": make_test(8)})
    last = repo.commit({"lib.py": "total = int\n"})
    history = opened(repo.path)

    steps = walked(history, last)

    assert steps == [
        (first, None),
        (modified, first),
        (mended, modified),
        (again, mended),
    ]
    assert steps == brute_force(repo, last)
    assert not ASSERTIONS.opens(history, history.commit(start))
    assert ASSERTIONS.opens(history, history.commit(first))
    assert not ASSERTIONS.opens(history, history.commit(modified))


def test_a_merge_counts_with_all_that_it_brings(repo: GitRepo, opened: Open) -> None:
    root = repo.commit({"test_a.py": make_test(1)})
    repo.switch("side", create=True)
    side = repo.commit({"test_b.py": make_test(2)})
    repo.commit({"lib.py": "x = 1\n"})
    repo.switch("main")
    repo.commit({"lib2.py": "y = 1\n"})
    merge = repo.merge("side")
    repo.switch("docs", create=True)
    repo.commit({"README.md": "words\n"})
    repo.switch("main")
    repo.merge("docs")
    history = opened(repo.path)

    assert walked(history, repo.head) == [(root, None), (merge, root)]
    assert walked(history, side) == [(root, None), (side, root)]
    assert walked(history, repo.head) == brute_force(repo, repo.head)


def test_steps_go_on_from_anywhere(repo: GitRepo, opened: Open) -> None:
    commits = [
        repo.commit({"test_a.py": make_test(i)} if i % 3 == 1 else {"a.py": f"x = {i}\n"})
        for i in range(9)
    ]
    history = opened(repo.path)
    line = line_of(history, commits[-1])

    def after(n: int, *, begun: bool) -> list[tuple[int, int | None]]:
        found = ASSERTIONS.steps(history, commits[n], line[n + 1 :], begun=begun)
        index = {commit: i for i, commit in enumerate(commits)}
        return [(index[s.commit.id], None if s.base is None else index[s.base]) for s in found]

    assert after(0, begun=False) == [(1, None), (4, 1), (7, 4)]
    assert after(1, begun=False) == after(1, begun=True) == [(4, 1), (7, 4)]
    assert after(2, begun=False) == [(4, 2), (7, 4)]  # an anchor stands in for a step
    assert after(6, begun=True) == [(7, 6)]
    assert after(7, begun=True) == []


def test_a_shallow_clone_cannot_tell_what_is_first(
    repo: GitRepo, tmp_path: Path, opened: Open
) -> None:
    repo.commit({"test_a.py": make_test(1)})
    for i in range(3):
        repo.commit({"a.py": f"x = {i}\n"})
    newest = repo.commit({"test_a.py": make_test(2)})
    clone = repo.clone(tmp_path / "clone", "--depth=3")
    history = opened(clone.path)
    line = line_of(history, newest)

    assert len(line) == 3
    assert not ASSERTIONS.opens(history, line[-1])
    assert walked(history, newest) == [(newest, None)]  # begun where this line begins
    (step,) = ASSERTIONS.steps(history, line[0].id, line[1:], begun=False)
    assert (step.commit.id, step.base) == (newest, line[0].id)


def test_missing_blobs_are_no_reason_to_start_afresh(
    repo: GitRepo, tmp_path: Path, opened: Open
) -> None:
    repo.commit({"test_a.py": make_test(1)})
    repo.commit({"test_a.py": "x = 1\n"})
    newest = repo.commit({"test_a.py": make_test(2)})
    repo.git("config", "uploadpack.allowFilter", "true")
    clone = repo.clone(tmp_path / "clone", "--filter=blob:none")
    history = opened(clone.path)
    line = line_of(history, newest)
    clone.git("cat-file", "blob", "HEAD~1:test_a.py")  # git fetches it; that of HEAD~2 it does not
    assert streams.changes_assertions(history, line[0].id, AssertionFinder()) is None

    (step,) = ASSERTIONS.steps(history, line[1].id, line[2:], begun=False)

    assert (step.commit.id, step.base) == (newest, line[1].id)


def test_only_commits_that_touch_tests_are_parsed_and_their_files_once(
    repo: GitRepo, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []

    class Finder(streams.AssertionFinder):
        def parse(self, text: str) -> streams.ParsedFile:
            parsed.append(text)
            return super().parse(text)

    monkeypatch.setattr(streams, "AssertionFinder", Finder)
    anchor = repo.commit({"test_a.py": make_test(1)})
    for i in range(5):
        repo.commit({"a.py": f"x = {i}\n", "docs/test.md": f"assert {i}\n"})
    repo.commit({"test_a.py": make_test(1, 2)})
    head = repo.commit({"a.py": "y = 1\n"})
    history = opened(repo.path)

    list(ASSERTIONS.steps(history, anchor, line_of(history, head)[1:], begun=True))

    assert parsed == [make_test(1), make_test(1, 2)]


@pytest.mark.parametrize("seed", range(3))
def test_random_histories_walk_as_whole_trees_tell(repo: GitRepo, opened: Open, seed: int) -> None:
    draw = random.Random(seed)
    play(repo, draw, 25)

    assert walked(opened(repo.path), repo.head) == brute_force(repo, repo.head)


def test_both_backends_see_the_same_files(repo: GitRepo) -> None:
    play(repo, random.Random(7), 12)
    fast, slow = (open_history(repo.path, backend=name) for name in ("pygit2", "git"))
    for commit in repo.git("rev-list", "--all").split():
        ours = fast.changed_files(commit, streams.TEST_RULES, is_test_path)
        assert ours == slow.changed_files(commit, streams.TEST_RULES, is_test_path)
        for file in ours.files:
            for side, revision in ((file.before, f"{commit}^"), (file.after, commit)):
                if side is not None:
                    shown = repo.run("show", f"{revision}:{side.path}").stdout
                    assert side.text.encode() == shown
                    assert side.blob == repo.git("rev-parse", f"{revision}:{side.path}")
    fast.close()
    slow.close()
