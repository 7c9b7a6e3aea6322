"""Commits are scored before they were told, once, behind everything else; the gate acts on it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from code2lora.adapters.load import load
from code2lora.daemon.added import added_rows
from code2lora.daemon.loading import Models
from code2lora.daemon.looking import Look, look
from code2lora.daemon.registration import register
from code2lora.daemon.scoring import Precedence, Scorer, Scoring
from code2lora.history import open_history
from code2lora.history.rules import FileRules
from code2lora.hypernetwork.state import unpack
from code2lora.serving.completion import AdapterIdentity
from code2lora.serving.scoring import Losses
from code2lora.state_store import Store
from code2lora.state_store.records import Adapter, NewScore, Score, Use
from tests.daemon.conftest import Installation, fill, make_settings
from tests.gitrepo import GitRepo

torch.set_num_threads(1)

SECONDS = 60.0


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    """The bundled model, loaded once for all tests here."""
    settings = make_settings(tmp_path_factory.mktemp("mini"))
    with Store.open(settings.resolved_database_url) as store:
        models = Models(settings, store)
        models.checkpoint()
        models.loaded_engine()
        yield models
        models.loaded_engine().close()


class Bench:
    """One repository with the bundled model, and no processes."""

    def __init__(self, home: Path, repo: GitRepo, mini: Models, **changes: object) -> None:
        self.settings = make_settings(home, **changes)
        # Hooks find this process alive, so no commit starts a daemon.
        self.settings.pid_file.write_text(f"{os.getpid()}\n")
        self.repo = repo
        self.store = Store.open(self.settings.resolved_database_url)
        self.models = Models(self.settings, self.store)
        # What costs seconds to load is the same for all.
        self.models.__dict__["_checkpoint"] = mini.checkpoint()
        self.models.__dict__["_engine"] = mini.loaded_engine()
        self.precedence = Precedence()
        self.scorer = Scorer(self.settings, self.store, self.models, self.precedence)
        self.fingerprint = mini.checkpoint().fingerprint
        self.worktree = register(self.settings, self.store, repo.path).worktree
        self.repository_id = self.worktree.repository_id

    def settle(self) -> None:
        """Refresh, replay older history to its end, and refresh again."""
        self.refresh()
        while not self.models.reconciler().backfill(self.repository_id, 60.0).done:
            pass
        self.refresh()

    def refresh(self) -> None:
        self.models.reconciler().refresh(self.worktree.id)

    def score(self, budget_s: float = SECONDS) -> Scoring:
        return self.scorer.score(self.worktree.id, budget_s)

    def scores(self, *commits: str) -> dict[str, Score]:
        wanted = commits or self.repo.git("rev-list", "--all").split()
        return self.store.scores(self.repository_id, self.fingerprint, wanted)

    def live(self) -> Adapter:
        adapter = self.store.live_adapter(self.worktree.id)
        assert adapter is not None
        return adapter

    def pretend(self, n: int, use: Use, **nats: float) -> None:
        """Store scores of commits that nobody made, the last of which leaves the gate at `use`."""
        for i in range(n):
            serial = time.monotonic_ns()
            new = NewScore(
                repository_id=self.repository_id,
                checkpoint=self.fingerprint,
                commit=f"{serial:040x}",
                told="0" * 40,
                state_sha256="0" * 64,
                rows_sha256=f"{serial:064x}",
                n_rows=1,
                n_tokens=100 + i,
                base_nats=nats.get("base", 3.0) * (100 + i),
                generic_nats=nats.get("generic", 3.0) * (100 + i),
                own_nats=nats.get("own", 3.0) * (100 + i),
                use=use,
                took_ms=1.0,
            )
            self.store.add_score(new)


@pytest.fixture
def bench(home: Path, repo: GitRepo, mini: Models) -> Iterator[Callable[..., Bench]]:
    """Makes the bench, once the test's repository has its first commits."""
    made: list[Bench] = []

    def make(**changes: object) -> Bench:
        made.append(Bench(home, repo, mini, **changes))
        return made[0]

    yield make
    for one in made:
        one.store.close()


