"""Gather what `status` shows of one worktree, from the database, git and the process table.

Reads only, and needs neither the daemon nor the model: it works when both are dead.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from code2lora.cli.place import Place
from code2lora.cli.processes import DaemonView, daemon_view
from code2lora.settings import Settings

if TYPE_CHECKING:
    from code2lora.daemon.gain import Standing
    from code2lora.daemon.position import Nearest, Position
    from code2lora.history.model import Commit, History
    from code2lora.hooks import HookState
    from code2lora.state_store.records import (
        Adapter,
        BackfillProgress,
        Checkpoint,
        Event,
        Failure,
        Sizes,
        Use,
    )

N_DRIFTS = 40


@dataclass(frozen=True, kw_only=True)
class HeadView:
    """Where the worktree stands."""

    commit: str
    branch: str | None
    summary: str
    committed_at: datetime


@dataclass(frozen=True, kw_only=True)
class AdapterView:
    """The live adapter."""

    path: str
    commit: str
    generation: int
    sha256: str
    n_bytes: int
    published_at: datetime
    is_current: bool
    """Whether it is the adapter of HEAD."""
    on_disk: bool
    use: Use
    """Whose weights it has: the repository's own, the generic adapter's, or none."""


@dataclass(frozen=True, kw_only=True)
class StateView:
    """The stored state nearest to HEAD."""

    commit: str
    step: int
    """Commits since the anchor."""
    provisional_since: str | None
    """The last step before it, if the commit is no step of the model's stream itself."""
    anchor: str
    anchor_role: str
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class QueueView:
    """What is still to be absorbed."""

    commits: int
    """Commits from HEAD back to the nearest stored state."""
    is_bounded: bool
    """True when there may be more than `commits`: the walk was cut off, or nothing is stored."""


@dataclass(frozen=True, kw_only=True)
class DriftView:
    """How far one step moved the state: 1 - cosine."""

    commit: str
    drift: float


@dataclass(frozen=True, kw_only=True)
class AuditView:
    """Whether the model's adapters were found to know their repositories."""

    verdict: str
    """`passed`, `failed`, `incomplete` or `not audited`."""
    text: str
    """The verdict with its reason, one line."""


@dataclass(frozen=True, kw_only=True)
class Overview:
    """All that `status` shows of one worktree."""

    repository_id: str
    name: str
    path: str
    branch: str | None
    head: HeadView | None
    """None on an unborn branch."""
    state: StateView | None
    adapter: AdapterView | None
    queue: QueueView | None
    """None on an unborn branch."""
    backfill: BackfillProgress | None
    drift: list[DriftView]
    """Oldest first."""
    last_success: Event | None
    last_failure: Failure | None
    hooks: tuple[HookState, ...]
    daemon: DaemonView
    model: str
    """Name of the model whose states are shown; the one in the settings when there are none."""
    checkpoint: str | None
    audit: AuditView | None
    """None when the model's files cannot be read."""
    standing: Standing | None
    """What the running gain is and what serves for it; None before the first state."""
    score_commits: int
    """The setting: 0 where no commit is scored."""
    sizes: Sizes


def overview(place: Place) -> Overview:
    """Return the overview of a registered worktree. Raises UserError when git cannot be read."""
    from code2lora.daemon.position import position, read_head

    store, repository = place.store, place.repository
    head, recent = read_head(place.history)
    here = position(place.settings, store, place.worktree, head, recent)
    checkpoint = here.checkpoint
    return Overview(
        repository_id=repository.id,
        name=repository.name,
        path=str(place.path),
        branch=head.branch,
        head=_head_view(recent[0], head.branch) if recent else None,
        state=_state_view(here.nearest),
        adapter=_adapter_view(here),
        queue=_queue_view(here) if recent else None,
        backfill=here.backfill,
        drift=_drift_views(here),
        last_success=store.last_success(repository.id),
        last_failure=store.last_failure(repository.id),
        hooks=hook_states(place.settings, place.history),
        daemon=daemon_view(place.settings),
        model=checkpoint.name if checkpoint else place.settings.model,
        checkpoint=checkpoint.fingerprint if checkpoint else None,
        audit=audit_view(place.settings, checkpoint),
        standing=here.standing,
        score_commits=place.settings.score_commits,
        sizes=store.sizes(repository.id),
    )


def checkpoint_of(place: Place, live: Adapter | None) -> Checkpoint | None:
    """Return the checkpoint whose states the repository is served from, None before the first."""
    from code2lora.daemon.lineage import serving_checkpoint

    return serving_checkpoint(place.store, place.repository.id, live)


def audit_view(settings: Settings, checkpoint: Checkpoint | None) -> AuditView | None:
    """Return what the audit of a model found; None when its files are not there or are wrong.

    checkpoint: whose states are stored; None takes the model in the settings
    """
    from code2lora.cli import audits
    from code2lora.daemon.position import shown_model

    shown = shown_model(settings, checkpoint)
    if shown is None:
        return None
    config = shown[1]
    text = audits.in_a_line(config.audit) + audits.not_written_better(config.metrics)
    return AuditView(verdict=audits.verdict(config.audit), text=text)


def hook_states(settings: Settings, history: History) -> tuple[HookState, ...]:
    """Return how the hook of every event stands."""
    from code2lora.daemon.registration import hook_spec, hook_target
    from code2lora.hooks import inspect

    return inspect(hook_target(history), hook_spec(settings)).states


def _head_view(commit: Commit, branch: str | None) -> HeadView:
    return HeadView(
        commit=commit.id,
        branch=branch,
        summary=commit.summary,
        committed_at=datetime.fromtimestamp(commit.committed_at_s, UTC),
    )


def _state_view(nearest: Nearest | None) -> StateView | None:
    if nearest is None:
        return None
    info = nearest.info
    return StateView(
        commit=info.commit,
        step=info.step,
        provisional_since=info.parent if info.provisional else None,
        anchor=nearest.anchor_commit,
        anchor_role=nearest.anchor_role,
        created_at=info.created_at,
    )


def _adapter_view(here: Position) -> AdapterView | None:
    live = here.live
    if live is None:
        return None
    return AdapterView(
        path=live.path,
        commit=live.commit,
        generation=live.generation,
        sha256=live.sha256,
        n_bytes=live.n_bytes,
        published_at=live.published_at,
        is_current=here.is_current,
        on_disk=Path(live.path).is_dir(),
        use=live.use,
    )


def _queue_view(here: Position) -> QueueView:
    from code2lora.daemon.position import MAX_BEHIND

    if here.nearest is not None:
        return QueueView(commits=here.nearest.behind, is_bounded=False)
    return QueueView(commits=min(len(here.recent), MAX_BEHIND), is_bounded=True)


def _drift_views(here: Position) -> list[DriftView]:
    views = []
    for commit in here.recent[:N_DRIFTS]:
        info = here.infos.get(commit.id)
        if info is not None and info.drift is not None and not info.provisional:
            views.append(DriftView(commit=info.commit, drift=info.drift))
    return views[::-1]
