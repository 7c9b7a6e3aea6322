"""Gather what `status` shows of one worktree, from the database, git and the process table.

Reads only, and needs neither the daemon nor the model: it works when both are dead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from code2lora.cli.place import Place
from code2lora.cli.processes import DaemonView, daemon_view
from code2lora.errors import UserError
from code2lora.settings import Settings

if TYPE_CHECKING:
    from code2lora.history.model import Commit, History
    from code2lora.hooks import HookState
    from code2lora.state_store.records import (
        Adapter,
        BackfillProgress,
        Checkpoint,
        Event,
        Failure,
        Sizes,
        StateInfo,
    )

MAX_QUEUE = 200
"""Commits walked back from HEAD in search of one whose state is stored."""
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
    sizes: Sizes


def overview(place: Place) -> Overview:
    """Return the overview of a registered worktree. Raises UserError when git cannot be read."""
    store, repository = place.store, place.repository
    head = place.history.head()
    recent: list[Commit] = []
    if head.commit is not None:
        recent = list(islice(place.history.first_parents(head.commit), MAX_QUEUE + 1))
    live = store.live_adapter(place.worktree.id)
    checkpoint = checkpoint_of(place, live)
    infos: dict[str, StateInfo] = {}
    if checkpoint is not None:
        ids = [commit.id for commit in recent]
        infos = store.state_infos(repository.id, checkpoint.fingerprint, ids)
    return Overview(
        repository_id=repository.id,
        name=repository.name,
        path=str(place.path),
        branch=head.branch,
        head=_head_view(recent[0], head.branch) if recent else None,
        state=_state_view(place, recent, infos),
        adapter=_adapter_view(live, head.commit),
        queue=_queue_view(recent, infos) if recent else None,
        backfill=(
            store.backfill_progress(repository.id, checkpoint.fingerprint) if checkpoint else None
        ),
        drift=_drift_views(recent, infos),
        last_success=store.last_success(repository.id),
        last_failure=store.last_failure(repository.id),
        hooks=hook_states(place.settings, place.history),
        daemon=daemon_view(place.settings),
        model=checkpoint.name if checkpoint else place.settings.model,
        checkpoint=checkpoint.fingerprint if checkpoint else None,
        audit=audit_view(place.settings, checkpoint.name if checkpoint else None),
        sizes=store.sizes(repository.id),
    )


def checkpoint_of(place: Place, live: Adapter | None) -> Checkpoint | None:
    """Return the checkpoint whose states the repository is served from, None before the first."""
    from code2lora.daemon.lineage import serving_checkpoint

    return serving_checkpoint(place.store, place.repository.id, live)


def audit_view(settings: Settings, name: str | None) -> AuditView | None:
    """Return what the audit of a model found; None when its files are not there or are wrong.

    name: of the model whose states are stored; None takes the one in the settings
    """
    from code2lora.cli import audits
    from code2lora.hypernetwork.identity import read_config
    from code2lora.hypernetwork.models import resolve_model

    try:
        model = resolve_model(settings.model, settings.models_dir)
        if name is not None and model.name != name:
            model = resolve_model(name, settings.models_dir)
        record = read_config(model.hypernetwork).audit
    except UserError:
        return None
    return AuditView(verdict=audits.verdict(record), text=audits.in_a_line(record))


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


def _state_view(
    place: Place, recent: Sequence[Commit], infos: dict[str, StateInfo]
) -> StateView | None:
    nearest = next((infos[commit.id] for commit in recent if commit.id in infos), None)
    if nearest is None:
        return None
    anchor = place.store.anchor(nearest.anchor_id)
    return StateView(
        commit=nearest.commit,
        step=nearest.step,
        provisional_since=nearest.parent if nearest.provisional else None,
        anchor=anchor.commit if anchor else nearest.commit,
        anchor_role=anchor.role if anchor else "retired",
        created_at=nearest.created_at,
    )


def _adapter_view(live: Adapter | None, head: str | None) -> AdapterView | None:
    if live is None:
        return None
    return AdapterView(
        path=live.path,
        commit=live.commit,
        generation=live.generation,
        sha256=live.sha256,
        n_bytes=live.n_bytes,
        published_at=live.published_at,
        is_current=live.commit == head,
        on_disk=Path(live.path).is_dir(),
    )


def _queue_view(recent: Sequence[Commit], infos: dict[str, StateInfo]) -> QueueView:
    for behind, commit in enumerate(recent):
        if commit.id in infos:
            return QueueView(commits=behind, is_bounded=False)
    return QueueView(commits=min(len(recent), MAX_QUEUE), is_bounded=True)


def _drift_views(recent: Sequence[Commit], infos: dict[str, StateInfo]) -> list[DriftView]:
    views = []
    for commit in recent[:N_DRIFTS]:
        info = infos.get(commit.id)
        if info is not None and info.drift is not None and not info.provisional:
            views.append(DriftView(commit=info.commit, drift=info.drift))
    return views[::-1]