def test_a_score_is_what_the_first_parents_adapter_makes_of_the_added_lines(
    bench: Callable[..., Bench], repo: GitRepo
) -> None:
    fill(repo, 4)
    made = bench()
    made.settle()
    parent = repo.head
    body = "def render(page):\n    return page.title + page.body\n"
    commit = repo.commit({"module_1.py": "x = 1\n\n\n" + body, "README.md": "# words\n" * 9})
    made.refresh()

    assert made.score().done

    found = made.scores(commit)[commit]
    with closing(open_history(repo.path)) as history:
        rows = added_rows(history, commit, FileRules.named("source"))
    assert (found.told, found.n_rows) == (parent, len(rows))
    state = made.store.find_state(made.repository_id, made.fingerprint, parent)
    assert state is not None and found.state_sha256 == state.info.state_sha256
    engine, family = made.models.loaded_engine(), made.models.checkpoint().family
    identity = AdapterIdentity(made.repository_id, parent, "told")
    own = engine.place(identity, family.adapter(unpack(state.state)))
    generic = engine.place(AdapterIdentity(None, None, "g"), family.generic())
    for nats, adapter in (
        (found.base_nats, None),
        (found.generic_nats, generic),
        (found.own_nats, own),
    ):
        alone = [engine.score(row.above, row.text, adapter) for row in rows]
        assert nats == pytest.approx(sum(score.nll for score in alone), rel=1e-4)
        assert found.n_tokens == sum(score.n_tokens for score in alone)
    after = made.store.find_state(made.repository_id, made.fingerprint, commit)
    assert after is not None and after.info.state_sha256 != found.state_sha256


def test_a_commit_is_scored_by_a_state_that_was_thinned(
    bench: Callable[..., Bench], repo: GitRepo
) -> None:
    fill(repo, 8)
    made = bench(score_commits=3)
    made.settle()
    told = repo.git("rev-list", "--reverse", "--max-count=3", "HEAD~1").split()
    before = {
        commit: state.info.state_sha256
        for commit in told
        if (state := made.store.find_state(made.repository_id, made.fingerprint, commit))
    }
    (anchor,) = made.store.anchors_to_thin(made.repository_id, over_bytes=0)
    made.store.thin_states(anchor, keep=1, every=10**6, over_bytes=0, limit=99)
    key = (made.repository_id, made.fingerprint)
    assert [made.store.find_state(*key, commit) is None for commit in told] == [True, True, False]

    assert made.score() == Scoring(done=True, scored=3, switched=False)

    found = made.scores()
    assert {score.told: score.state_sha256 for score in found.values()} == before


def test_the_newest_commits_are_scored_once_the_replay_is_over(
    bench: Callable[..., Bench], repo: GitRepo
) -> None:
    commits = fill(repo, 9)
    made = bench(score_commits=4)
    made.refresh()
    assert made.score() == Scoring(done=True, scored=0, switched=False)
    made.settle()

    assert made.score() == Scoring(done=True, scored=4, switched=False)
    first = made.scores()
    assert set(first) == set(commits[-4:])
    assert [s.commit for s in sorted(first.values(), key=lambda s: s.id)] == commits[-4:]
    assert made.score().scored == 0
    assert made.scores() == first


def test_a_history_is_scored_down_to_its_second_commit(
    bench: Callable[..., Bench], repo: GitRepo
) -> None:
    commits = fill(repo, 3)
    made = bench()
    made.settle()
    assert made.score().scored == 2
    assert set(made.scores()) == set(commits[1:])


def test_a_commit_without_lines_that_count_is_not_looked_at_twice(
    bench: Callable[..., Bench], repo: GitRepo
) -> None:
    fill(repo, 2)
    made = bench()
    made.settle()
    made.score()
    commit = repo.commit({"README.md": "# many words that nobody scores\n"})
    made.refresh()

    assert made.score().scored == 1
    found = made.scores(commit)[commit]
    assert (found.n_rows, found.n_tokens, found.own_nats) == (0, 0, 0.0)
    assert made.score().scored == 0
    recent = made.store.recent_scores(made.repository_id, made.fingerprint, limit=9)
    assert commit not in {score.commit for score in recent}


def test_scoring_can_be_turned_off(bench: Callable[..., Bench], repo: GitRepo) -> None:
    fill(repo, 3)
    made = bench(score_commits=0)
    made.settle()
    assert made.score() == Scoring(done=True, scored=0, switched=False)
    assert made.scores() == {}


