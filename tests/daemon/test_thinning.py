"""Large states of old commits are computed again when they are wanted, to the same bits."""

from __future__ import annotations

import logging
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from code2lora.daemon import pruning
from code2lora.daemon.looking import Look
from code2lora.daemon.reconciler import Reconciler
from code2lora.errors import UserError
from code2lora.hypernetwork.checkpoint import LoadedFamily, build_family
from code2lora.hypernetwork.lora import Lora
from code2lora.state_store.records import Adapter
from tests.daemon.conftest import fill
from tests.daemon.test_reconciler import OPERATIONS, Bench, operate, replayed
from tests.daemon.test_reconciler import model as gru
from tests.daemon.test_stream_states import model as assertions_model
from tests.daemon.test_stream_states import operate_on_tests
from tests.gitrepo import GitRepo
from tests.hypernetwork import test_encoder_gradients as gradients
from tests.hypernetwork import test_memory_family as memory

EVERY = 8

__all__ = ["assertions_model", "gru"]


@pytest.fixture(scope="module")
def model() -> LoadedFamily:
    """The smallest gradient memory; its states are a few hundred bytes."""
    torch.set_num_threads(1)
    config = memory.config()
    family = build_family(config, gradients.encoder()).eval().requires_grad_(False)
    return LoadedFamily(family, config, "f" * 64, "e" * 64)


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "LARGE_BYTES", 100)
    monkeypatch.setattr(pruning, "KEPT_EVERY", EVERY)


def settled(home: Path, repo: GitRepo, model: LoadedFamily, **changes: object) -> Bench:
    """Return a bench whose HEAD is absorbed, with all that led to it, and pruned."""
    bench = Bench(home, repo, model, **{"backfill_commits": 500, **changes})
    bench.refresh()
    bench.finish_backfill()
    thin(bench)
    return bench


def thin(bench: Bench) -> None:
    """Prune as the supervisor does every hour."""
    pruning.thin_repository(bench.store, bench.worktree.repository_id, bench.settings)


def kept(bench: Bench, commits: list[str]) -> set[int]:
    """Return which of the commits' states have their bytes, by number."""
    identity = bench.worktree.repository_id
    found = [bench.store.find_state(identity, bench.fingerprint, commit) for commit in commits]
    return {n for n, state in enumerate(found) if state is not None}


def all_thinned(bench: Bench) -> None:
    """Leave as little as there can be."""
    identity = bench.worktree.repository_id
    for anchor in bench.store.anchors_to_thin(identity, over_bytes=0):
        bench.store.thin_states(anchor, keep=1, every=10**6, over_bytes=0, limit=10**6)


def live(bench: Bench) -> Adapter:
    adapter = bench.store.live_adapter(bench.worktree.id)
    assert adapter is not None
    return adapter


def same(one: Lora, other: Lora) -> bool:
    return all(
        torch.equal(getattr(one, side)[target], getattr(other, side)[target])
        for side in "ab"
        for target in one.a
    )


def test_a_long_history_is_kept_in_few_states_and_nothing_is_lost(
    tmp_path: Path, repo: GitRepo, gru: LoadedFamily
) -> None:
    commits = fill(repo, 200)
    whole = settled(tmp_path / "whole", repo, gru, keep_states=1000)
    bench = settled(tmp_path / "one", repo, gru, keep_states=16)

    assert kept(whole, commits) == set(range(200))
    few = {*range(0, 200, EVERY), *range(183, 200)}
    assert kept(bench, commits) == few
    sizes = bench.store.sizes(bench.worktree.repository_id)
    assert (sizes.n_states, sizes.n_kept_states) == (200, len(few))
    identity = bench.worktree.repository_id
    infos = bench.store.lineage(identity, bench.fingerprint, commits[-1], limit=999)
    keys = {info.commit: info.diff_key or "" for info in infos}
    cached = bench.store.get_features("e" * 64, keys.values())
    with_bytes = {keys[commits[n]] for n in few - {0}}
    assert set(cached) == with_bytes

    for n in (199, 182, 101, 7, 0):
        assert bench.reconciler.state_at(identity, commits[n]).state == whole.state(commits[n])
        assert same(
            bench.reconciler.adapter_at(identity, commits[n]),
            whole.reconciler.adapter_at(identity, commits[n]),
        )
    assert kept(bench, commits) >= few | {*range(97, 102), *range(1, 8), *range(177, 183)}
    assert bench.state(commits[-1]) == whole.state(commits[-1])


