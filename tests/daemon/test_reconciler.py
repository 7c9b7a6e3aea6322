"""States by increments equal states by replay, on real histories of every kind."""

from __future__ import annotations

import os
import random
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from code2lora.daemon.looking import Look, look
from code2lora.daemon.reconciler import Reconciler
from code2lora.daemon.registration import deregister, register
from code2lora.errors import UserError
from code2lora.history import open_history
from code2lora.history.gitconfig import anchors
from code2lora.hypernetwork.checkpoint import LoadedFamily, build_family
from code2lora.settings import Settings
from code2lora.state_store import Store
from tests.daemon.conftest import fill, make_settings
from tests.gitrepo import GitRepo
from tests.hypernetwork import tiny


@pytest.fixture(scope="module")
def model() -> LoadedFamily:
    """The smallest model with every part."""
    config = tiny.checkpoint_config()
    family = build_family(config, tiny.lines_encoder()).eval().requires_grad_(False)
    return LoadedFamily(family, config, "f" * 64, "e" * 64)


class Bench:
    """One repository, one store, one reconciler, no processes."""

    def __init__(self, home: Path, repo: GitRepo, model: LoadedFamily, **changes: object) -> None:
        self.settings: Settings = make_settings(home, **changes)
        # Hooks find this process alive, so no commit starts a daemon.
        self.settings.pid_file.write_text(f"{os.getpid()}\n")
        self.repo = repo
        self.store = Store.open(self.settings.resolved_database_url)
        self.reconciler = Reconciler(self.settings, self.store, "tiny", model)
        self.fingerprint = model.fingerprint
        self.worktree = register(self.settings, self.store, repo.path).worktree

    def refresh(self) -> int:
        """Refresh, and return how many commits were absorbed."""
        return self.reconciler.refresh(self.worktree.id).absorbed

    def finish_backfill(self) -> None:
        """Replay older history to its end, in slices as small as they get."""
        while not self.reconciler.backfill(self.worktree.repository_id, 0.0).done:
            pass
        self.refresh()

    def state(self, commit: str) -> bytes:
        """Return a commit's packed state."""
        found = self.store.find_state(self.worktree.repository_id, self.fingerprint, commit)
        assert found is not None
        return found.state

    def live_commit(self) -> str | None:
        """Return the commit of the live adapter."""
        adapter = self.store.live_adapter(self.worktree.id)
        return adapter.commit if adapter else None

    def look(self) -> Look:
        """Look as the supervisor does."""
        return look(self.settings, self.store, self.worktree.id, self.fingerprint)


def replayed(home: Path, repo: GitRepo, model: LoadedFamily) -> bytes:
    """Return HEAD's state as a new database computes it from git alone."""
    bench = Bench(home, repo, model)
    bench.refresh()
    return bench.state(repo.head)


