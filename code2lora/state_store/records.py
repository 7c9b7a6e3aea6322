"""What goes into the store and what comes out of it, as plain frozen values.

A record never changes and holds no connection: it can cross threads and outlive the store.
Times are aware datetimes in UTC; `commit` is a full hash; blobs are opaque bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

AnchorRole = Literal["provisional", "backfill", "active", "retired"]
"""provisional: an immediate start at HEAD, until the backfill has reached it.
backfill: replays older history in the background; its states answer no look-up yet.
active: what states are computed from.
retired: replaced; has no states, and is kept so that `log` can name it."""

Use = Literal["own", "generic", "base"]
"""own: the adapter made from the repository's state.
generic: the mean training repository's, the same for every state.
base: one that adds nothing, so that the base model answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A repository that was set up with `code2lora init`."""

    id: str
    """uuid4 hex, as in the repository's own git config."""
    path: str
    """Where it was last seen; it may have moved since."""
    name: str
    created_at: datetime
    removed_at: datetime | None
    """When it was set down with `code2lora deinit`; its states are kept for a return."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worktree:
    """One HEAD of a repository, with the adapter that serves it."""

    id: int
    repository_id: str
    git_dir: str
    """This worktree's own git directory; identifies it."""
    path: str | None
    """The working tree's root; None in a bare repository."""
    head_commit: str | None
    """Last HEAD that the daemon has seen; None on an unborn branch."""
    head_branch: str | None
    """Short name; None when detached."""
    live_adapter_id: int | None
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A hypernetwork that states were computed with."""

    fingerprint: str
    encoder_fingerprint: str
    """Features are shared by all checkpoints with the same encoder."""
    name: str
    base_model: str
    config: dict[str, Any]
    first_used_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """A commit whose state comes from its snapshot; the states after it are advanced from there."""

    id: int
    repository_id: str
    checkpoint: str
    commit: str
    role: AnchorRole
    target_commit: str | None
    """Where a backfill is to arrive."""
    total_commits: int | None
    """How many commits a backfill is to absorb after the anchor itself."""
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class NewState:
    """A state to be stored, with what is known about the commit that led to it."""

    commit: str
    parent: str | None
    """The nearest ancestor that is a step, or the anchor; None at the anchor. Where every commit is
    a step, the first parent."""
    step: int
    """Commits since the anchor, those between steps included; 0 at the anchor."""
    state: bytes = field(repr=False)
    committed_at: datetime
    summary: str
    """First line of the commit's message."""
    provisional: bool = False
    """Whether the commit is no step of the checkpoint's stream: its state serves while it is a
    HEAD, and no other is advanced from it."""
    diff_key: str | None = None
    """Content key of the features it was advanced with."""
    features: bytes | None = field(default=None, repr=False)
    """Those features, if they are to be cached under `diff_key`."""
    n_tokens: int = 0
    n_changed_files: int = 0
    embed_ms: float = 0.0
    advance_ms: float = 0.0
    drift: float | None = None
    """1 - cosine to the state of `parent`; None at the anchor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateInfo:
    """All that is known of a stored state, except the state, which may have been thinned."""

    id: int
    anchor_id: int
    repository_id: str
    checkpoint: str
    commit: str
    parent: str | None
    step: int
    provisional: bool
    state_sha256: str
    diff_key: str | None
    n_tokens: int
    n_changed_files: int
    embed_ms: float
    advance_ms: float
    drift: float | None
    committed_at: datetime
    summary: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredState:
    """A state and what is known of it; the bytes have been checked against their digest."""

    info: StateInfo
    state: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """A diff's or a snapshot's encoder output, cached by content."""

    key: str
    blob: bytes = field(repr=False)
    n_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAdapter:
    """An adapter directory that has just been renamed into place."""

    state_id: int
    """The state that it was generated from."""
    path: str
    sha256: str
    """Digest of the weights file."""
    n_bytes: int
    generate_ms: float
    write_ms: float
    use: Use = "own"
    """Whose weights it has; `state_id` is what it serves for in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A published adapter directory."""

    id: int
    repository_id: str
    state_id: int | None
    """None once that state has been replaced by one from an older anchor."""
    checkpoint: str
    commit: str
    generation: int
    """1, 2, 3, ... within the repository, in the order of publication."""
    path: str
    sha256: str
    n_bytes: int
    generate_ms: float
    write_ms: float
    published_at: datetime
    pruned_at: datetime | None
    """When the directory was given up for deletion."""
    use: Use = "own"
    """Whose weights it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewScore:
    """How well a commit's added lines were predicted before the commit was told."""

    repository_id: str
    checkpoint: str
    commit: str
    told: str
    """The commit whose state the own adapter was made from: the first parent, or where that is no
    step, the nearest ancestor that has a state."""
    state_sha256: str
    """Of that state; a replay may have replaced it since."""
    rows_sha256: str
    """Digest of the lines that were asked."""
    n_rows: int
    """Stretches of added lines that were asked; 0 where the commit has none that count."""
    n_tokens: int
    base_nats: float
    """Loss of the base model, summed over the tokens."""
    generic_nats: float
    own_nats: float
    use: Use
    """What the gate serves from this score on."""
    took_ms: float
    """Of the models, loading them left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A `NewScore` as it is stored."""

    id: int
    repository_id: str
    checkpoint: str
    commit: str
    told: str
    state_sha256: str
    rows_sha256: str
    n_rows: int
    n_tokens: int
    base_nats: float
    generic_nats: float
    own_nats: float
    use: Use
    took_ms: float
    scored_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened."""

    id: int
    at: datetime
    repository_id: str | None
    worktree_id: int | None
    kind: str
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Something that went wrong; the same failure again is counted, not added."""

    id: int
    at: datetime
    """The latest time."""
    first_at: datetime
    n_times: int
    repository_id: str
    worktree_id: int | None
    commit: str | None
    stage: str
    message: str
    hint: str | None
    resolved_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackfillProgress:
    """How far the replay of older history has come."""

    anchor: Anchor
    done_commits: int
    """Commits after the anchor up to the newest stored state."""
    latest_at: datetime | None
    """When that was stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What one repository occupies."""

    n_states: int
    n_kept_states: int
    """Those that have not been thinned."""
    state_bytes: int
    """Sum of the packed states alone; divide by `n_kept_states` for the size of one."""
    n_adapters: int
    """Adapter directories that have not been pruned."""
    adapter_bytes: int
