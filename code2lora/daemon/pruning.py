"""Delete the adapter directories that are neither new nor live. Torch-free."""

from __future__ import annotations

from pathlib import Path

from code2lora.adapters.prune import prune
from code2lora.settings import Settings
from code2lora.state_store import Store


def prune_repository(store: Store, repository_id: str, settings: Settings) -> int:
    """Delete a repository's adapters beyond the newest few; return how many.

    A pruned adapter is regenerated from its state when it is wanted again.
    """
    n_pruned = 0
    for adapter in store.adapters_to_prune(repository_id, keep=settings.keep_adapters):
        if store.mark_pruned(adapter.id):
            prune([Path(adapter.path)], settings.adapters_dir)
            n_pruned += 1
    return n_pruned