def test_a_switch_to_a_thinned_commit_gives_the_same_adapter(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily, caplog: pytest.LogCaptureFixture
) -> None:
    fill(repo, 1)
    bench = Bench(tmp_path, repo, model, backfill_commits=0, keep_adapters=1, keep_states=2)
    adapters = {}
    commits = []
    for i in range(20):
        commits.append(repo.commit({"c.py": f"y = {i}\n"}))
        bench.refresh()
        adapters[commits[-1]] = live(bench)
    old = commits[12]
    thin(bench)
    assert 12 not in kept(bench, commits)

    repo.reset(old)
    assert bench.look() is Look.BEHIND
    assert bench.refresh() == 0

    assert bench.live_commit() == old
    assert live(bench).sha256 == adapters[old].sha256
    assert live(bench).state_id == adapters[old].state_id
    assert bench.look() is Look.CURRENT
    thin(bench)
    assert 12 in kept(bench, commits)  # the worktree stands on it
    assert caplog.messages == []


def test_a_switch_to_a_thinned_commit_whose_adapter_is_on_disk_computes_nothing(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    fill(repo, 1)
    bench = Bench(tmp_path, repo, model, backfill_commits=0, keep_adapters=9, keep_states=1)
    commits = []
    for i in range(6):
        commits.append(repo.commit({"c.py": f"y = {i}\n"}))
        bench.refresh()
    thin(bench)
    assert 2 not in kept(bench, commits)

    repo.reset(commits[2])
    assert bench.look() is Look.CURRENT
    bench.refresh()
    assert 2 not in kept(bench, commits)


def test_work_goes_on_from_a_thinned_commit(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = fill(repo, 30)
    bench = settled(tmp_path / "one", repo, model, keep_states=4)
    assert 13 not in kept(bench, commits)

    repo.git("checkout", "--quiet", "-b", "topic", commits[13])
    repo.commit({"topic.py": "def topic():\n    return 1\n"})
    assert bench.refresh() == 1
    assert bench.state(repo.head) == replayed(tmp_path / "branched", repo, model)
    encoded: list[int] = []
    read_diffs = model.family.read_diffs
    monkeypatch.setattr(
        model.family, "read_diffs", lambda diffs: encoded.append(len(diffs)) or read_diffs(diffs)
    )
    for i in range(3):  # what it was advanced from stays, so that only the patch is read
        repo.commit({"topic.py": f"def topic():\n    return {i + 2}\n"}, amend=True)
        assert bench.refresh() == 1
        thin(bench)
    assert sum(encoded) == 3
    monkeypatch.undo()
    assert bench.state(repo.head) == replayed(tmp_path / "amended", repo, model)
    assert bench.look() is Look.CURRENT


def test_an_interrupted_backfill_goes_on_from_what_is_kept(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    commits = fill(repo, 60)
    bench = Bench(tmp_path / "one", repo, model, backfill_commits=500, keep_states=1)
    bench.refresh()
    identity = bench.worktree.repository_id
    told = [bench.reconciler.backfill(identity, 0.0).absorbed]
    assert bench.store.sizes(identity).n_kept_states == 7  # of HEAD's anchor; 0, 8, ..., 31, 32
    all_thinned(bench)
    with sqlite3.connect(bench.settings.state_dir / "state.db") as db:  # as far as it can go
        db.execute("UPDATE states SET state = NULL WHERE step > 20")
    db.close()
    again = Reconciler(bench.settings, bench.store, "tiny", model)
    told.append(again.backfill(identity, 0.0).absorbed)
    bench.finish_backfill()

    assert told == [32, 32]  # from the anchor again
    assert kept(bench, commits) >= {59}
    whole = settled(tmp_path / "whole", repo, model, keep_states=1000)
    assert bench.state(commits[-1]) == whole.state(commits[-1])
    assert bench.reconciler.state_at(identity, commits[30]).state == whole.state(commits[30])


def thinned_at(bench: Bench, repo: GitRepo, commits: list[str], n: int) -> Adapter:
    """Thin all but what must stay, with the adapters gone, and go to a commit."""
    repo.reset(commits[-1])
    bench.refresh()
    all_thinned(bench)
    assert n not in kept(bench, commits)
    repo.reset(commits[n])
    bench.refresh()
    return live(bench)


def test_a_state_that_is_computed_otherwise_replaces_what_was_recorded(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily, caplog: pytest.LogCaptureFixture
) -> None:
    commits = fill(repo, 12)
    bench = settled(tmp_path, repo, model, keep_adapters=1, keep_states=1)
    identity = bench.worktree.repository_id
    infos = bench.store.state_infos(identity, bench.fingerprint, commits)
    with sqlite3.connect(bench.settings.state_dir / "state.db") as db:
        db.execute("UPDATE states SET state_sha256 = ? WHERE step = 5", ("0" * 64,))
    db.close()

    with caplog.at_level(logging.WARNING):
        adapter = thinned_at(bench, repo, commits, 5)

    assert (adapter.commit, adapter.state_id) == (commits[5], infos[commits[5]].id)
    assert bench.store.state_infos(identity, bench.fingerprint, commits) == infos
    (message,) = caplog.messages
    assert message.startswith(f"the state of commit {commits[5]} is now ")
    assert "but was 000000000000" in message


def test_a_thinned_commit_that_git_has_lost_is_refused_and_is_no_failure(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    commits = fill(repo, 20)
    bench = settled(tmp_path / "one", repo, model, keep_states=1)
    identity = bench.worktree.repository_id
    repo.reset(commits[2])
    repo.git("reflog", "expire", "--expire=now", "--all")
    repo.git("gc", "--quiet", "--prune=now")
    bench.refresh()
    assert 11 not in kept(bench, commits)

    with pytest.raises(UserError):
        bench.reconciler.adapter_at(identity, commits[11])
    with pytest.raises(UserError, match="no state is stored"):
        bench.reconciler.adapter_at(identity, "0" * 40)
    assert bench.store.failures(identity) == []
    repo.path.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="the repository is not where it was"):
        bench.reconciler.adapter_at(identity, commits[11])


def test_small_states_are_never_thinned(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "LARGE_BYTES", 64 * 1024)
    commits = fill(repo, 20)
    bench = settled(tmp_path, repo, model, keep_states=1)
    assert kept(bench, commits) == set(range(20))


@settings(
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking real histories takes minutes
    max_examples=5,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    operations=st.lists(
        st.sampled_from([*OPERATIONS, "new test", "new test", "edit", "delete"]),
        min_size=6,
        max_size=16,
    ),
    seed=st.integers(0, 2**32),
    backfill=st.sampled_from([0, 2, 50]),
    stream=st.sampled_from(["commits", "assertions"]),
)
def test_thinned_increments_equal_replay_on_random_histories(
    tmp_path_factory: pytest.TempPathFactory,
    model: LoadedFamily,
    assertions_model: LoadedFamily,
    operations: list[str],
    seed: int,
    backfill: int,
    stream: str,
) -> None:
    chosen = model if stream == "commits" else assertions_model
    root = tmp_path_factory.mktemp("random")
    draw = random.Random(seed)
    repo = GitRepo(root / "repo")
    fill(repo, 3)
    bench = Bench(root / "one", repo, chosen, backfill_commits=backfill, keep_states=1)
    bench.refresh()
    change: Callable[..., None] = operate if stream == "commits" else operate_on_tests
    for serial, operation in enumerate(operations):
        change(repo, operation, draw, serial)
        if draw.random() < 0.7:
            bench.refresh()
        if draw.random() < 0.3:
            all_thinned(bench)
        if draw.random() < 0.2:
            bench.finish_backfill()
    for _ in range(2):
        bench.refresh()
        all_thinned(bench)
        bench.finish_backfill()

    assert bench.live_commit() == repo.head
    state = bench.reconciler.state_at(bench.worktree.repository_id, repo.head).state
    assert state == replayed(root / "two", repo, chosen)
    with closing(bench.store):
        bench.store.check()
