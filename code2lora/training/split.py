"""Decide by its name alone which repository may be trained on.

buckets 0 to 7   training
bucket 8         validation: looked at while training, and for choosing
bucket 9         test: looked at once, when everything is chosen
"""

from __future__ import annotations

import hashlib

VALIDATION_BUCKET = 8
TEST_BUCKET = 9
HELD_OUT_BUCKETS = frozenset({VALIDATION_BUCKET, TEST_BUCKET})
"""Repositories of these buckets are for evaluation only, in every model of the package."""


def bucket(repository: str) -> int:
    """Return the bucket in 0..9 of an ``owner/name``; case does not matter."""
    return int(hashlib.sha256(repository.lower().encode()).hexdigest(), 16) % 10
