"""The test helper itself: what it makes must not depend on the machine."""

from __future__ import annotations

import os
from pathlib import Path

from tests.gitrepo import GitRepo


def test_same_calls_give_same_ids(tmp_path: Path) -> None:
    ids = []
    for name in ("one", "two"):
        made = GitRepo(tmp_path / name)
        made.commit({"a.py": "x = 1\n"})
        ids.append(made.commit({"b/c.py": b"y = 2\n", "a.py": None}))
    assert ids[0] == ids[1]


def test_environment_is_hermetic(hermetic_home: Path) -> None:
    assert Path.home() == hermetic_home / "home"
    assert os.environ["CODE2LORA_RUNTIME_DIR"].startswith(str(hermetic_home))
    assert len(os.environ["CODE2LORA_RUNTIME_DIR"]) < 60
