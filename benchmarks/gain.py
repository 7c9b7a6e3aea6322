"""Time the scoring of commits, and what it costs a refresh: `python -m benchmarks.gain REPO`

Two daemons of our own follow a clone each of one repository (a path or URL that git can clone), one
that scores and one that does not. The same edits are committed in both, alternately, so that a busy
machine slows both; each is timed from git's return to the published adapter. The first round leaves
no pause, so that no scoring falls between two commits; in the second each comes while a large one
is scored. Prints one JSON object; nothing of the user's is touched.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lifecycle import Bench, _commit, _spread
from code2lora.daemon.control import start, stop
from code2lora.daemon.registration import register
from code2lora.settings import Settings
from code2lora.state_store import Store
from code2lora.state_store.records import Score, Worktree

_WAIT_S = 300.0
_QUIET_S = 30.0
_AMIDST_S = 2.3
"""A commit so long after a large one comes while that is scored."""


@dataclass
class Side:
    """One daemon with its clone."""

    bench: Bench
    clone: Path
    worktree: Worktree

    @property
    def n_scores(self) -> int:
        """Commits scored so far."""
        return len(self.scores())

    def scores(self) -> list[Score]:
        """Return the scores of the commits that asked for something, newest first."""
        [checkpoint] = self.bench.store.checkpoints()
        return self.bench.store.recent_scores(
            self.worktree.repository_id, checkpoint.fingerprint, limit=1000
        )


def begin(root: Path, source: str, score_commits: int) -> Side:
    """Start a daemon of its own and wait until the clone's history is replayed."""
    names = {"config_dir": "c", "state_dir": "s", "data_dir": "d", "runtime_dir": "r"}
    places = {key: root / folder for key, folder in names.items()}
    settings = Settings(**places, score_commits=score_commits)  # type: ignore[arg-type]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CODE2LORA_")}
    environment |= {f"CODE2LORA_{key.upper()}": str(path) for key, path in places.items()}
    environment["CODE2LORA_SCORE_COMMITS"] = str(score_commits)
    settings.prepare()
    clone = root / "clone"
    subprocess.run(["git", "clone", "--quiet", source, str(clone)], check=True)
    bench = Bench(settings, Store.open(settings.resolved_database_url), environment)
    worktree = register(settings, bench.store, clone).worktree
    start(settings, environment)
    bench.until_live(worktree, bench.git(clone, "rev-parse", "HEAD"), time.perf_counter())
    bench.until_backfilled(worktree)
    return Side(bench, clone, worktree)


def measure(scoring: Side, silent: Side, n_commits: int) -> dict[str, Any]:
    """Return the figures, times in seconds unless the key says otherwise."""
    _until_quiet(scoring)
    figures: dict[str, Any] = {"first_scores": scoring.n_scores}
    for name, one in (("back_to_back", _small_commit), ("amidst_scoring", _amidst)):
        times: dict[str, list[float]] = {"scoring": [], "silent": []}
        sides = [("scoring", scoring), ("silent", silent)]
        for _ in range(n_commits):
            for label, side in sides:
                times[label].append(one(side))
            sides.reverse()  # neither always follows the other
        figures[name] = {label: _spread(values) for label, values in times.items()}
    _until_quiet(scoring)
    scores = scoring.scores()
    figures["scores"] = len(scores)
    figures["score_ms"] = _spread([score.took_ms for score in scores])
    figures["tokens_median"] = statistics.median(score.n_tokens for score in scores)
    figures["ms_per_100_tokens"] = 100 * statistics.median(
        score.took_ms / score.n_tokens for score in scores
    )
    return figures


def _small_commit(side: Side) -> float:
    """Commit one small edit; return the seconds from git's return to the published adapter."""
    return _commit(side.bench, side.clone, side.worktree)


def _amidst(side: Side) -> float:
    """Do the same while a large commit is being scored."""
    serial = time.perf_counter_ns()
    lines = (f"def large_{serial}_{i}(value):\n    return value * {i}\n" for i in range(400))
    (side.clone / "bench_large.py").write_text("\n\n".join(lines))
    side.bench.git(side.clone, "add", "bench_large.py")
    _small_commit(side)
    time.sleep(_AMIDST_S)
    return _small_commit(side)


def _until_quiet(side: Side) -> None:
    """Wait until no score has come for a while."""
    known, since_s = -1, time.monotonic()
    give_up_s = since_s + _WAIT_S
    while time.monotonic() - since_s < _QUIET_S or not known:
        if side.n_scores != known:
            known, since_s = side.n_scores, time.monotonic()
        if time.monotonic() > give_up_s:
            raise TimeoutError("nothing is scored; see the daemon's log")
        time.sleep(0.1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repository", help="what `git clone` accepts")
    parser.add_argument("--commits", type=int, default=24, help="commits timed in each round")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="c2l-", dir="/tmp"))
    sides = []
    try:
        for name, score_commits in (("on", 16), ("off", 0)):
            (root / name).mkdir()
            sides.append(begin(root / name, options.repository, score_commits))
        print(json.dumps(measure(*sides, options.commits)))
    finally:
        for side in sides:
            stop(side.bench.settings)
            side.bench.store.close()
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
