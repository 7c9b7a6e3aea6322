"""States that advance only on some commits: steps are kept, a HEAD between them is provisional."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from code2lora.daemon import absorbing
from code2lora.daemon.looking import Look
from code2lora.history import open_history
from code2lora.history import stream as streams
from code2lora.history.gitconfig import anchors
from code2lora.history.rules import FileRules
from code2lora.hypernetwork.checkpoint import LoadedFamily, build_family
from code2lora.hypernetwork.config import Recipe
from code2lora.hypernetwork.state import pack
from code2lora.state_store.records import StateInfo
from tests.daemon.test_reconciler import OPERATIONS, Bench, operate, replayed
from tests.gitrepo import GitRepo
from tests.history.walks import brute_force, make_test
from tests.hypernetwork import tiny

RECIPE = Recipe(
    diff="lines",
    snapshot="lines",
    rules="paper",
    snapshot_rules="paper-snapshot",
    stream="assertions",
)


@pytest.fixture(scope="module")
def model() -> LoadedFamily:
    """The smallest model with the released head and stream."""
    config = tiny.checkpoint_config("paper")
    config = replace(config, encoder=replace(config.encoder, recipe=RECIPE))
    family = build_family(config, tiny.lines_encoder()).eval().requires_grad_(False)
    return LoadedFamily(family, config, "f" * 64, "e" * 64)


def expected(model: LoadedFamily, repo: GitRepo, head: str, *, anchor: str) -> bytes:
    """Return the state that the definition gives, from the steps that whole trees tell."""
    steps = [commit for commit, _ in brute_force(repo, head)]
    line = repo.git("rev-list", "--first-parent", "--reverse", head).split()
    family, rules = model.family, FileRules.named("paper")
    with closing(open_history(repo.path)) as history:

        def start(commit: str) -> dict[str, object]:
            snapshot = history.snapshot(commit, FileRules.named("paper-snapshot"))
            state = family.initial(family.read_snapshot(snapshot).features)
            return follow(state, None, commit) if commit == steps[0] else state

        def follow(state: dict[str, object], base: str | None, commit: str) -> dict[str, object]:
            diff = history.diff_between(base, commit, rules)
            return family.advance(state, family.read_diffs([diff])[0].features)

        steps = steps or [""]
        state, base = start(anchor), anchor
        for commit in line[line.index(anchor) + 1 :]:
            if commit in steps:
                state = start(commit) if commit == steps[0] else follow(state, base, commit)
                base = commit
        return pack(state if base == head else follow(state, base, head))


def lineage(bench: Bench, commit: str) -> list[StateInfo]:
    """Return the chain of states from a commit to its anchor."""
    return bench.store.lineage(bench.worktree.repository_id, bench.fingerprint, commit, limit=99)


def known(bench: Bench, commits: list[str]) -> list[int]:
    """Return which of the commits have a state, by number."""
    found = bench.store.known_commits(bench.worktree.repository_id, bench.fingerprint, commits)
    return [n for n, commit in enumerate(commits) if commit in found]


def grow(repo: GitRepo, kinds: str) -> list[str]:
    """Make a commit for each letter, `t` with a new assertion and `.` without; return them."""
    made = []
    for kind in kinds:
        serial = repo.now_s
        path = "tests/test_all.py" if kind == "t" else f"lib_{serial % 3}.py"
        text = make_test(serial) if kind == "t" else f"def made_{serial}():\n    return {serial}\n"
        made.append(repo.commit({path: text}))
    return made


def test_only_steps_and_the_head_have_states(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    commits = grow(repo, "..t..t..")
    bench = Bench(tmp_path / "one", repo, model, backfill_commits=50)
    assert bench.refresh() == 1
    assert known(bench, commits) == [7]
    bench.finish_backfill()

    assert known(bench, commits) == [0, 2, 5, 7]
    head, second, first, anchor = lineage(bench, commits[-1])
    assert [info.commit for info in (second, first, anchor)] == [commits[n] for n in (5, 2, 0)]
    assert [info.step for info in (head, second, first, anchor)] == [7, 5, 2, 0]
    assert [info.provisional for info in (head, second, first, anchor)] == [True, *[False] * 3]
    assert bench.live_commit() == commits[-1]
    assert bench.look() is Look.CURRENT
    assert bench.state(commits[-1]) == expected(model, repo, commits[-1], anchor=commits[0])
    assert bench.state(commits[-1]) == replayed(tmp_path / "two", repo, model)


def test_a_provisional_step_is_not_carried_on(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    commits = grow(repo, "t")
    bench = Bench(tmp_path / "one", repo, model)
    bench.refresh()
    for kind in "..t.":
        commits += grow(repo, kind)
        assert bench.refresh() == 1
        assert bench.live_commit() == commits[-1]

    assert known(bench, commits) == [0, 1, 2, 3, 4]
    assert [info.provisional for info in lineage(bench, commits[2])] == [True, False]
    assert [info.commit for info in lineage(bench, commits[4])] == [commits[n] for n in (4, 3, 0)]
    for n in (1, 2, 3, 4):
        assert bench.state(commits[n]) == expected(model, repo, commits[n], anchor=commits[0])


def test_a_history_from_its_beginning_opens_with_the_whole_first_tree(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    """The first step's state is the same whether the anchor is before it or on it."""
    commits = grow(repo, "..t.t")
    bench = Bench(tmp_path / "one", repo, model, backfill_commits=50)
    bench.refresh()
    bench.finish_backfill()
    repo.git("config", "--unset-all", "code2lora.anchor")
    repo.git("config", "code2lora.anchor", commits[2])
    other = Bench(tmp_path / "two", repo, model)
    other.refresh()

    assert [info.step for info in lineage(other, commits[-1])] == [2, 0]
    assert other.state(commits[2]) == bench.state(commits[2])
    assert other.state(commits[-1]) == bench.state(commits[-1])
    assert bench.state(commits[-1]) == expected(model, repo, commits[-1], anchor=commits[0])


