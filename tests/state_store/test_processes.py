"""Several processes at one database, and processes that die in the middle of it."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import code2lora
from code2lora.state_store import Store
from tests.state_store.samples import CHECKPOINT, ENCODER, REPOSITORY, commit_id, new_state

ROOT = Path(code2lora.__file__).parents[1]
N_PROCESSES = 4
N_STATES = 200


def start_writer(url: str, name: str, n: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.state_store.writer", url, name, str(n)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_concurrent_writers_wait_for_each_other_and_lose_nothing(any_url: str) -> None:
    """The database is empty when they start: they also race to create the tables."""
    writers = [start_writer(any_url, f"branch-{i}", N_STATES) for i in range(N_PROCESSES)]
    for writer in writers:
        output, errors = writer.communicate(timeout=120)
        assert (writer.returncode, errors) == (0, "")
        assert len(output.split()) == N_STATES

    with Store.open(any_url) as store:
        store.check()
        total = N_PROCESSES * N_STATES
        assert store.sizes(REPOSITORY).n_states == total
        (counter,) = store.failures(REPOSITORY)
        assert counter.n_times == total
        generations = [a.generation for a in store.adapters(REPOSITORY)]
        assert generations == list(range(total // 10, 0, -1))
        for i in range(N_PROCESSES):
            expected = [commit_id(n, f"branch-{i}") for n in reversed(range(N_STATES))]
            lineage = store.lineage(REPOSITORY, CHECKPOINT, expected[0], limit=N_STATES + 1)
            assert [info.commit for info in lineage] == expected


def test_a_killed_writer_leaves_a_whole_database(url: str, path: Path) -> None:
    """Whatever was said to be stored is; nothing half stored is; and the next one goes on."""
    chance = random.Random(20260102)
    said: list[str] = []
    for n_kills in range(1, 7):
        with start_writer(url, "main", 100_000) as writer:
            assert writer.stdout is not None and writer.stderr is not None
            said.extend(writer.stdout.readline().strip() for _ in range(chance.randrange(1, 40)))
            time.sleep(chance.random() * 0.01)
            writer.send_signal(signal.SIGKILL)
            said.extend(line.strip() for line in writer.stdout)
            assert writer.stderr.read() == ""
        assert writer.returncode == -signal.SIGKILL
        _assert_whole(url, path, said, n_kills)
    assert len(said) > 6


def _assert_whole(url: str, path: Path, said: list[str], n_kills: int) -> None:
    with sqlite3.connect(path) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    raw.close()
    with Store.open(url) as store:
        store.check()
        (anchor,) = store.active_anchors(REPOSITORY, CHECKPOINT)
        latest = store.latest_state(anchor.id)
        assert latest is not None
        n_states = latest.info.step + 1
        stored = [commit_id(n) for n in range(n_states)]
        assert [commit for commit in stored if commit in said] == said
        # Each may have been killed after its last transaction and before it could say so.
        assert len(stored) - len(said) <= n_kills
        lineage = store.lineage(REPOSITORY, CHECKPOINT, latest.info.commit, limit=n_states + 1)
        assert [info.step for info in lineage] == list(reversed(range(n_states)))
        expected = {s.diff_key for s in map(new_state, range(1, n_states)) if s.diff_key}
        assert set(store.get_features(ENCODER, expected)) == expected


def test_readers_do_not_wait_for_a_writer(url: str, path: Path) -> None:
    with Store.open(url) as store:
        store.record_event("before")
        writer = sqlite3.connect(path, isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM events")

        started = time.monotonic()
        assert [e.kind for e in store.events()] == ["before"]
        with Store.open(url, migrate=False) as second:
            assert [e.kind for e in second.events()] == ["before"]
        assert time.monotonic() - started < 5  # the busy timeout is 30 s

        writer.execute("ROLLBACK")
        writer.close()
