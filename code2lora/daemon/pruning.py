"""Delete what is old and can be made again: adapter directories, and large states. Torch-free."""

from __future__ import annotations

import logging
from pathlib import Path

from code2lora.adapters.prune import prune
from code2lora.errors import UserError
from code2lora.settings import Settings
from code2lora.state_store import Store

log = logging.getLogger(__name__)

KEPT_EVERY = 32
"""Of old states, the first in each stretch of so many commits stays, so that no switch to an old
commit reads more diffs than that again."""
LARGE_BYTES = 64 * 1024
"""Smaller states and features are kept for ever: 1,000 commits of the commit GRU take 8 MB."""

_BATCH = 16
"""States in one transaction, so that no other writer waits for long."""


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


def thin_repository(store: Store, repository_id: str, settings: Settings) -> int:
    """Let the bytes of a repository's old, large states go; return how many states'.

    They are computed again when they are wanted. The caller holds the repository's lock.
    """
    n_thinned = 0
    for anchor_id in store.anchors_to_thin(repository_id, over_bytes=LARGE_BYTES):
        n = _BATCH
        while n == _BATCH:
            n = store.thin_states(
                anchor_id,
                keep=settings.keep_states,
                every=KEPT_EVERY,
                over_bytes=LARGE_BYTES,
                limit=_BATCH,
            )
            n_thinned += n
    return n_thinned
