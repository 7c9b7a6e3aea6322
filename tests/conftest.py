"""Fixtures for every room: a hermetic home for the whole run, and a real git repository."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gitrepo import GitRepo

HOME_VARIABLES = {
    "HOME": "home",
    "XDG_CONFIG_HOME": "home/.config",
    "XDG_DATA_HOME": "home/.local/share",
    "XDG_STATE_HOME": "home/.local/state",
    "XDG_CACHE_HOME": "home/.cache",
    "XDG_RUNTIME_DIR": "run",
    "CODE2LORA_CONFIG_DIR": "config",
    "CODE2LORA_STATE_DIR": "state",
    "CODE2LORA_DATA_DIR": "data",
    "CODE2LORA_RUNTIME_DIR": "r",
}


# A shell makes what it puts into the background ignore interrupts, and child processes inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def hermetic_home() -> Iterator[Path]:
    """Point every user directory into a fresh temporary one and drop inherited settings.

    It lies directly under /tmp, not in pytest's own directory, because the path of a Unix socket
    has at most 107 bytes.
    """
    root = Path(tempfile.mkdtemp(prefix="c2l-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("GIT_", "CODE2LORA_")):
                patch.delenv(name)
        for name, folder in HOME_VARIABLES.items():
            (root / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            patch.setenv(name, str(root / folder))
        patch.setenv("GIT_CONFIG_NOSYSTEM", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def repo(tmp_path: Path) -> GitRepo:
    """An empty repository on branch `main`."""
    return GitRepo(tmp_path / "repo")