def test_a_merge_is_scored_by_its_first_parent(bench: Callable[..., Bench], repo: GitRepo) -> None:
    fill(repo, 2)
    repo.switch("topic", create=True)
    repo.commit({"topic.py": "def of_the_topic(argument):\n    return argument\n"})
    repo.switch("main")
    parent = repo.commit({"main.py": "def of_the_line(argument):\n    return argument\n"})
    merge = repo.merge("topic")
    made = bench()
    made.settle()
    made.score()
    found = made.scores(merge)[merge]
    assert (found.told, found.n_rows) == (parent, 1)


def test_a_slice_ends_in_time_and_the_next_goes_on(
    bench: Callable[..., Bench], repo: GitRepo
) -> None:
    fill(repo, 6)
    made = bench()
    made.settle()
    slices = [made.score(0.0) for _ in range(5)]
    assert [(one.done, one.scored) for one in slices] == [(False, 1)] * 4 + [(True, 1)]


def test_everything_else_goes_first(bench: Callable[..., Bench], repo: GitRepo) -> None:
    fill(repo, 3)
    made = bench()
    made.settle()
    with made.precedence.first():
        assert made.score(0.1) == Scoring(done=False, scored=0, switched=False)
    assert made.scores() == {}, "a score that gave way left something"

    results: list[Scoring] = []
    thread = threading.Thread(target=lambda: results.append(made.score()))
    with made.precedence.first():
        thread.start()
        time.sleep(0.3)
        assert made.scores() == {}
    thread.join()
    assert results == [Scoring(done=True, scored=2, switched=False)]


def test_a_worker_that_is_to_end_gives_up_at_once(
    bench: Callable[..., Bench], repo: GitRepo
) -> None:
    fill(repo, 3)
    made = bench()
    made.settle()
    made.precedence.is_ending = lambda: True
    began_s = time.monotonic()
    with made.precedence.first():
        assert made.score(60.0) == Scoring(done=False, scored=0, switched=False)
    assert made.score(60.0) == Scoring(done=False, scored=0, switched=False)
    assert time.monotonic() - began_s < 30.0
    assert made.scores() == {}


def test_a_commit_that_git_cannot_read_is_passed_over(
    bench: Callable[..., Bench], repo: GitRepo
) -> None:
    commits = fill(repo, 4)
    made = bench()
    made.settle()
    tree = repo.git("rev-parse", f"{commits[2]}^{{tree}}")
    (repo.path / ".git" / "objects" / tree[:2] / tree[2:]).unlink()

    assert made.score().done
    assert set(made.scores(*commits)) == {commits[1]}, "commits 2 and 3 are compared by a lost tree"
    assert made.score().scored == 0


