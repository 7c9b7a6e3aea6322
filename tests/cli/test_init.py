"""`init` and `refresh`: they wait for what the daemon does; a stand-in in a thread does it here."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from code2lora.cli import waiting
from code2lora.daemon.control import supervisor_lock
from code2lora.daemon.inbox import drain
from code2lora.hooks import EVENTS
from code2lora.settings import Settings
from code2lora.state_store import Store
from tests.cli.conftest import CHECKPOINT, Known, Run
from tests.gitrepo import GitRepo

Work = Callable[[Store], None]


@pytest.fixture(autouse=True)
def daemon_that_runs(home: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hold the daemon's lock, so that nobody starts a real one."""
    home.prepare()
    with supervisor_lock(home):
        yield


@contextmanager
def stand_in(settings: Settings, work: Work) -> Iterator[None]:
    """Do `work` once, after the first poke, as the daemon would."""

    def wait_and_work() -> None:
        while not ended.is_set():
            if drain(settings.inbox):
                with Store.open(settings.resolved_database_url) as store:
                    work(store)
                return
            time.sleep(0.01)

    ended = threading.Event()
    thread = threading.Thread(target=wait_and_work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def publisher(settings: Settings, repo: GitRepo, *, backfill: int = 0) -> Work:
    """Return work that absorbs and publishes HEAD of the one registered repository."""

    def work(store: Store) -> None:
        made = Known(settings, store, repo)
        anchor = made.absorb([repo.head])
        if backfill:
            store.add_anchor(
                made.repository_id,
                CHECKPOINT,
                "f" * 40,
                "backfill",
                target_commit=repo.head,
                total_commits=backfill,
            )
        # Last, since `init` looks for the rest once the adapter is there.
        adapter = made.publish(repo.head)
        assert adapter.commit == anchor.commit

    return work


def test_the_first_adapter(code2lora: Run, home: Settings, repo: GitRepo) -> None:
    head = repo.commit({"a.py": "x = 1\n"})

    with stand_in(home, publisher(home, repo, backfill=200)):
        done = code2lora("init", repo.path)

    assert done.status == 0
    label, commit, path_label, adapter = done.out.split()
    assert (label, commit, path_label) == ("commit", head, "adapter")
    assert Path(adapter).is_dir()
    assert re.sub(r"after \S+ m?s", "after N", done.err) == (
        f"registered: {repo.path}\n"
        "5 of 5 hooks installed\n"
        "adapter published after N\n"
        "200 older commits are replayed in the background: `code2lora status` shows how far\n"
        "every commit refreshes the adapter from now on\n"
        "next: `code2lora complete FILE:LINE --compare`, `code2lora status`\n"
    )


def test_once_more_is_harmless(code2lora: Run, home: Settings, repo: GitRepo) -> None:
    repo.commit({"a.py": "x = 1\n"})
    with stand_in(home, publisher(home, repo)):
        first = json.loads(code2lora("init", repo.path, "--json").out)
    done = code2lora("init", repo.path, "--json")
    second = json.loads(done.out)
    assert done.err.startswith(f"registered before: {repo.path}\n")
    assert (first["is_new"], second["is_new"]) == (True, False)
    assert (first["adapter"], first["commit"]) == (second["adapter"], repo.head)
    assert first["backfill_commits"] == 0
    assert [hook["event"] for hook in first["hooks"]] == list(EVENTS)


def test_a_failure_is_told(code2lora: Run, home: Settings, repo: GitRepo) -> None:
    repo.commit({"a.py": "x = 1\n"})

    def fail(store: Store) -> None:
        (worktree,) = store.worktrees()
        store.record_failure(
            worktree.repository_id,
            "model",
            "the checkpoint is damaged",
            hint="fetch it again",
            worktree_id=worktree.id,
        )

    with stand_in(home, fail):
        done = code2lora("init", repo.path)

    assert (done.status, done.out) == (1, "")
    assert done.err.endswith("error: the checkpoint is damaged\nhint: fetch it again\n")


def test_an_old_failure_is_not_ours(
    code2lora: Run, home: Settings, store: Store, repo: GitRepo
) -> None:
    repo.commit({"a.py": "x = 1\n"})
    known = Known(home, store, repo)
    known.store.record_failure(known.repository_id, "model", "long ago")
    with stand_in(home, publisher(home, repo)):
        assert code2lora("init", repo.path).status == 0


def test_the_time_is_up(code2lora: Run, repo: GitRepo) -> None:
    repo.commit({"a.py": "x = 1\n"})
    done = code2lora("init", repo.path, "--timeout", "0.2")
    assert (done.status, done.out) == (1, "")
    assert done.err.endswith(
        "error: no adapter for HEAD after 200 ms; the model worker has not started\n"
        "hint: the daemon goes on: `code2lora status` shows how far, "
        "`code2lora daemon logs` why\n"
    )


def test_a_daemon_that_ends_is_noticed(
    code2lora: Run, repo: GitRepo, home: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.commit({"a.py": "x = 1\n"})
    monkeypatch.setattr(waiting, "ensure_daemon", lambda settings: False)
    monkeypatch.setenv("CODE2LORA_STATE_DIR", str(home.state_dir.with_name("elsewhere")))
    done = code2lora("init", repo.path)
    assert done.status == 1
    assert done.err.endswith("error: the daemon has ended\nhint: `code2lora daemon logs`\n")


def test_before_the_first_commit(code2lora: Run, repo: GitRepo) -> None:
    done = code2lora("init", repo.path)
    assert (done.status, done.out) == (0, "")
    assert done.err.endswith("there is no commit yet: the first one makes the adapter\n")
    done = code2lora("refresh", repo.path)
    assert (done.status, done.out) == (0, "")
    assert done.err == "there is no commit yet: the first one makes the adapter\n"


def test_not_waiting(code2lora: Run, home: Settings, repo: GitRepo) -> None:
    repo.commit({"a.py": "x = 1\n"})
    done = code2lora("init", repo.path, "--no-wait")
    assert (done.status, done.out) == (0, "")
    assert done.err.endswith("the adapter is being made: `code2lora status --watch`\n")
    assert [poke.event for poke in drain(home.inbox)] == ["init"]


def test_a_hook_that_is_blocked_is_told(
    code2lora: Run, repo: GitRepo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared-hooks"
    shared.mkdir()
    repo.git("config", "core.hooksPath", str(shared))
    done = code2lora("init", repo.path, "--no-wait")
    assert done.status == 0
    told = json.loads(code2lora("init", repo.path, "--no-wait", "--json").out)["hooks"]
    blocked = [hook for hook in told if hook["status"] == "blocked"]
    for hook in blocked:
        assert f"{hook['event']} cannot be installed: {hook['reason']}\n" in done.err
        assert f"  {hook['hint']}\n" in done.err


def test_no_repository(code2lora: Run, tmp_path: Path) -> None:
    done = code2lora("init", tmp_path)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("error: ") and str(tmp_path) in done.err


def test_a_refresh_tells_how_long_it_took(
    code2lora: Run, home: Settings, known: Known, here: Path
) -> None:
    commits = known.repo.git("rev-list", "--reverse", "HEAD").split()
    drain(home.inbox)

    def work(store: Store) -> None:
        known.absorb(commits)
        known.publish(commits[-1])

    with stand_in(home, work):
        done = code2lora("refresh", "--json")

    view = json.loads(done.out)
    assert (done.status, done.err) == (0, "")
    assert (view["commit"], view["generation"]) == (commits[-1], 2)
    assert view["changed"] is True
    assert 0 < view["took_s"] < 60


def test_a_refresh_of_what_is_current(code2lora: Run, known: Known, here: Path) -> None:
    known.repo.reset("HEAD~1")
    done = code2lora("refresh")
    assert (done.status, done.err) == (0, "")
    assert re.search(r"  took     \d+ ms, was current\n$", done.out)


def test_a_damaged_adapter_is_waited_for(code2lora: Run, known: Known, here: Path) -> None:
    live = known.store.live_adapter(known.worktree.id)
    assert live is not None
    known.repo.reset(live.commit)
    weights = Path(live.path) / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:9])
    with stand_in(known.settings, lambda store: None):
        done = code2lora("refresh", "--timeout", "0.2")
    assert (done.status, done.out) == (1, "")

    def publish_again(_: Store) -> None:
        weights.write_bytes(whole)

    with stand_in(known.settings, publish_again):
        assert code2lora("refresh", "--timeout", "20").status == 0
