"""`log` and `show`: the history of the state, and one commit's part of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from code2lora.cli.render import short
from code2lora.settings import Settings
from code2lora.state_store import Store
from tests.cli.conftest import Known, Run
from tests.gitrepo import GitRepo

SPACES = re.compile(r" {2,}")


def columns(text: str) -> list[list[str]]:
    """Return the cells of a table without its ages, which go on while the test runs."""
    rows = [SPACES.split(line.strip()) for line in text.splitlines()]
    return [[row[0], *row[2:]] for row in rows]


def test_the_log_follows_first_parents(code2lora: Run, known: Known, here: Path) -> None:
    hashes = known.repo.git("rev-list", "--first-parent", "HEAD").split()
    known.score(hashes[1:2], base=0.25, generic=-0.125)

    done = code2lora("log")

    assert (done.status, done.err) == (0, "")
    assert columns(done.out) == [
        ["COMMIT", "STEP", "DRIFT", "GEN", "GAIN", "SUMMARY"],
        [short(hashes[0]), "-", "-", "-", "-", "(no state) not absorbed"],
        [short(hashes[1]), "2", "0.2500", "1", "+0.250", "(live) change 2"],
        [short(hashes[2]), "1", "0.1250", "-", "-", "change 1"],
        [short(hashes[3]), "0", "-", "-", "-", "(anchor) change 0"],
    ]


def test_the_log_is_as_long_as_asked(code2lora: Run, known: Known, here: Path) -> None:
    assert len(code2lora("log", "-n", "2").out.splitlines()) == 3


def test_the_log_before_any_state(
    code2lora: Run, home: Settings, store: Store, repo: GitRepo, here: Path
) -> None:
    Known(home, store, repo)
    done = code2lora("log")
    assert (done.status, done.out) == (0, "")
    assert done.err == "there is no commit yet: the first one makes the adapter\n"
    repo.commit({"a.py": "x = 1\n"}, "first")
    assert columns(code2lora("log").out)[1][1:] == [*["-"] * 4, "(no state) first"]


def test_the_log_as_json(code2lora: Run, known: Known, here: Path) -> None:
    known.score([known.repo.git("rev-parse", "HEAD~1")], base=0.25, generic=-0.125)
    entries = json.loads(code2lora("log", "--json").out)
    assert [entry["step"] for entry in entries] == [None, 2, 1, 0]
    assert [entry["is_live"] for entry in entries] == [False, True, False, False]
    assert [entry["is_anchor"] for entry in entries] == [False, False, False, True]
    figures = ("gain_over_base", "gain_over_generic", "n_scored_tokens")
    assert [entries[1][name] for name in figures] == [0.25, -0.125, 100]
    assert [entries[0][name] for name in figures] == [None, None, None]
    assert entries[1]["committed_at"] == "2023-11-14T22:22:20.000+00:00"
    assert json.loads(code2lora("log", "--json", "-n", "1").out)[0]["commit"] == known.repo.head


@pytest.fixture
def stepped(home: Settings, store: Store, repo: GitRepo) -> Known:
    """Steps at 0 and 3 of seven commits, provisional states at 4, which was HEAD, and at 6."""
    known = Known(home, store, repo)
    commits = [repo.commit({"a.py": f"x = {n}\n"}, f"change {n}") for n in range(7)]
    known.absorb(commits, between={1, 2, 5}, provisional={4, 6})
    known.publish(commits[-1])
    return known


def test_the_log_tells_steps_from_what_lies_between(
    code2lora: Run, stepped: Known, here: Path
) -> None:
    out = code2lora("log").out

    assert [(row[1], row[-1]) for row in columns(out)[1:]] == [
        ("6", "(live, provisional) change 6"),
        ("-", "(between steps) change 5"),
        ("4", "(provisional) change 4"),
        ("3", "change 3"),
        ("-", "(between steps) change 2"),
        ("-", "(between steps) change 1"),
        ("0", "(anchor) change 0"),
    ]
    entries = json.loads(code2lora("log", "--json").out)
    assert [entry["is_provisional"] for entry in entries] == [True, False, True, *[False] * 4]
    assert [n for n, entry in enumerate(entries) if entry["is_between_steps"]] == [1, 4, 5]


def test_what_is_newer_than_any_state_is_not_called_between_steps(
    code2lora: Run, stepped: Known, here: Path
) -> None:
    stepped.repo.commit({"a.py": "y = 1\n"}, "newer")
    shown = [row[-1] for row in columns(code2lora("log", "-n", "3").out)[1:]]
    assert shown == ["(no state) newer", "(live, provisional) change 6", "(between steps) change 5"]


def test_show_says_where_a_commit_between_steps_went(
    code2lora: Run, stepped: Known, here: Path
) -> None:
    step, head, between = stepped.repo.git("rev-parse", "HEAD~3", "HEAD", "HEAD~5").split()

    done = code2lora("show", "HEAD~5")
    assert (done.status, done.out) == (1, "")
    assert done.err == (
        f"error: commit {short(between)} is between steps: its change is in the state of "
        f"{short(step)}\nhint: `code2lora show {short(step)}`\n"
    )
    assert f"its change is in the state of {short(head)}\n" in code2lora("show", "HEAD~1").err
    out = code2lora("show", "HEAD").out
    assert f"  parent   {step}, the last step; this state is provisional\n" in out


def test_show_has_everything_of_a_commit(code2lora: Run, known: Known, here: Path) -> None:
    live = known.store.live_adapter(known.worktree.id)
    assert live is not None
    parent, anchor = known.repo.git("rev-parse", "HEAD~2", "HEAD~3").split()
    state = known.store.state_infos(known.repository_id, "c" * 64, [live.commit])[live.commit]

    done = code2lora("show", "HEAD~1")

    assert (done.status, done.err) == (0, "")
    assert done.out == (
        "change 2\n"
        f"  commit   {live.commit}\n"
        "  author   Ada Author\n"
        "  date     2023-11-14 22:22:20 UTC\n"
        f"  parent   {parent}\n"
        f"  step     2 after the active anchor {short(anchor)}\n"
        f"  state    sha256 {state.state_sha256}, 2.0 kB\n"
        "  drift    0.250000\n"
        "  read     2 files, 2,000 tokens\n"
        "  took     4 ms to read, 1 ms to advance\n"
        "  model    tiny, checkpoint cccccccccccc\n"
        f"  adapter  generation 1, 1.2 MB, {live.path}\n"
        "  live     yes\n"
    )


def test_show_of_a_thinned_state(code2lora: Run, known: Known, here: Path) -> None:
    known.thin(step=1)

    done = code2lora("show", "HEAD~2")

    assert (done.status, done.err) == (0, "")
    assert ", thinned: computed again when it is wanted\n" in done.out
    shown = json.loads(code2lora("show", "HEAD~2", "--json").out)
    assert shown["state_bytes"] is None
    assert json.loads(code2lora("show", "HEAD~1", "--json").out)["state_bytes"] == 2048


def test_show_of_the_anchor(code2lora: Run, known: Known, here: Path) -> None:
    out = code2lora("show", "HEAD~3").out
    assert "  parent  none: the state was read from the snapshot\n" in out
    assert "  drift   -\n" in out
    assert out.endswith("  live    no\n")


def test_show_of_a_commit_without_a_state(code2lora: Run, known: Known, here: Path) -> None:
    done = code2lora("show", "HEAD")
    assert (done.status, done.out) == (1, "")
    assert done.err == (
        f"error: no state is stored for commit {short(known.repo.head)}\n"
        "hint: `code2lora log` lists the commits that have one\n"
    )


def test_show_of_no_commit_at_all(code2lora: Run, known: Known, here: Path) -> None:
    done = code2lora("show", "nonsense")
    assert done.status == 1
    assert done.err.startswith(f"error: 'nonsense' names no commit of {here}\n")


def test_show_from_elsewhere_as_json(code2lora: Run, known: Known, repo: GitRepo) -> None:
    view = json.loads(code2lora("show", "HEAD~1", "--repo", repo.path, "--json").out)
    assert view["state"]["step"] == 2
    assert view["state_bytes"] == 2048
    assert view["checkpoint"] == {
        "fingerprint": "c" * 64,
        "name": "tiny",
        "base_model": "tiny-base",
    }
    assert [adapter["generation"] for adapter in view["adapters"]] == [1]
    assert view["is_live"] is True
