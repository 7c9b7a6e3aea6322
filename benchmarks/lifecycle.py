"""Time the whole loop on clones of real repositories: `python -m benchmarks.lifecycle REPO...`

For each repository (a path or URL that git can clone; give ones with more than 300 commits): init
to first adapter, rate of the backfill, commit to published adapter with a warm and with a cold
worker, switch to a known commit, a rebase of many commits. Then, once: the idle supervisor's memory
and CPU, bytes of state a commit, time of `code2lora status`. Works on clones in a temporary
directory with a daemon of its own; nothing of the user's is touched.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from code2lora.daemon.control import start, stop, supervisor_status
from code2lora.daemon.registration import register
from code2lora.settings import Settings
from code2lora.state_store import Store
from code2lora.state_store.records import Worktree

_POLL_S = 0.002
_WAIT_S = 600.0
_IDENTITY = ["-c", "user.name=Bench", "-c", "user.email=bench@example.com"]


@dataclass
class Bench:
    """A daemon of our own and the clones it looks after."""

    settings: Settings
    store: Store
    environment: dict[str, str]

    def git(self, path: Path, *arguments: str) -> str:
        """Run git in a clone and return what it printed."""
        clean = {key: value for key, value in self.environment.items() if "GIT_" not in key}
        done = subprocess.run(
            ["git", *_IDENTITY, *arguments],
            cwd=path,
            env=clean,
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    def until_live(self, worktree: Worktree, commit: str, since_s: float) -> float:
        """Return the seconds from `since_s` until the commit's own adapter is live."""
        return _until(lambda: self._is_live(worktree, commit), since_s)

    def _is_live(self, worktree: Worktree, commit: str) -> bool:
        live = self.store.live_adapter(worktree.id)
        return live is not None and live.commit == commit and live.state_id is not None

    def until_backfilled(self, worktree: Worktree) -> tuple[float, int]:
        """Return how long the backfill took from now on, and how many commits it absorbed."""
        [checkpoint] = self.store.checkpoints()
        key = (worktree.repository_id, checkpoint.fingerprint)
        began_s = time.perf_counter()
        first = self.store.backfill_progress(*key)
        seconds = _until(lambda: self.store.backfill_progress(*key) is None, began_s)
        total = first.anchor.total_commits if first and first.anchor.total_commits else 0
        return seconds, total - (first.done_commits if first else 0)

    def worker(self) -> psutil.Process | None:
        """Return the worker's process, if one runs."""
        pid = supervisor_status(self.settings).pid
        children = psutil.Process(pid).children() if pid else []
        return children[0] if children else None


