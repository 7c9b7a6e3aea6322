"""A followed repository and chains of states, for tests and for the processes that tests start."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

from code2lora.state_store import Store
from code2lora.state_store.records import Anchor, AnchorRole, NewAdapter, NewState

REPOSITORY = "0123456789abcdef0123456789abcdef"
OTHER_REPOSITORY = "fedcba9876543210fedcba9876543210"
CHECKPOINT = "checkpoint-1"
ENCODER = "encoder-1"
EPOCH = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


class Clock:
    """A clock that moves one second each time it is read."""

    def __init__(self) -> None:
        self.now = EPOCH

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


def commit_id(n: int, branch: str = "main") -> str:
    """Return the n-th commit hash of a branch."""
    return hashlib.sha1(f"{branch} {n}".encode()).hexdigest()


def new_state(n: int, branch: str = "main", *, size: int = 64, cached: bool = True) -> NewState:
    """Return the state after the n-th commit of a branch whose 0th commit is the anchor."""
    digest = hashlib.sha256(f"{branch} {n}".encode())
    return NewState(
        commit=commit_id(n, branch),
        parent=commit_id(n - 1, branch) if n else None,
        step=n,
        state=(digest.digest() * (size // 32 + 1))[:size],
        committed_at=EPOCH + timedelta(minutes=n),
        summary=f"change {n}",
        diff_key=digest.hexdigest() if n else None,
        features=b"features " + digest.digest() if n and cached else None,
        n_tokens=10 * n,
        n_changed_files=n,
        embed_ms=1.5,
        advance_ms=0.25,
        drift=0.01 * n if n else None,
    )


def register(store: Store, repository_id: str = REPOSITORY) -> None:
    """Register a repository and the checkpoint."""
    store.add_repository(repository_id, path=f"/src/{repository_id[:4]}", name="project")
    store.register_checkpoint(
        CHECKPOINT, encoder_fingerprint=ENCODER, name="mini", base_model="tiny", config={"rank": 8}
    )


def anchored(
    store: Store,
    n_states: int = 0,
    *,
    repository_id: str = REPOSITORY,
    branch: str = "main",
    role: AnchorRole = "active",
) -> Anchor:
    """Return an anchor at a branch's 0th commit, with the states after its first n commits."""
    register(store, repository_id)
    anchor = store.add_anchor(repository_id, CHECKPOINT, commit_id(0, branch), role)
    store.put_states(anchor.id, [new_state(n, branch) for n in range(n_states)])
    return anchor


def new_adapter(state_id: int, path: str) -> NewAdapter:
    """Return the record of an adapter directory."""
    return NewAdapter(
        state_id=state_id, path=path, sha256="5" * 64, n_bytes=1000, generate_ms=3.0, write_ms=4.0
    )
