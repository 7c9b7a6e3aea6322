"""Delete the adapter directories that are neither new nor live. Torch-free."""

from __future__ import annotations

import logging
from pathlib import Path

from code2lora.adapters.prune import prune
from code2lora.errors import UserError
from code2lora.settings import Settings
from code2lora.state_store import Store

log = logging.getLogger(__name__)


def prune_repository(store: Store, repository_id: str, settings: Settings) -> int:
    """Delete a repository's adapters beyond the newest few; return how many.

    A pruned adapter is regenerated from its state when it is wanted again.
    """
    n_pruned = 0
    for adapter in store.adapters_to_prune(repository_id, keep=settings.keep_adapters):
        if store.mark_pruned(adapter.id):
            try:
                n_pruned += len(prune([Path(adapter.path)], settings.adapters_dir))
            except UserError as error:  # it lies elsewhere, or cannot be removed: not our refresh
                log.warning("%s", error)
    return n_pruned
