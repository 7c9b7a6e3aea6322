"""A diff into the key under which what is made of it can be kept.

Equal keys mean equal input to an encoder, so an amended, rebased or cherry-picked commit whose
patch did not change is recognised. Which files count, and how they are cut, is part of the recipe
and not of the key.
"""

from __future__ import annotations

import hashlib

from code2lora.history.model import Diff


def lines_key(diff: Diff) -> str:
    """Return a sha256 over the paths, the statuses and the added and removed lines.

    Line numbers, context, blob ids and commit ids do not count: the same edit elsewhere in a file
    has the same key.
    """
    digest = hashlib.sha256(b"lines\n")
    for change in diff.changes:
        fields = (change.path, change.old_path or "", change.status, change.added, change.removed)
        for field in fields:
            data = field.encode()
            digest.update(b"%d\n" % len(data))
            digest.update(data)
    return digest.hexdigest()


def unified_key(diff: Diff) -> str:
    """Return a sha256 over the unified text, so over all that `git diff` would print."""
    return hashlib.sha256(b"unified\n" + diff.unified.encode()).hexdigest()
