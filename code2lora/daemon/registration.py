"""Take a repository in, and let it go: what `code2lora init` and `deinit` do.

Writes the repository's own git configuration (`code2lora.id`), the state store and the hooks. The
order makes a kill harmless: rows first, hooks last when taking in; hooks first when letting go.
"""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from code2lora.daemon.control import start_command
from code2lora.daemon.inbox import poke
from code2lora.daemon.locking import repository_lock
from code2lora.daemon.looking import registered, take_up
from code2lora.errors import UserError
from code2lora.history import open_history
from code2lora.history.gitconfig import forget, repository_id
from code2lora.history.model import History
from code2lora.hooks import (
    HookSpec,
    HookTarget,
    InstallReport,
    RemovalReport,
    install,
    remove,
)
from code2lora.settings import Settings
from code2lora.state_store import Store
from code2lora.state_store.records import Repository, Worktree


@dataclass(frozen=True)
class Registration:
    """A repository that is taken in."""

    repository: Repository
    worktree: Worktree
    hooks: InstallReport
    is_new: bool
    """False when it was registered before."""


@dataclass(frozen=True)
class Deregistration:
    """A repository that was let go."""

    repository_id: str
    path: Path
    hooks: RemovalReport


def hook_spec(settings: Settings) -> HookSpec:
    """Return what our hooks do under these settings."""
    return HookSpec(
        inbox=settings.inbox,
        pid_file=settings.pid_file,
        start_command=tuple(start_command(settings)),
    )


def hook_target(history: History) -> HookTarget:
    """Return where a repository's hooks go."""
    return HookTarget(
        git_dir=history.git_dir, common_dir=history.common_dir, worktree=history.worktree
    )


def register(settings: Settings, store: Store, path: Path) -> Registration:
    """Take in the repository at `path`, install its hooks and poke the daemon. Idempotent.

    Raises UserError when there is no repository or its hooks cannot be installed.
    """
    with closing(open_history(path)) as history:
        known = registered(store, history)
        identity = repository_id(history, create=True)
        assert identity is not None
        place = history.worktree or history.git_dir
        # A linked worktree must not give its name to the repository.
        common = history.common_dir
        main = common.parent if common.name == ".git" else place
        repository = store.add_repository(identity, path=str(main), name=main.name)
        worktree = take_up(store, identity, history)
        hooks = install(hook_target(history), hook_spec(settings))
    poke(settings.inbox, "init", place)
    return Registration(repository, worktree, hooks, is_new=known is None)


def deregister(settings: Settings, store: Store, path: Path) -> Deregistration:
    """Remove the hooks, the stored states and the adapters of the repository at `path`.

    One whose folder is gone is found by the path that it had. Raises UserError when it is not
    registered.
    """
    repository = find_registered(store, path)
    with repository_lock(settings, repository.id):
        hooks = RemovalReport(removed=(), left=())
        if path.exists():
            with closing(open_history(path)) as history:
                hooks = remove(hook_target(history), hook_spec(settings))
                forget(history)
        store.forget_repository(repository.id)
        adapters = settings.adapters_dir / repository.id
        if adapters.is_dir() and not adapters.is_symlink():
            shutil.rmtree(adapters)
    poke(settings.inbox, "deinit", Path(repository.path))
    return Deregistration(repository.id, Path(repository.path), hooks)


def find_registered(store: Store, path: Path) -> Repository:
    """Return the registered repository at a path, or, where nothing is, that was last seen there.

    Raises UserError when there is none.
    """
    if path.exists():
        with closing(open_history(path)) as history:
            known = registered(store, history)
    else:
        place = str(path.absolute())
        known = next((r for r in store.repositories() if r.path == place), None)
    if known is None:
        raise UserError(f"{path.absolute()} is not registered", hint="`code2lora status --all`")
    return known
