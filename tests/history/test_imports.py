"""This room is read by hooks and by the supervisor: it must stay light."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {"torch", "transformers", "sqlalchemy", "numpy"}


def test_reading_git_needs_no_heavy_library() -> None:
    code = (
        "import sys, code2lora.history.open, code2lora.history.gitconfig;"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())