def test_the_first_refresh_anchors_at_head_and_backfill_takes_over(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    commits = fill(repo, 12)
    bench = Bench(tmp_path / "one", repo, model, backfill_commits=8)

    assert bench.refresh() == 1
    provisional = bench.state(commits[-1])
    assert bench.live_commit() == commits[-1]
    bench.finish_backfill()

    settled = bench.state(commits[-1])
    assert settled != provisional
    infos = bench.store.lineage(
        bench.worktree.repository_id, bench.fingerprint, commits[-1], limit=50
    )
    assert [info.commit for info in infos] == commits[:2:-1]
    assert [info.step for info in infos] == list(range(8, -1, -1))
    with closing(open_history(repo.path)) as history:
        assert anchors(history) == (commits[3],)
    live = bench.store.live_adapter(bench.worktree.id)
    assert live is not None and live.state_id == infos[0].id
    assert replayed(tmp_path / "two", repo, model) == settled


def test_a_commit_while_backfill_runs_is_served_and_then_settled(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    fill(repo, 40)
    bench = Bench(tmp_path / "one", repo, model, backfill_commits=36)
    bench.refresh()
    assert not bench.reconciler.backfill(bench.worktree.repository_id, 0.0).done
    newer = repo.commit({"new.py": "def new():\n    return 1\n"})

    assert bench.refresh() == 1
    assert bench.live_commit() == newer
    bench.finish_backfill()

    assert bench.state(newer) == replayed(tmp_path / "two", repo, model)
    assert bench.look() is Look.CURRENT


def test_head_goes_back_to_where_the_replay_began(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    commits = fill(repo, 6)
    bench = Bench(tmp_path / "one", repo, model, backfill_commits=4)
    bench.refresh()

    repo.reset(commits[1])
    bench.refresh()
    assert bench.live_commit() == commits[1]
    repo.reset(commits[-1])
    bench.refresh()

    assert bench.state(commits[-1]) == replayed(tmp_path / "two", repo, model)


def test_an_unchanged_patch_is_never_encoded_twice(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(repo, 2)
    bench = Bench(tmp_path / "one", repo, model, backfill_commits=0)
    bench.refresh()
    repo.switch("topic", create=True)
    for i in range(5):
        repo.commit({f"topic_{i}.py": f"value_{i} = {i}\n"})
    assert bench.refresh() == 5
    repo.switch("main")
    repo.commit({"elsewhere.py": "import os\n"})
    bench.refresh()
    repo.switch("topic")
    encoded: list[int] = []
    read_diffs = model.family.read_diffs
    monkeypatch.setattr(
        model.family, "read_diffs", lambda diffs: encoded.append(len(diffs)) or read_diffs(diffs)
    )

    repo.git("rebase", "--quiet", "main")

    assert bench.refresh() == 5
    assert sum(encoded) == 0
    assert bench.state(repo.head) == replayed(tmp_path / "two", repo, model)


def test_a_switch_to_a_known_commit_needs_no_model(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    first, second = fill(repo, 2)
    bench = Bench(tmp_path, repo, model, backfill_commits=0)
    repo.git("checkout", "--quiet", first)
    bench.refresh()
    repo.switch("main")
    bench.refresh()

    repo.git("checkout", "--quiet", first)
    assert bench.look() is Look.CURRENT
    assert bench.live_commit() == first
    repo.reset(second)
    assert bench.look() is Look.CURRENT
    assert bench.live_commit() == second


def test_a_pruned_adapter_comes_back_with_the_same_bytes(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    bench = Bench(tmp_path, repo, model, backfill_commits=0, keep_adapters=2)
    digests = {}
    fill(repo, 1)
    for i in range(5):
        commit = repo.commit({"c.py": f"y = {i}\n"})
        bench.refresh()
        live = bench.store.live_adapter(bench.worktree.id)
        assert live is not None
        digests[commit] = live.sha256
    kept = bench.store.adapters(bench.worktree.repository_id)
    assert len(kept) == 2
    folders = list((bench.settings.adapters_dir / bench.worktree.repository_id).iterdir())
    assert {str(folder) for folder in folders} == {adapter.path for adapter in kept}

    oldest = next(iter(digests))
    repo.reset(oldest)
    assert bench.look() is Look.BEHIND
    bench.refresh()

    live = bench.store.live_adapter(bench.worktree.id)
    assert live is not None and live.sha256 == digests[oldest]


def test_another_repository_at_the_same_place_is_refused(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    fill(repo, 1)
    bench = Bench(tmp_path / "one", repo, model)
    bench.refresh()
    repo.path.rename(tmp_path / "elsewhere")
    stranger = GitRepo(repo.path)
    stranger.commit({"s.py": "x = 1\n"})
    config = (repo.path / ".git" / "config").read_bytes()

    with pytest.raises(UserError, match="holds another repository"):
        bench.refresh()
    with pytest.raises(UserError, match="holds another repository"):
        bench.look()
    assert (repo.path / ".git" / "config").read_bytes() == config


def test_a_rewritten_and_collected_replay_is_planned_again(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    fill(repo, 6)
    bench = Bench(tmp_path / "one", repo, model, backfill_commits=4)
    bench.refresh()
    repo.commit({"amended.py": "y = 1\n"}, amend=True)
    repo.git("reflog", "expire", "--expire=now", "--all")
    repo.git("gc", "--quiet", "--prune=now")
    bench.refresh()

    with pytest.raises(UserError):
        bench.finish_backfill()
    bench.refresh()
    bench.finish_backfill()

    assert bench.state(repo.head) == replayed(tmp_path / "two", repo, model)
    roles = bench.store.active_anchors(bench.worktree.repository_id, bench.fingerprint)
    assert [anchor.role for anchor in roles] == ["active"]


def test_a_rebuilt_database_has_every_recorded_anchor(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    fill(repo, 2)
    bench = Bench(tmp_path / "one", repo, model, backfill_commits=0)
    bench.refresh()
    repo.switch("pages", orphan=True)
    repo.commit({"page_0.py": "title = 'x'\n"})
    bench.refresh()
    pages = repo.commit({"page_1.py": "title = 'y'\n"})
    bench.refresh()

    rebuilt = Bench(tmp_path / "two", repo, model, backfill_commits=0)
    repo.switch("main")
    rebuilt.refresh()
    repo.switch("pages")
    rebuilt.refresh()

    assert rebuilt.state(pages) == bench.state(pages)
    with closing(open_history(repo.path)) as history:
        assert len(anchors(history)) == 2


def test_an_adapter_that_cannot_be_pruned_does_not_fail_the_refresh(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    fill(repo, 1)
    bench = Bench(tmp_path / "one", repo, model, backfill_commits=0, keep_adapters=1)
    bench.refresh()
    moved = make_settings(tmp_path / "moved", backfill_commits=0, keep_adapters=1)
    settings = replace(bench.settings, data_dir=moved.data_dir)
    newer = repo.commit({"n.py": "x = 1\n"})

    Reconciler(settings, bench.store, "tiny", model).refresh(bench.worktree.id)

    assert bench.live_commit() == newer
    assert bench.store.failures(bench.worktree.repository_id) == []


def test_an_unborn_head_waits_for_the_first_commit(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    bench = Bench(tmp_path, repo, model)

    assert bench.look() is Look.UNBORN
    assert bench.refresh() == 0
    first = repo.commit({"a.py": "x = 1\n"})
    assert bench.refresh() == 1
    assert bench.live_commit() == first


def test_an_orphan_branch_gets_an_anchor_of_its_own(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    main = fill(repo, 3)
    bench = Bench(tmp_path, repo, model, backfill_commits=0)
    bench.refresh()
    repo.switch("pages", orphan=True)
    pages = repo.commit({"page.py": "title = 'x'\n"})

    assert bench.refresh() == 1
    with closing(open_history(repo.path)) as history:
        assert anchors(history) == (main[-1], pages)


def test_a_shallow_clone_starts_at_its_boundary(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    fill(repo, 9)
    clone = repo.clone(tmp_path / "clone", "--depth=4")
    bench = Bench(tmp_path / "one", clone, model)
    bench.refresh()
    bench.finish_backfill()

    lineage = bench.store.lineage(
        bench.worktree.repository_id, bench.fingerprint, clone.head, limit=50
    )
    assert len(lineage) == 4
    assert lineage[0].step == 3


def test_a_vanished_repository_is_a_recorded_failure(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    fill(repo, 1)
    bench = Bench(tmp_path / "one", repo, model)
    bench.refresh()
    repo.path.rename(tmp_path / "elsewhere")

    with pytest.raises(UserError, match=f"there is no {repo.path}"):
        bench.refresh()

    failure = bench.store.last_failure(bench.worktree.repository_id)
    assert failure is not None
    assert (failure.stage, failure.resolved_at) == ("refresh", None)
    assert failure.message == f"there is no {repo.path}"


def test_a_vanished_repository_can_be_let_go(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    fill(repo, 1)
    bench = Bench(tmp_path / "one", repo, model)
    bench.refresh()
    shutil.rmtree(repo.path)

    deregister(bench.settings, bench.store, repo.path)

    assert bench.store.repositories() == []
    assert list(bench.settings.adapters_dir.iterdir()) == []
    with pytest.raises(UserError, match=f"{repo.path} is not registered"):
        deregister(bench.settings, bench.store, repo.path)


def test_a_read_only_place_for_adapters_is_a_recorded_failure_and_heals(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    fill(repo, 1)
    bench = Bench(tmp_path, repo, model, backfill_commits=0)
    bench.settings.adapters_dir.rmdir()
    bench.settings.adapters_dir.write_text("in the way")

    with pytest.raises(UserError, match="cannot write an adapter"):
        bench.refresh()
    assert bench.store.failures(bench.worktree.repository_id)

    bench.settings.adapters_dir.unlink()
    bench.refresh()
    assert bench.store.failures(bench.worktree.repository_id) == []


def test_a_damaged_adapter_is_published_again(
    tmp_path: Path, repo: GitRepo, model: LoadedFamily
) -> None:
    fill(repo, 1)
    bench = Bench(tmp_path, repo, model, backfill_commits=0)
    bench.refresh()
    live = bench.store.live_adapter(bench.worktree.id)
    assert live is not None
    weights = Path(live.path) / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])

    assert bench.look() is Look.BEHIND
    bench.refresh()

    assert weights.read_bytes() == whole
    assert bench.look() is Look.CURRENT


OPERATIONS = ("commit", "commit", "commit", "amend", "branch", "merge", "rebase", "reset", "revert")


def operate(repo: GitRepo, operation: str, draw: random.Random, serial: int) -> None:
    """Do one thing that developers do; every file is its own, so nothing conflicts."""
    text = f"def made_{serial}(x):\n    return x * {draw.randrange(100)}\n"
    branches = repo.git("branch", "--format=%(refname:short)").splitlines()
    if operation == "amend":
        repo.commit({f"amended_{serial}.py": text}, amend=True)
    elif operation == "branch" and len(branches) < 4:
        repo.switch(f"branch-{serial}", create=True)
        repo.commit({f"branched_{serial}.py": text})
    elif operation == "merge":
        repo.switch(draw.choice(branches))
        repo.run("merge", "--quiet", "--no-ff", "--no-edit", draw.choice(branches), check=False)
    elif operation == "rebase":
        repo.run("rebase", "--quiet", draw.choice(branches), check=False)
        repo.run("rebase", "--abort", check=False)
    elif operation == "reset":
        history = repo.git("rev-list", "--first-parent", "--max-count=6", "HEAD").splitlines()
        repo.reset(draw.choice(history))
    elif operation == "revert":
        repo.run("revert", "--no-edit", "--mainline=1", "HEAD", check=False)
        repo.run("revert", "--abort", check=False)
    else:
        repo.commit({f"made_{serial}.py": text})


@settings(
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking real histories takes minutes
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    operations=st.lists(st.sampled_from(OPERATIONS), min_size=4, max_size=14),
    seed=st.integers(0, 2**32),
    backfill=st.sampled_from([0, 2, 50]),
)
def test_increments_equal_replay_on_random_histories(
    tmp_path_factory: pytest.TempPathFactory,
    model: LoadedFamily,
    operations: list[str],
    seed: int,
    backfill: int,
) -> None:
    root = tmp_path_factory.mktemp("random")
    draw = random.Random(seed)
    repo = GitRepo(root / "repo")
    fill(repo, 3)
    bench = Bench(root / "one", repo, model, backfill_commits=backfill)
    bench.refresh()
    for serial, operation in enumerate(operations):
        operate(repo, operation, draw, serial)
        if draw.random() < 0.7:
            bench.refresh()
        if draw.random() < 0.2:
            bench.finish_backfill()
    bench.refresh()
    bench.finish_backfill()
    bench.refresh()
    bench.finish_backfill()

    assert bench.live_commit() == repo.head
    assert bench.state(repo.head) == replayed(root / "two", repo, model)
