"""`deinit`: it asks, and leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

from code2lora.hooks import EVENTS
from tests.cli.conftest import Known, Run


def test_nobody_to_ask(code2lora: Run, known: Known, here: Path) -> None:
    done = code2lora("deinit")
    assert (done.status, done.out) == (1, "")
    assert done.err == "error: this needs your confirmation\nhint: add `--yes`\n"
    assert known.store.worktrees(known.repository_id)


def test_everything_goes(code2lora: Run, known: Known, here: Path) -> None:
    (here / ".git/hooks/post-commit.sample").unlink(missing_ok=True)
    live = known.store.live_adapter(known.worktree.id)
    assert live is not None

    done = code2lora("deinit", "--yes")

    assert (done.status, done.err) == (0, "")
    assert done.out == "removed 5 hooks, 3 states and 1 adapter (1.2 MB)\n"
    assert not [event for event in EVENTS if (here / ".git/hooks" / event).exists()]
    assert known.repo.run("config", "--get-regexp", r"^code2lora\.", check=False).stdout == b""
    assert not Path(live.path).exists()
    assert known.store.repositories() == []
    assert code2lora("status").err == (
        f"error: {here} is not registered\nhint: `code2lora init {here}`\n"
    )


def test_a_hook_of_the_users_own_stays(code2lora: Run, known: Known, here: Path) -> None:
    hook = here / ".git/hooks/pre-commit"
    hook.write_bytes(b"#!/bin/sh\nexit 0\n")
    done = code2lora("deinit", "--yes", "--json")
    view = json.loads(done.out)
    assert view["hooks_removed"] == list(EVENTS)
    assert (view["n_states"], view["n_adapters"]) == (3, 1)
    assert hook.read_bytes() == b"#!/bin/sh\nexit 0\n"
