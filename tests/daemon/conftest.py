"""Fixtures: settings of one short directory, the smallest model, and a daemon that really runs."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from code2lora.daemon.control import start, stop, supervisor_status
from code2lora.daemon.registration import register
from code2lora.settings import Settings
from code2lora.state_store import Store
from code2lora.state_store.records import Adapter, Worktree
from tests.gitrepo import GitRepo

WAIT_S = 90.0
T = TypeVar("T")


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory whose path is short enough for a Unix socket."""
    path = Path(tempfile.mkdtemp(prefix="c2l-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def make_settings(home: Path, **changes: object) -> Settings:
    """Return settings whose every directory is below `home`, prepared."""
    settings = Settings(
        config_dir=home / "c",
        state_dir=home / "s",
        data_dir=home / "d",
        runtime_dir=home / "r",
        threads=1,
        **changes,  # type: ignore[arg-type]
    )
    settings.prepare()
    return settings


@dataclass
class Installation:
    """A daemon's settings and database, with what tests want to know of them."""

    settings: Settings
    store: Store
    environment: dict[str, str]

    def register(self, repo: GitRepo) -> Worktree:
        """Take a repository in, as `code2lora init` does."""
        return register(self.settings, self.store, repo.path).worktree

    def start(self) -> int:
        """Start the supervisor in the background; return its pid."""
        pid = start(self.settings, self.environment).pid
        assert pid is not None
        return pid

    def wait_live(self, worktree: Worktree, commit: str) -> Adapter:
        """Return the live adapter once it is the commit's, or fail with what the daemon says."""

        def live() -> Adapter | None:
            adapter = self.store.live_adapter(worktree.id)
            current = adapter is not None and adapter.commit == commit and adapter.state_id
            return adapter if current else None

        return self.wait(live, f"no adapter for {commit[:12]}")

    def wait(self, look: Callable[[], T | None], complaint: str) -> T:
        """Return the first value that is not None or False; fail after a while."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            if found := look():
                return found
            time.sleep(0.01)
        raise AssertionError(f"{complaint}\n{self.logs()}")

    def worker(self) -> psutil.Process | None:
        """Return the worker process, if one runs."""
        status = supervisor_status(self.settings)
        if status.pid is None:
            return None
        try:
            children = psutil.Process(status.pid).children()
        except psutil.NoSuchProcess:
            return None
        return children[0] if children else None

    def logs(self) -> str:
        """Return what the daemon logged."""
        return "\n".join(p.read_text() for p in sorted(self.settings.log_dir.glob("*.log")))


@pytest.fixture
def installation(home: Path) -> Iterator[Installation]:
    """An installation whose daemon is stopped at the end, whatever the test did to it."""
    settings = make_settings(home)
    environment = dict(os.environ) | {
        "CODE2LORA_CONFIG_DIR": str(settings.config_dir),
        "CODE2LORA_STATE_DIR": str(settings.state_dir),
        "CODE2LORA_DATA_DIR": str(settings.data_dir),
        "CODE2LORA_RUNTIME_DIR": str(settings.runtime_dir),
        "CODE2LORA_THREADS": "1",
    }
    with Store.open(settings.resolved_database_url) as store:
        yield Installation(settings, store, environment)
        stop(settings)
    ours = [p for p in psutil.process_iter(["environ"]) if _is_ours(p, settings)]
    _, leftover = psutil.wait_procs(ours, timeout=5)
    assert not leftover, f"orphans: {[p.cmdline() for p in leftover]}"


def _is_ours(process: psutil.Process, settings: Settings) -> bool:
    if process.pid == os.getpid():
        return False
    environ = process.info["environ"] or {}
    return environ.get("CODE2LORA_STATE_DIR") == str(settings.state_dir)


def fill(repo: GitRepo, n_commits: int) -> list[str]:
    """Make some commits of source code; return their hashes, oldest first."""
    return [
        repo.commit({f"module_{i % 3}.py": f"def function_{i}(x):\n    return x + {i}\n"}, f"c{i}")
        for i in range(n_commits)
    ]
