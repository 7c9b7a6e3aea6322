"""Relate a chain of commits to the states that are stored of it. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from code2lora.history.model import Commit
from code2lora.state_store import Store
from code2lora.state_store.records import Adapter, Checkpoint, StateInfo


def serving_checkpoint(store: Store, repository_id: str, live: Adapter | None) -> Checkpoint | None:
    """Return the checkpoint whose states a worktree is served from, None before the first.

    live: the worktree's live adapter
    """
    if live is not None:
        return store.checkpoint(live.checkpoint)
    newest = store.recent_states(repository_id, limit=1)
    return store.checkpoint(newest[0].checkpoint) if newest else None


def carried_by(commits: Sequence[Commit], infos: dict[str, StateInfo]) -> dict[str, str]:
    """Return the commits between steps, each with the commit whose state carries its change.

    commits: first parents, newest first
    infos: what is stored of them
    """
    carried: dict[str, str] = {}
    bearer: StateInfo | None = None
    for commit in commits:
        info = infos.get(commit.id)
        if info is not None and not (info.provisional and bearer):
            bearer = info
        elif bearer is not None and commit.id == bearer.parent:
            bearer = None  # a step whose own state is gone
        elif info is None and bearer is not None and bearer.parent is not None:
            carried[commit.id] = bearer.commit
    return carried