def test_an_anchor_in_the_middle_stands_in_for_a_step(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    commits = grow(repo, "t.t...t.")
    bench = Bench(tmp_path / "one", repo, model, backfill_commits=4)
    bench.refresh()
    bench.finish_backfill()

    assert known(bench, commits) == [3, 6, 7]
    assert bench.state(commits[-1]) == expected(model, repo, commits[-1], anchor=commits[3])
    with closing(open_history(repo.path)) as history:
        assert anchors(history) == (commits[3],)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commits that were asked whether they change assertions, in that order."""
    asked: list[str] = []
    really: Callable[..., bool | None] = streams.changes_assertions

    def ask(history: object, commit: str, finder: object) -> bool | None:
        asked.append(commit)
        return really(history, commit, finder)

    monkeypatch.setattr(streams, "changes_assertions", ask)
    return asked


def test_a_poke_after_one_commit_looks_at_one_commit(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily, judged: list[str]
) -> None:
    grow(repo, "t....")
    bench = Bench(tmp_path, repo, model, backfill_commits=50)
    bench.refresh()
    bench.finish_backfill()
    for kind in "...t..tt.":
        judged.clear()
        newest = grow(repo, kind)
        bench.refresh()
        assert judged == newest
    judged.clear()
    bench.refresh()
    assert judged == []


def test_a_history_without_tests_is_one_step_over_everything(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    commits = grow(repo, "." * 10)
    bench = Bench(tmp_path / "one", repo, model, backfill_commits=8)
    bench.refresh()
    bench.finish_backfill()
    commits += grow(repo, ".")
    bench.refresh()

    assert known(bench, commits) == [1, 9, 10]
    assert [info.step for info in lineage(bench, repo.head)] == [9, 0]
    assert bench.state(repo.head) == expected(model, repo, repo.head, anchor=commits[1])


def test_backfill_goes_on_from_the_last_step_and_tells_how_far(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(absorbing, "CHUNK", 4)
    commits = grow(repo, "..." + "t." * 6 + "." * 5)
    bench = Bench(tmp_path / "one", repo, model, backfill_commits=500)
    bench.refresh()
    identity = bench.worktree.repository_id

    slices = [bench.reconciler.backfill(identity, 0.0)]
    progress = bench.store.backfill_progress(identity, bench.fingerprint)
    while not slices[-1].done:
        slices.append(bench.reconciler.backfill(identity, 0.0))

    assert [(done.done, done.absorbed, done.total) for done in slices] == [
        (False, 3 + 2 * 3, 19),
        (False, 3 + 2 * 5, 19),
        (True, 19, 19),
    ]
    assert progress is not None and progress.done_commits == 3 + 2 * 3
    bench.refresh()
    assert bench.state(repo.head) == expected(model, repo, repo.head, anchor=commits[0])


def test_a_refresh_that_was_cut_off_ends_in_the_same_state(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchor = grow(repo, "t")[0]
    bench = Bench(tmp_path / "one", repo, model)
    bench.refresh()
    grow(repo, "t." * 6)
    put_states, n_calls = bench.store.put_states, 0

    def put_one_chunk(*arguments: object) -> int:
        nonlocal n_calls
        n_calls += 1
        if n_calls > 1:
            raise KeyboardInterrupt
        return put_states(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(absorbing, "CHUNK", 4)
    monkeypatch.setattr(bench.store, "put_states", put_one_chunk)
    with pytest.raises(KeyboardInterrupt):
        bench.refresh()
    monkeypatch.undo()

    assert bench.refresh() == 12 - 2 * 4 + 1
    assert bench.state(repo.head) == expected(model, repo, repo.head, anchor=anchor)


def test_two_worktrees_have_a_provisional_state_each(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    anchor = grow(repo, "t")[0]
    bench = Bench(tmp_path / "one", repo, model)
    bench.refresh()
    grow(repo, "t.")
    bench.refresh()
    other = repo.worktree(tmp_path / "other", "topic", "HEAD~2")
    other.commit({"elsewhere.py": "x = 1\n"})
    beside = Bench(tmp_path / "one", other, model)
    beside.refresh()
    other.commit({"elsewhere.py": "x = 2\n"})
    beside.refresh()

    assert beside.live_commit() == other.head
    assert bench.live_commit() == repo.head
    for worktree, head in ((bench, repo.head), (beside, other.head)):
        assert worktree.state(head) == expected(model, repo, head, anchor=anchor)
        assert worktree.look() is Look.CURRENT
    other.git("checkout", "--quiet", "--detach", repo.head)
    assert beside.look() is Look.CURRENT
    assert beside.live_commit() == repo.head


def test_amend_and_rebase_chain_the_steps_anew(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    anchor = grow(repo, "t")[0]
    bench = Bench(tmp_path / "one", repo, model)
    bench.refresh()
    repo.switch("topic", create=True)
    repo.commit({"test_topic.py": make_test(1, name="topic")})
    bench.refresh()
    repo.commit({"test_topic.py": "x = 1\n"}, amend=True)  # a step no more
    bench.refresh()
    assert [info.provisional for info in lineage(bench, repo.head)] == [True, False]
    repo.commit({"test_topic.py": make_test(2, name="topic")}, amend=True)
    bench.refresh()
    assert [info.provisional for info in lineage(bench, repo.head)] == [False, False]
    repo.commit({"topic.py": "y = 1\n"})
    repo.switch("main")
    grow(repo, "t.")
    repo.switch("topic")
    repo.git("rebase", "--quiet", "main")
    bench.refresh()

    assert [info.provisional for info in lineage(bench, repo.head)] == [True, *[False] * 3]
    assert bench.state(repo.head) == expected(model, repo, repo.head, anchor=anchor)
    assert bench.state(repo.head) == replayed(tmp_path / "two", repo, model)


def operate_on_tests(repo: GitRepo, operation: str, draw: random.Random, serial: int) -> None:
    """Do one thing that developers do, now and then to tests; nothing conflicts."""
    tests = sorted((repo.path / "tests").glob("*.py"))
    name = f"tests/test_{serial}.py"
    if operation == "new test":
        repo.commit({name: make_test(serial, draw.randrange(99), name=f"made_{serial}")})
    elif operation == "move" and tests:
        moved = draw.choice(tests)
        repo.commit({f"tests/{moved.name}": None, name: moved.read_text()})
    elif operation == "edit" and tests:
        edited = draw.choice(tests)
        head = draw.choice(["import os\n\n\n", ""])
        repo.commit({f"tests/{edited.name}": head + edited.read_text()}, allow_empty=True)
    elif operation == "delete" and tests:
        repo.commit({f"tests/{draw.choice(tests).name}": None})
    else:
        operate(repo, operation, draw, serial)


@settings(
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking real histories takes minutes
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    operations=st.lists(
        st.sampled_from([*OPERATIONS, "new test", "new test", "move", "edit", "delete"]),
        min_size=4,
        max_size=14,
    ),
    seed=st.integers(0, 2**32),
    start=st.sampled_from(["...", "t..", "..t", "t.t"]),
    backfill=st.sampled_from([0, 2, 50]),
)
def test_increments_equal_replay_on_random_histories(
    tmp_path_factory: pytest.TempPathFactory,
    model: LoadedFamily,
    operations: list[str],
    seed: int,
    start: str,
    backfill: int,
) -> None:
    root = tmp_path_factory.mktemp("random")
    draw = random.Random(seed)
    repo = GitRepo(root / "repo")
    grow(repo, start)
    bench = Bench(root / "one", repo, model, backfill_commits=backfill)
    bench.refresh()
    for serial, operation in enumerate(operations):
        operate_on_tests(repo, operation, draw, serial)
        if draw.random() < 0.7:
            bench.refresh()
        if draw.random() < 0.2:
            bench.finish_backfill()
    for _ in range(2):
        bench.refresh()
        bench.finish_backfill()

    assert bench.live_commit() == repo.head
    assert bench.state(repo.head) == replayed(root / "two", repo, model)
    anchor = lineage(bench, repo.head)[-1].commit
    assert bench.state(repo.head) == expected(model, repo, repo.head, anchor=anchor)