def measure_repository(bench: Bench, source: str, n_commits: int) -> dict[str, Any]:
    """Return one repository's figures, in seconds unless the key says otherwise."""
    clones = bench.settings.state_dir.parent / "clones"
    clones.mkdir(exist_ok=True)
    clone = clones / f"{len(list(clones.iterdir()))}"
    subprocess.run(["git", "clone", "--quiet", source, str(clone)], check=True)
    head = bench.git(clone, "rev-parse", "HEAD")
    branch = bench.git(clone, "branch", "--show-current")
    figures: dict[str, Any] = {
        "repository": source,
        "first_parent_commits": int(
            bench.git(clone, "rev-list", "--first-parent", "--count", head)
        ),
    }
    began_s = time.perf_counter()
    worktree = register(bench.settings, bench.store, clone).worktree
    start(bench.settings, bench.environment)
    figures["init_to_first_adapter"] = bench.until_live(worktree, head, began_s)
    seconds, absorbed = bench.until_backfilled(worktree)
    figures["backfill_commits_per_s"] = absorbed / seconds if absorbed else None
    bench.until_live(worktree, head, time.perf_counter())
    figures["commit_warm"] = _spread([_commit(bench, clone, worktree) for _ in range(n_commits)])
    cold = []
    for _ in range(max(3, n_commits // 8)):
        worker = bench.worker()
        if worker is not None:
            worker.terminate()  # the supervisor starts another when there is work
            worker.wait()
        cold.append(_commit(bench, clone, worktree))
    figures["commit_cold"] = _spread(cold)
    figures["switch"] = _spread(_switches(bench, clone, worktree, branch, n_commits))
    figures["rebase_100"] = _rebase(bench, clone, worktree, branch, 100)
    sizes = bench.store.sizes(worktree.repository_id)
    figures["state_bytes_per_commit"] = sizes.state_bytes / sizes.n_states
    return figures


def _commit(bench: Bench, clone: Path, worktree: Worktree) -> float:
    """Commit one small edit; return the seconds from git's return to the published adapter."""
    path = clone / "bench_edit.py"
    serial = time.perf_counter_ns()
    path.write_text(f"def edited_{serial}(value):\n    return value + {serial % 97}\n")
    bench.git(clone, "add", path.name)
    bench.git(clone, "commit", "--quiet", "--no-verify", "--message", "bench")
    returned_s = time.perf_counter()
    return bench.until_live(worktree, bench.git(clone, "rev-parse", "HEAD"), returned_s)


def _switches(bench: Bench, clone: Path, worktree: Worktree, branch: str, n: int) -> list[float]:
    """Go back and forth between two commits whose adapters exist."""
    times = []
    for i in range(2 * n):
        target = "HEAD~1" if i % 2 == 0 else branch
        bench.git(clone, "checkout", "--quiet", target)
        returned_s = time.perf_counter()
        commit = bench.git(clone, "rev-parse", "HEAD")
        taken = bench.until_live(worktree, commit, returned_s)
        if i >= 2:  # the first visit may have to write the adapter
            times.append(taken)
    return times


def _rebase(bench: Bench, clone: Path, worktree: Worktree, branch: str, n: int) -> dict[str, Any]:
    """Rebase `n` commits; return git's own time and the time from its return to the adapter."""
    bench.git(clone, "checkout", "--quiet", "-b", "bench-topic")
    for i in range(n):
        (clone / f"bench_topic_{i}.py").write_text(f"topic_{i} = {i}\n")
        bench.git(clone, "add", f"bench_topic_{i}.py")
        bench.git(clone, "commit", "--quiet", "--no-verify", "--message", f"topic {i}")
    bench.git(clone, "checkout", "--quiet", branch)
    _commit(bench, clone, worktree)
    bench.git(clone, "checkout", "--quiet", "bench-topic")
    tip = bench.git(clone, "rev-parse", "HEAD")
    bench.until_live(worktree, tip, time.perf_counter())
    before = len(bench.store.adapters(worktree.repository_id, include_pruned=True))
    began_s = time.perf_counter()
    bench.git(clone, "rebase", "--quiet", branch)
    returned_s = time.perf_counter()
    fresh = bench.until_live(worktree, bench.git(clone, "rev-parse", "HEAD"), returned_s)
    after = len(bench.store.adapters(worktree.repository_id, include_pruned=True))
    return {"git": returned_s - began_s, "adapter": fresh, "adapters_published": after - before}


def measure_idle(bench: Bench, clone: Path, seconds: float) -> dict[str, Any]:
    """Return the idle supervisor's memory and CPU, and the time that `code2lora status` takes."""
    pid = supervisor_status(bench.settings).pid
    assert pid is not None
    supervisor = psutil.Process(pid)
    before = supervisor.cpu_times()
    time.sleep(seconds)
    after = supervisor.cpu_times()
    used = (after.user + after.system) - (before.user + before.system)
    status = []
    for _ in range(10):
        began_s = time.perf_counter()
        command = [sys.executable, "-m", "code2lora.cli", "status", str(clone)]
        subprocess.run(command, env=bench.environment, check=True, capture_output=True)
        status.append(time.perf_counter() - began_s)
    return {
        "supervisor_rss_mb": supervisor.memory_info().rss / 1e6,
        "supervisor_cpu_share": used / seconds,
        "status": _spread(status),
    }


def _until(reached: Callable[[], bool], since_s: float) -> float:
    while not reached():
        if time.perf_counter() - since_s > _WAIT_S:
            raise TimeoutError("the daemon did not get there; see its log")
        time.sleep(_POLL_S)
    return time.perf_counter() - since_s


def _spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "n": len(ordered),
        "p50": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))],
    }


def main() -> None:
    """Measure and print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repositories", nargs="+", help="what `git clone` accepts")
    parser.add_argument("--commits", type=int, default=24, help="commits timed in each")
    parser.add_argument("--idle-s", type=float, default=30.0, help="how long to watch the idle one")
    parser.add_argument("--model", default="mini")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="c2l-", dir="/tmp"))
    names = {"config_dir": "c", "state_dir": "s", "data_dir": "d", "runtime_dir": "r"}
    places = {key: root / folder for key, folder in names.items()}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CODE2LORA_")}
    environment |= {f"CODE2LORA_{key.upper()}": str(path) for key, path in places.items()}
    environment["CODE2LORA_MODEL"] = options.model
    settings = Settings(**places, model=options.model)  # type: ignore[arg-type]
    settings.prepare()
    try:
        with Store.open(settings.resolved_database_url) as store:
            bench = Bench(settings, store, environment)
            for source in options.repositories:
                print(json.dumps(measure_repository(bench, source, options.commits)), flush=True)
            worktree = store.worktrees()[-1]
            idle = measure_idle(bench, Path(worktree.path or ""), options.idle_s)
            print(json.dumps(idle), flush=True)
    finally:
        stop(settings)
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
