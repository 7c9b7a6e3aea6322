"""Find what a command is about: settings, the state store, the registered worktree at a path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from code2lora.errors import UserError
from code2lora.settings import Settings, load_settings

if TYPE_CHECKING:
    from code2lora.history.model import History
    from code2lora.state_store import Store
    from code2lora.state_store.records import Repository, Worktree

NO_COMMIT = "there is no commit yet: the first one makes the adapter"


@dataclass(frozen=True)
class Place:
    """A registered worktree, open for questions."""

    settings: Settings
    store: Store
    history: History
    repository: Repository
    worktree: Worktree

    @property
    def path(self) -> Path:
        """The working tree's root, or the git directory of a bare repository."""
        return self.history.worktree or self.history.git_dir

    def resolve(self, revision: str) -> str:
        """Return the full hash of a commit. Raises UserError when the revision names none."""
        try:
            return self.history.resolve(revision)
        except UserError:
            require_commit(self)
            raise


@contextmanager
def open_store(settings: Settings) -> Iterator[Store]:
    """Yield the state store, made and upgraded if need be. Raises UserError when it is damaged."""
    from code2lora.state_store import Store

    settings.prepare()
    with Store.open(settings.resolved_database_url) as store:
        yield store


@contextmanager
def open_place(path: Path) -> Iterator[Place]:
    """Yield the registered worktree at a path.

    Raises UserError when there is no repository, or when it is not registered.
    """
    from code2lora.history import open_history

    settings = load_settings()
    with closing(open_history(path)) as history:
        if not has_database(settings):
            raise not_registered(history)
        with open_store(settings) as store:
            yield place_of(settings, store, history)


def place_of(settings: Settings, store: Store, history: History) -> Place:
    """Return the registered worktree of an open history. Raises UserError when there is none."""
    from code2lora.daemon.looking import registered, take_up

    repository = registered(store, history)
    if repository is None:
        raise not_registered(history)
    worktree = store.find_worktree(str(history.git_dir))
    if worktree is None or worktree.repository_id != repository.id:
        worktree = take_up(store, repository.id, history)  # moved, or a new linked worktree
    return Place(settings, store, history, repository, worktree)


def require_commit(place: Place) -> None:
    """Raise UserError on an unborn branch, unless an adapter is live from before."""
    if place.history.head().commit is None and place.store.live_adapter(place.worktree.id) is None:
        raise UserError(NO_COMMIT)


def not_registered(history: History) -> UserError:
    """Return the error for a repository that `init` has not seen."""
    place = history.worktree or history.git_dir
    return UserError(f"{place} is not registered", hint=f"`code2lora init {place}`")


def has_database(settings: Settings) -> bool:
    """Tell whether there is a database to ask; asking for one that is missing would make it."""
    return settings.database_url is not None or os.path.exists(settings.state_dir / "state.db")
