"""What can be told of a worktree without the model: is its adapter current, and if not, why.

Torch-free, so that the supervisor settles a branch switch to a known commit by itself.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from code2lora.adapters.prune import is_whole
from code2lora.daemon.gain import served_use
from code2lora.daemon.lineage import Unscored, unscored_commits
from code2lora.errors import UserError
from code2lora.history import open_history
from code2lora.history.gitconfig import repository_id
from code2lora.history.model import History
from code2lora.settings import Settings
from code2lora.state_store import Store
from code2lora.state_store.records import Repository, Worktree


class Look(enum.Enum):
    """What a look at a worktree found."""

    CURRENT = "current"
    """The live adapter is the one of HEAD, or has just been switched to it."""
    BEHIND = "behind"
    """The model worker has work to do."""
    UNBORN = "unborn"
    """No commit yet."""
    REBASING = "rebasing"
    """git is in the middle of a rebase or `am` that still moves HEAD."""


def look(settings: Settings, store: Store, worktree_id: int, fingerprint: str) -> Look:
    """Compare a worktree's HEAD with its live adapter; switch when the right one is on disk.

    fingerprint: of the hypernetwork in use; another one's adapters do not count, and neither do
        those with other weights than the gate wants

    Raises UserError when the repository cannot be read or the worktree is not registered.
    """
    worktree = store.worktree(worktree_id)
    if worktree is None:
        raise UserError(f"worktree {worktree_id} is not registered", hint="`code2lora init`")
    with open_registered(worktree) as history:
        head = history.head()
        moving = _sequencer_active(history) and head.commit != worktree.head_commit
    store.set_head(worktree.id, head.commit, head.branch)
    if moving:
        return Look.REBASING
    if head.commit is None:
        return Look.UNBORN
    live = store.live_adapter(worktree.id)
    if live is None or live.checkpoint != fingerprint:
        return Look.BEHIND
    wanted = store.state_infos(worktree.repository_id, fingerprint, [head.commit])
    state = wanted.get(head.commit)
    if state is None:
        return Look.BEHIND
    use = served_use(settings, store, worktree.repository_id, fingerprint)
    is_right = live.state_id == state.id and live.use == use
    if is_right and is_whole(Path(live.path), live.n_bytes):
        return Look.CURRENT
    known = store.find_adapter(state.id, use)
    if known is None or not is_whole(Path(known.path), known.n_bytes):
        return Look.BEHIND
    store.set_live(worktree.id, known.id)
    return Look.CURRENT


def unscored(store: Store, worktree: Worktree, fingerprint: str, limit: int) -> list[Unscored]:
    """Return those of a worktree's newest commits that are to be scored, oldest first.

    limit: how far back to look; 0 finds none

    Raises UserError when the repository cannot be read.
    """
    with open_registered(worktree) as history:
        return unscored_commits(store, history, worktree, fingerprint, limit=limit)


def worktree_of(store: Store, directory: Path) -> Worktree | None:
    """Return the registered worktree at a place; None when its repository is not registered.

    A linked worktree or a moved folder of a registered repository is taken up here. Raises
    UserError when there is no repository at the place.
    """
    with closing(open_history(directory)) as history:
        known = store.find_worktree(str(history.git_dir))
        if known is not None and known.path == str(history.worktree or history.git_dir):
            return known
        repository = registered(store, history)
        return None if repository is None else take_up(store, repository.id, history)


def registered(store: Store, history: History) -> Repository | None:
    """Return the registered repository that a history belongs to, or None."""
    identity = repository_id(history)
    repository = store.repository(identity) if identity else None
    return None if repository is None or repository.removed_at else repository


@contextmanager
def open_registered(worktree: Worktree) -> Iterator[History]:
    """Yield a worktree's history.

    Raises UserError when it cannot be read, or when another repository is at its place now.
    """
    place = Path(worktree.path or worktree.git_dir)
    with closing(open_history(place)) as history:
        same = str(history.git_dir) == worktree.git_dir
        if not same or repository_id(history) != worktree.repository_id:
            raise UserError(
                f"{place} holds another repository than the one that was registered",
                hint="`code2lora init` there registers it too",
            )
        yield history


def forget_removed_worktrees(store: Store) -> None:
    """Forget linked worktrees that git has removed.

    A repository none of whose worktrees is there stays: its disk may just not be mounted.
    """
    for repository in store.repositories():
        worktrees = store.worktrees(repository.id)
        gone = [worktree for worktree in worktrees if not Path(worktree.git_dir).is_dir()]
        if len(gone) < len(worktrees):
            for worktree in gone:
                store.remove_worktree(worktree.id)


def take_up(store: Store, repository_id: str, history: History) -> Worktree:
    """Register a worktree of a registered repository, in the place of one that is gone."""
    for known in store.worktrees(repository_id):
        if not Path(known.git_dir).is_dir():
            store.remove_worktree(known.id)  # the folder was moved or deleted
    place = history.worktree or history.git_dir
    return store.upsert_worktree(repository_id, git_dir=str(history.git_dir), path=str(place))


def _sequencer_active(history: History) -> bool:
    """Tell whether a rebase or `git am` is under way (git-rebase, "rebase-merge directory")."""
    return any((history.git_dir / name).is_dir() for name in ("rebase-merge", "rebase-apply"))
