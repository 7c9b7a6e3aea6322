"""Find the adapter that a completion asks for: the live one, a commit's, the generic, or none."""

from __future__ import annotations

from pathlib import Path

from code2lora.daemon.loading import Models
from code2lora.errors import UserError
from code2lora.serving.adapter_cache import LoadedAdapter
from code2lora.serving.completion import AdapterIdentity, Use
from code2lora.state_store import Store
from code2lora.state_store.records import Adapter


class StoreResolver:
    """Resolves by the state store. `repository` is `ID` or, for one worktree, `ID:WORKTREE`."""

    def __init__(self, store: Store, models: Models) -> None:
        self._store = store
        self._models = models

    def resolve(self, repository: str | None, commit: str | None, use: Use) -> LoadedAdapter | None:
        """Return the adapter for a request; None for the base model.

        Raises UserError when the repository, its adapter or the commit's state is not there.
        """
        if use == "base":
            return None
        engine = self._models.loaded_engine()
        if use == "generic":
            checkpoint = self._models.checkpoint()
            identity = AdapterIdentity(None, None, f"generic-{checkpoint.fingerprint[:12]}")
            return engine.place(identity, checkpoint.family.generic())
        repository_id, _, worktree = (repository or "").partition(":")
        if self._store.repository(repository_id) is None:
            raise UserError(
                f"repository {repository_id!r} is not registered",
                hint="name it by its id, which `code2lora status --json` tells, or `init` it",
            )
        if commit is not None:
            lora = self._models.reconciler().adapter_at(repository_id, commit)
            return engine.place(AdapterIdentity(repository_id, commit, commit[:12]), lora)
        return engine.adapter(Path(self._live(repository_id, worktree).path))

    def _live(self, repository_id: str, worktree: str) -> Adapter:
        """Return the live adapter of one worktree, or of the repository's first that has one."""
        for known in self._store.worktrees(repository_id):
            adapter = self._store.live_adapter(known.id)
            if adapter is not None and worktree in ("", str(known.id)):
                return adapter
        raise UserError(
            "the repository has no adapter yet", hint="`code2lora status` tells how far it is"
        )
