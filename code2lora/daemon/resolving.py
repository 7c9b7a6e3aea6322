"""Find the adapter that a completion asks for: the live one, a commit's, the generic, or none."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from code2lora.daemon.loading import Models
from code2lora.errors import UserError
from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.state import pack
from code2lora.serving.adapter_cache import LoadedAdapter
from code2lora.serving.answering import Known
from code2lora.serving.completion import AdapterIdentity, Use
from code2lora.state_store import Store
from code2lora.state_store.records import Adapter, Repository, Worktree

_MANY = 8
_FULL_HASH = 40
_LOOK_BACK = 10_000


class StoreResolver:
    """Resolves by the state store.

    `repository` is an id, `ID:WORKTREE` for one worktree, or a name that only one repository has.
    """

    def __init__(self, store: Store, models: Models) -> None:
        self._store = store
        self._models = models

    def resolve(
        self, repository: str | None, commit: str | None, use: Use, files: Sequence[str] = ()
    ) -> LoadedAdapter | None:
        """Return the adapter for a request; None for the base model.

        Where no repository is named, it is the one that holds all of `files`, or the only one.
        Raises UserError when the repository, its adapter or the commit's state is not there.
        """
        if use == "base":
            return None
        engine = self._models.loaded_engine()
        if use == "generic":
            return self._models.generic_adapter()
        named, _, worktree = (repository or "").partition(":")
        repository_id = self._find(named) if named else self._guess(files)
        if commit is not None:
            commit = self._whole(repository_id, commit)
            lora = self._models.reconciler().adapter_at(repository_id, commit)
            generation = f"{commit[:12]}-{_digest(lora)[:12]}"  # a replay may change the state
            identity = AdapterIdentity(repository_id, commit, generation)
            return engine.placed(identity, lambda: (identity, lora))
        return engine.adapter(Path(self._live(repository_id, worktree).path))

    def known(self) -> list[Known]:
        """Return the repositories that are followed, with the commits whose adapters are kept."""
        return [
            Known(
                repository.id,
                repository.name,
                tuple(
                    dict.fromkeys(adapter.commit for adapter in self._store.adapters(repository.id))
                ),
            )
            for repository in self._store.repositories()
        ]

    def _whole(self, repository_id: str, commit: str) -> str:
        """Return the full hash that a commit's beginning stands for; a full one as it is."""
        if len(commit) >= _FULL_HASH:
            return commit
        adapters = self._store.adapters(repository_id, include_pruned=True)
        found = {adapter.commit for adapter in adapters if adapter.commit.startswith(commit)}
        if not found:
            states = self._store.recent_states(repository_id, limit=_LOOK_BACK)
            found = {state.commit for state in states if state.commit.startswith(commit)}
        if len(found) == 1:
            return found.pop()
        raise UserError(
            f"{len(found) or 'no'} commits with a state begin with {commit}",
            hint="give the full hash; `code2lora log` lists the commits that have a state",
        )

    def _find(self, named: str) -> str:
        """Return the id of the repository with this id or name."""
        if self._store.repository(named) is not None:
            return named
        same = [known.id for known in self._store.repositories() if known.name == named]
        if len(same) == 1:
            return same[0]
        if same:
            raise UserError(
                f"{len(same)} repositories are named {named!r}",
                hint=f"name one by its id: {', '.join(same[:_MANY])}",
            )
        raise UserError(
            f"repository {named!r} is not registered",
            hint="name it by its id, which `code2lora status --json` tells, or `init` it",
        )

    def _guess(self, files: Sequence[str]) -> str:
        """Return the id of the one repository that can be meant."""
        worktrees = self._store.worktrees() if files else []
        owners = {owner for file in files if (owner := _owner(file, worktrees)) is not None}
        if len(owners) == 1:
            return owners.pop()
        known = self._store.repositories()
        if len(known) == 1:
            return known[0].id
        raise UserError(
            "no repository is named" if known else "no repository is registered",
            hint=f"ask for a model such as {_example(known)}" if known else "`code2lora init`",
        )

    def _live(self, repository_id: str, worktree: str) -> Adapter:
        """Return the live adapter of one worktree, or of the repository's first that has one."""
        for known in self._store.worktrees(repository_id):
            adapter = self._store.live_adapter(known.id)
            if adapter is not None and worktree in ("", str(known.id)):
                return adapter
        raise UserError(
            "the repository has no adapter yet", hint="`code2lora status` tells how far it is"
        )


def _owner(file: str, worktrees: Sequence[Worktree]) -> str | None:
    """Return the repository in whose innermost worktree a file's name lies."""
    found = [
        (len(worktree.path), worktree.repository_id)
        for worktree in worktrees
        if worktree.path is not None and file.startswith(worktree.path.rstrip("/") + "/")
    ]
    return max(found)[1] if found else None


def _example(known: Sequence[Repository]) -> str:
    return " or ".join(f"`...@{repository.name}`" for repository in known[:_MANY])


def _digest(lora: Lora) -> str:
    """Return what differs whenever the weights do."""
    sides = {f"{side}.{t}": v for side in "ab" for t, v in getattr(lora, side).items()}
    return hashlib.sha256(pack(sides)).hexdigest()
