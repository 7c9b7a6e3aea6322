"""Relate a chain of commits to the states that are stored of it. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from code2lora.errors import UserError
from code2lora.history.model import Commit, History
from code2lora.state_store import Store
from code2lora.state_store.records import Adapter, Checkpoint, StateInfo, Worktree

_BETWEEN_STEPS = 64
"""Commits walked back from a commit in search of a state, where not every commit is a step."""


@dataclass(frozen=True)
class Unscored:
    """A commit that can be scored."""

    commit: str
    told: str
    """The nearest ancestor that has a state: what the own adapter knew before the commit."""


def unscored_commits(
    store: Store, history: History, worktree: Worktree, fingerprint: str, *, limit: int
) -> list[Unscored]:
    """Return those of a worktree's newest commits that are to be scored, oldest first.

    limit: commits back from the live adapter's, which is of the newest one that was absorbed

    A commit without a parent has nothing that it could be scored by. Raises UserError when git
    cannot be read.
    """
    live = store.live_adapter(worktree.id) if limit else None
    if live is None or live.checkpoint != fingerprint:
        return []
    walked = list(history.first_parents(live.commit, limit=limit + _BETWEEN_STEPS))
    ids = [commit.id for commit in walked]
    scored = store.scores(worktree.repository_id, fingerprint, ids[:limit])
    wanted = [n for n, commit in enumerate(walked[:limit]) if commit.id not in scored]
    if not wanted:
        return []
    known = store.known_commits(worktree.repository_id, fingerprint, ids)
    found = []
    for n in reversed(wanted):
        told = next((id for id in ids[n + 1 :] if id in known), None)
        if told is not None and walked[n].parents:
            found.append(Unscored(ids[n], told))
    return found


def commits_after(history: History, ancestor: str, commit: str) -> list[Commit]:
    """Return the first parents from a commit back to an ancestor, that excluded, oldest first.

    Raises UserError when it is no ancestor, or git lacks what is between.
    """
    found: list[Commit] = []
    for walked in history.first_parents(commit):
        if walked.id == ancestor:
            return found[::-1]
        found.append(walked)
    raise UserError(
        f"commit {ancestor[:12]} is no ancestor of {commit[:12]} any more",
        hint="`git fetch --unshallow` where history was cut off",
    )


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
