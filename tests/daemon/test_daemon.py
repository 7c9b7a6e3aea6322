"""The whole loop with real processes: hooks wake the supervisor, the worker makes adapters."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from code2lora.adapters.load import load
from code2lora.daemon.control import stop, supervisor_status
from code2lora.daemon.registration import deregister
from code2lora.hypernetwork.models import resolve_model
from code2lora.serving.client import WorkerClient
from code2lora.serving.completion import CompletionRequest
from tests.daemon.conftest import Installation, fill
from tests.gitrepo import GitRepo


def test_every_commit_leaves_a_fresh_adapter(installation: Installation, repo: GitRepo) -> None:
    commits = fill(repo, 3)
    worktree = installation.register(repo)
    installation.start()

    first = installation.wait_live(worktree, commits[-1])
    fresh = repo.commit({"new.py": "def brand_new(x):\n    return x\n"})
    second = installation.wait_live(worktree, fresh)

    assert second.generation > first.generation
    assert Path(first.path).is_dir(), "an adapter that a server may still use was removed"
    _, metadata = load(Path(second.path))
    assert (metadata.commit, metadata.repository) == (fresh, worktree.repository_id)


def test_the_worker_completes_with_the_live_adapter(
    installation: Installation, repo: GitRepo
) -> None:
    head = fill(repo, 2)[-1]
    worktree = installation.register(repo)
    installation.start()
    installation.wait_live(worktree, head)
    client = WorkerClient(installation.settings.socket, timeout_s=60.0)

    request = CompletionRequest(prompt="def function_1(", max_tokens=4)

    own = client.complete(request, repository=worktree.repository_id)
    base = client.complete(request, use="base")
    generic = client.complete(request, use="generic")
    client.close()

    assert own.adapter is not None and generic.adapter is not None
    assert own.adapter.commit == head
    # The replay of older history may have put a second adapter in place of the first.
    published = installation.store.adapters(worktree.repository_id, include_pruned=True)
    assert own.adapter.generation in {Path(adapter.path).name for adapter in published}
    assert (generic.adapter.repository, base.adapter) == (None, None)


def test_a_hook_starts_the_daemon_that_is_not_there(
    installation: Installation, repo: GitRepo
) -> None:
    fill(repo, 1)
    worktree = installation.register(repo)

    (repo.path / "b.py").write_text("y = 2\n")
    repo.git("add", "b.py")
    subprocess.run(
        ["git", "commit", "--quiet", "-m", "wake up"],
        cwd=repo.path,
        env=repo.environment,
        check=True,
    )

    installation.wait_live(worktree, repo.head)
    assert supervisor_status(installation.settings).running


def test_a_rebase_of_many_commits_is_one_refresh(installation: Installation, repo: GitRepo) -> None:
    fill(repo, 1)
    repo.switch("topic", create=True)
    for i in range(30):
        repo.commit({f"topic_{i}.py": f"x = {i}\n"})
    repo.switch("main")
    repo.commit({"main.py": "y = 1\n"})
    repo.switch("topic")
    worktree = installation.register(repo)
    installation.start()
    installation.wait_live(worktree, repo.head)
    before = len(installation.store.adapters(worktree.repository_id, include_pruned=True))

    repo.git("rebase", "--quiet", "main")

    installation.wait_live(worktree, repo.head)
    after = installation.store.adapters(worktree.repository_id, include_pruned=True)
    assert len(after) - before <= 2


def test_tools_that_run_no_hooks_are_noticed_by_the_reflog(
    installation: Installation, repo: GitRepo
) -> None:
    first, second = fill(repo, 2)
    worktree = installation.register(repo)
    installation.start()
    installation.wait_live(worktree, second)

    repo.reset(first)  # `git reset` fires no hook

    installation.wait_live(worktree, first)


def test_a_linked_worktree_has_a_live_adapter_of_its_own(
    installation: Installation, repo: GitRepo, tmp_path: Path
) -> None:
    head = fill(repo, 2)[-1]
    worktree = installation.register(repo)
    installation.start()
    installation.wait_live(worktree, head)

    linked = repo.worktree(tmp_path / "linked", "side")
    commit = linked.commit({"side.py": "z = 3\n"})

    git_dir = linked.git("rev-parse", "--absolute-git-dir")
    side = installation.wait(
        lambda: installation.store.find_worktree(git_dir), "the worktree was not taken up"
    )
    installation.wait_live(side, commit)
    live = installation.store.live_adapter(worktree.id)
    assert live is not None and live.commit == head


def test_deregistering_leaves_nothing(installation: Installation, repo: GitRepo) -> None:
    head = fill(repo, 1)[-1]
    hooks = repo.path / ".git" / "hooks"
    config = (repo.path / ".git" / "config").read_bytes()
    before = {path: path.read_bytes() for path in hooks.iterdir()} if hooks.is_dir() else {}
    worktree = installation.register(repo)
    installation.start()
    installation.wait_live(worktree, head)

    deregister(installation.settings, installation.store, repo.path)

    after = {path: path.read_bytes() for path in hooks.iterdir()} if hooks.is_dir() else {}
    assert after == before
    assert (repo.path / ".git" / "config").read_bytes() == config
    assert installation.store.repositories() == []
    assert list(installation.settings.adapters_dir.iterdir()) == []


def test_the_idle_worker_leaves_and_comes_back(installation: Installation, repo: GitRepo) -> None:
    head = fill(repo, 1)[-1]
    worktree = installation.register(repo)
    installation.environment["CODE2LORA_IDLE_EXIT_S"] = "0.5"
    installation.start()
    installation.wait_live(worktree, head)
    installation.wait(lambda: installation.worker() is None, "the worker stays")

    assert installation.store.failures(worktree.repository_id) == []
    fresh = repo.commit({"again.py": "x = 1\n"})
    installation.wait_live(worktree, fresh)


def test_a_second_daemon_gives_way(installation: Installation) -> None:
    pid = installation.start()

    second = subprocess.run(
        [sys.executable, "-I", "-m", "code2lora.daemon", "run"],
        env=installation.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert second.returncode == 1
    assert second.stderr == "error: another daemon is running\nhint: `code2lora daemon status`\n"
    assert supervisor_status(installation.settings).pid == pid


def test_the_supervisor_is_small_and_without_torch(
    installation: Installation, repo: GitRepo
) -> None:
    head = fill(repo, 1)[-1]
    worktree = installation.register(repo)
    supervisor = psutil.Process(installation.start())
    installation.wait_live(worktree, head)

    assert not [m.path for m in supervisor.memory_maps() if "torch" in m.path]
    assert supervisor.memory_info().rss < 80 * 2**20


def test_a_daemon_whose_directory_is_deleted_ends(installation: Installation) -> None:
    installation.environment["CODE2LORA_SWEEP_S"] = "0.5"
    pid = installation.start()

    shutil.rmtree(installation.settings.state_dir)

    installation.wait(lambda: not _runs(pid), "it watches nothing")


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_unknown_model_is_named(installation: Installation) -> None:
    installation.environment["CODE2LORA_MODEL"] = "maxi"

    done = subprocess.run(
        [sys.executable, "-I", "-m", "code2lora.daemon", "start"],
        env=installation.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 1
    assert "there is no model named 'maxi'" in done.stderr


def test_a_broken_model_is_a_recorded_failure(
    installation: Installation, repo: GitRepo, home: Path
) -> None:
    bundled = resolve_model("mini", home).base.parent
    shutil.copytree(bundled, home / "broken")
    weights = home / "broken" / "hypernetwork" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    fill(repo, 1)
    worktree = installation.register(repo)
    installation.environment["CODE2LORA_MODEL"] = str(home / "broken")
    installation.start()

    failures = installation.wait(
        lambda: installation.store.failures(worktree.repository_id), "no failure"
    )
    assert failures[0].stage == "model"
    assert f"{weights} is damaged" in failures[0].message


def test_stopping_ends_supervisor_and_worker(installation: Installation, repo: GitRepo) -> None:
    head = fill(repo, 1)[-1]
    worktree = installation.register(repo)
    pid = installation.start()
    installation.wait_live(worktree, head)
    worker = installation.worker()
    assert worker is not None

    assert stop(installation.settings)

    assert not worker.is_running()
    installation.wait(lambda: not psutil.pid_exists(pid), "the supervisor stays")
    assert not stop(installation.settings)


def test_a_worker_that_hangs_does_not_keep_the_daemon(
    installation: Installation, repo: GitRepo
) -> None:
    head = fill(repo, 1)[-1]
    worktree = installation.register(repo)
    installation.start()
    installation.wait_live(worktree, head)
    worker = installation.worker()
    assert worker is not None
    time.sleep(0.5)  # until its last transaction is over: nobody else could write meanwhile
    worker.suspend()
    repo.commit({"unanswered.py": "x = 1\n"})
    time.sleep(0.5)  # the refresh is waiting for the worker's answer

    assert stop(installation.settings)

    assert not worker.is_running()


def kill_during_a_burst(installation: Installation, repo: GitRepo, n_kills: int) -> None:
    """Commit without a pause while supervisor and worker are killed at uneven moments."""
    fill(repo, 3)
    worktree = installation.register(repo)
    installation.start()
    installation.wait_live(worktree, repo.head)
    for i in range(n_kills):
        for j in range(3):
            repo.commit({f"burst_{i}.py": f"def f_{i}_{j}(x):\n    return x\n"})
        time.sleep(0.037 * (i * 7 % 13))
        supervisor = supervisor_status(installation.settings).pid
        victim = installation.worker() if i % 2 == 0 else None
        pid = victim.pid if victim is not None else supervisor
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        if pid == supervisor:
            installation.wait(
                lambda: not supervisor_status(installation.settings).running, "still locked"
            )
            installation.start()
    installation.wait_live(worktree, repo.head)
    check_nothing_lost(installation, repo, worktree.repository_id)


def check_nothing_lost(installation: Installation, repo: GitRepo, repository_id: str) -> None:
    """Every commit absorbed once, every adapter directory whole."""
    [checkpoint] = installation.store.checkpoints()
    history = repo.git("rev-list", "--first-parent", "HEAD").splitlines()
    installation.wait(
        lambda: installation.store.backfill_progress(repository_id, checkpoint.fingerprint) is None,
        "the backfill does not end",
    )

    def whole_lineage() -> bool:
        lineage = installation.store.lineage(
            repository_id, checkpoint.fingerprint, history[0], limit=1000
        )
        commits = [info.commit for info in lineage]
        return commits == history and [info.step for info in lineage][-1] == 0

    installation.wait(whole_lineage, "a commit was skipped or absorbed twice")
    installation.store.check()
    for folder in (installation.settings.adapters_dir / repository_id).iterdir():
        if not folder.name.startswith(".tmp-"):
            load(folder)


def test_kills_during_a_burst_lose_nothing(installation: Installation, repo: GitRepo) -> None:
    kill_during_a_burst(installation, repo, 4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_kills_during_a_burst_lose_nothing(installation: Installation, repo: GitRepo) -> None:
    kill_during_a_burst(installation, repo, 50)


def test_the_supervisors_modules_import_no_torch() -> None:
    program = (
        "import sys, code2lora.daemon.supervisor, code2lora.daemon.control, "
        "code2lora.daemon.registration; "
        "sys.exit(bool({'torch', 'transformers', 'alembic'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
