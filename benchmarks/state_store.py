"""How fast states are stored and found, and what they occupy: `python benchmarks/state_store.py`.

Writes a database in a temporary folder for each size of state, prints one table, leaves nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from code2lora.state_store import Store
from code2lora.state_store.records import NewAdapter, NewState

REPOSITORY = "0" * 32
CHECKPOINT = "c" * 64
ENCODER = "e" * 64


def commit_id(n: int) -> str:
    """Return the n-th commit hash."""
    return hashlib.sha1(str(n).encode()).hexdigest()


def new_state(n: int, size_bytes: int) -> NewState:
    """Return a state that does not compress, with features as large as itself."""
    return NewState(
        commit=commit_id(n),
        parent=commit_id(n - 1) if n else None,
        step=n,
        state=os.urandom(size_bytes),
        committed_at=datetime.now(UTC),
        summary="area: a summary of the usual length of a commit",
        diff_key=hashlib.sha256(str(n).encode()).hexdigest() if n else None,
        features=os.urandom(size_bytes) if n else None,
        drift=0.01 if n else None,
    )


def times_ms(action: Callable[[int], object], n: int) -> list[float]:
    """Return how long each of n calls took."""
    times = []
    for i in range(n):
        started = time.perf_counter()
        action(i)
        times.append(1e3 * (time.perf_counter() - started))
    return times


def show(label: str, times: list[float], per_call: int = 1) -> None:
    """Print the middle and the slow end of some times, and the rate."""
    times = sorted(times)
    p50, p95 = statistics.median(times), times[int(0.95 * (len(times) - 1))]
    rate = f"{1e3 * per_call * len(times) / sum(times):10,.0f} /s"
    print(f"  {label:<42} p50 {p50:8.2f} ms   p95 {p95:8.2f} ms {rate}")


def measure(size_bytes: int, n: int) -> None:
    """Print the figures for one size of state."""
    states = [new_state(i, size_bytes) for i in range(n + 1)]
    bulk = [new_state(i, size_bytes) for i in range(n + 1, 2 * n + 1)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.db"
        url = f"sqlite:///{path}"
        print(f"state of {size_bytes:,} bytes, features of {size_bytes:,} bytes, {2 * n} commits")
        show("first opening (imports alembic once)", times_ms(lambda _: Store.open(url).close(), 1))
        show("opening", times_ms(lambda _: Store.open(url).close(), 20))
        with Store.open(url) as store:
            store.add_repository(REPOSITORY, path="/src", name="benchmark")
            store.register_checkpoint(
                CHECKPOINT, encoder_fingerprint=ENCODER, name="m", base_model="b", config={}
            )
            worktree = store.upsert_worktree(REPOSITORY, git_dir="/src/.git", path="/src")
            anchor = store.add_anchor(REPOSITORY, CHECKPOINT, commit_id(0), "active")
            store.put_state(anchor.id, states[0])
            put = times_ms(lambda i: store.put_state(anchor.id, states[i + 1]), n)
            show("put_state, one transaction each", put)
            batches = [bulk[i : i + 50] for i in range(0, n, 50)]
            put = times_ms(lambda i: store.put_states(anchor.id, batches[i]), len(batches))
            show("put_states, 50 a transaction", put, per_call=50)
            _measure_queries(store, worktree.id, 2 * n)
            store_bytes = store.sizes(REPOSITORY).state_bytes
        file_bytes = path.stat().st_size
    print(f"  packed state, bytes a commit               {store_bytes / (2 * n + 1):12,.0f}")
    print(f"  database file, bytes a commit, all in all  {file_bytes / (2 * n + 1):12,.0f}\n")


def _measure_queries(store: Store, worktree_id: int, n: int) -> None:
    def find(i: int) -> object:
        return store.find_state(REPOSITORY, CHECKPOINT, commit_id(i))

    walk = [commit_id(i) for i in range(n - 200, n + 56)]
    info = store.recent_states(REPOSITORY, limit=1)[0]

    def publish(i: int) -> object:
        new = NewAdapter(
            state_id=info.id,
            path=f"/adapters/{i}",
            sha256="5" * 64,
            n_bytes=1,
            generate_ms=1.0,
            write_ms=1.0,
        )
        return store.publish(worktree_id, new)

    show("find_state", times_ms(find, 300))
    known = times_ms(lambda _: store.known_commits(REPOSITORY, CHECKPOINT, walk), 50)
    show("known_commits of 256", known)
    lineage = times_ms(lambda _: store.lineage(REPOSITORY, CHECKPOINT, commit_id(n), limit=60), 50)
    show("lineage of 60", lineage)
    show("recent_states, 20", times_ms(lambda _: store.recent_states(REPOSITORY, limit=20), 50))
    show("sizes", times_ms(lambda _: store.sizes(REPOSITORY), 20))
    show("publish", times_ms(publish, 100))


def main() -> None:
    """Measure every size asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--commits", type=int, default=1000)
    arguments = parser.parse_args()
    for size_bytes in arguments.sizes:
        measure(size_bytes, arguments.commits)


if __name__ == "__main__":
    main()
