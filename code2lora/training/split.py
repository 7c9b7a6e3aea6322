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


def cross_repo_split(repository: str) -> str:
    """Return `train`, `cr_val` or `cr_test`: what an ``owner/name`` may be used for."""
    return {VALIDATION_BUCKET: "cr_val", TEST_BUCKET: "cr_test"}.get(bucket(repository), "train")


def in_repo_splits(n_commits: int) -> list[str]:
    """Return `train`, `ir_val` or `ir_test` for each commit of a repository, oldest first.

    Four fifths, a tenth and the rest, at least one each; fewer than three commits all train.
    """
    if n_commits < 3:
        return ["train"] * n_commits
    n_val = max(1, n_commits // 10)
    n_train = min(n_commits * 8 // 10, n_commits - n_val - 1)
    return ["train"] * n_train + ["ir_val"] * n_val + ["ir_test"] * (n_commits - n_train - n_val)