def test_a_model_that_gives_no_numbers_leaves_no_score(
    bench: Callable[..., Bench], repo: GitRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(repo, 3)
    made = bench()
    made.settle()
    broken = Losses(7, (1.0, float("nan"), 1.0))
    with monkeypatch.context() as patch:
        patch.setattr("code2lora.daemon.scoring.score_rows", lambda *_, **__: broken)
        assert made.score().done
    assert made.scores() == {}
    assert made.score().scored == 0, "it was tried again"


def test_lost_scores_are_computed_again_to_the_same(
    bench: Callable[..., Bench], repo: GitRepo
) -> None:
    fill(repo, 4)
    made = bench()
    made.settle()
    made.score()
    before = made.scores()
    with made.store._writing() as db:
        db.exec_driver_sql("DELETE FROM scores")
    made.score()
    after = made.scores()
    assert set(after) == set(before)
    for commit, score in after.items():
        same = replace(
            before[commit],
            id=score.id,
            scored_at=score.scored_at,
            took_ms=score.took_ms,
            **{f"{use}_nats": getattr(score, f"{use}_nats") for use in ("base", "generic", "own")},
        )
        assert score == same
        assert score.own_nats == pytest.approx(before[commit].own_nats, rel=1e-5)


# -- the gate -------------------------------------------------------------------------------


def as_the_supervisor_looks(made: Bench) -> Look:
    return look(made.settings, made.store, made.worktree.id, made.fingerprint)


def test_the_gate_publishes_the_generic_adapter_as_a_generation_like_any_other(
    bench: Callable[..., Bench], repo: GitRepo
) -> None:
    fill(repo, 3)
    made = bench()
    made.settle()
    own = made.live()
    # The next score tips the scales: its own part is small beside these.
    made.pretend(12, "own", base=4.0, generic=3.0, own=3.5)

    assert made.score().switched
    assert as_the_supervisor_looks(made) is Look.BEHIND
    made.refresh()

    live = made.live()
    assert (live.use, live.commit, live.state_id) == ("generic", own.commit, own.state_id)
    assert live.generation > own.generation and live.path != own.path
    lora, metadata = load(Path(live.path))
    generic = made.models.checkpoint().family.generic()
    assert metadata.use == "generic"
    for target, b in generic.b.items():
        torch.testing.assert_close(
            lora.b[target].float(), b.bfloat16().float().expand_as(lora.b[target])
        )
    assert as_the_supervisor_looks(made) is Look.CURRENT

    fresh = repo.commit({"later.py": "def written_later(argument):\n    return argument\n"})
    made.refresh()
    assert (made.live().use, made.live().commit) == ("generic", fresh)
    assert made.score().scored == 1, "the own adapter is scored while another serves"


def test_the_gate_gives_the_own_adapter_back(bench: Callable[..., Bench], repo: GitRepo) -> None:
    fill(repo, 3)
    made = bench()
    made.settle()
    own = made.live()
    made.pretend(12, "generic", base=4.0, generic=3.0, own=3.5)
    made.refresh()
    assert made.live().use == "generic"
    made.pretend(60, "own", base=4.0, generic=3.5, own=3.0)

    assert as_the_supervisor_looks(made) is Look.CURRENT, "it is on disk still: no model is needed"
    assert made.live() == own


def test_where_neither_adapter_helps_one_that_adds_nothing_serves(
    bench: Callable[..., Bench], repo: GitRepo
) -> None:
    fill(repo, 3)
    made = bench()
    made.settle()
    made.pretend(12, "base")
    made.refresh()

    live = made.live()
    assert live.use == "base"
    engine = made.models.loaded_engine()
    asked = ("def function_1(x):\n", "    return x + 1\n")
    silent = engine.score(*asked, engine.adapter(Path(live.path)))
    assert silent.nll == pytest.approx(engine.score(*asked).nll, rel=1e-5)


def test_with_the_gate_off_the_own_adapter_serves_in_any_case(
    bench: Callable[..., Bench], repo: GitRepo
) -> None:
    fill(repo, 3)
    made = bench(gate="off")
    made.settle()
    made.pretend(12, "generic", base=4.0, generic=3.0, own=3.5)
    assert as_the_supervisor_looks(made) is Look.CURRENT
    made.refresh()
    assert made.live().use == "own"
    assert not made.score().switched


# -- with real processes --------------------------------------------------------------------


def scores_of(installation: Installation, repository_id: str, commits: list[str]) -> set[str]:
    found: set[str] = set()
    for checkpoint in installation.store.checkpoints():
        found |= set(installation.store.scores(repository_id, checkpoint.fingerprint, commits))
    return found


def test_the_daemon_scores_what_it_absorbs_and_what_a_kill_left(
    installation: Installation, repo: GitRepo
) -> None:
    commits = fill(repo, 5)
    worktree = installation.register(repo)
    pid = installation.start()
    repository_id = worktree.repository_id
    installation.wait(
        lambda: scores_of(installation, repository_id, commits) == set(commits[1:]),
        "the commits before `init` are not scored",
    )
    before = installation.store.recent_scores(
        repository_id, installation.store.checkpoints()[0].fingerprint, limit=99
    )

    fresh = repo.commit({"fresh.py": "def fresh_and_new(argument):\n    return argument\n"})
    installation.wait_live(worktree, fresh)
    os.kill(pid, 9)  # before it is scored: scoring leaves a pause after a refresh
    installation.wait(lambda: installation.worker() is None, "the worker outlived it")
    assert scores_of(installation, repository_id, [fresh]) == set()
    installation.start()

    installation.wait(
        lambda: bool(scores_of(installation, repository_id, [fresh])), "the commit is not scored"
    )
    after = installation.store.recent_scores(
        repository_id, installation.store.checkpoints()[0].fingerprint, limit=99
    )
    assert [score.commit for score in after] == [fresh, *(score.commit for score in before)]
    assert after[1:] == before, "something was scored twice"
