"""Gather what the dashboard shows of one worktree, beside its commits. Torch-free, read-only.

Nothing here is relative to the time of asking, so that two answers are equal unless something has
happened in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from code2lora.daemon.gain import Standing
from code2lora.daemon.looking import open_registered
from code2lora.daemon.position import Nearest, Position, position, read_head, shown_model
from code2lora.errors import UserError
from code2lora.history.model import Commit, Head
from code2lora.hypernetwork.config import CheckpointConfig
from code2lora.settings import Settings
from code2lora.state_store import Store
from code2lora.state_store.records import (
    BackfillProgress,
    Checkpoint,
    Failure,
    Use,
    Worktree,
)

_N_REFRESHES = 40
_N_FAILURES = 20


@dataclass(frozen=True, kw_only=True)
class Place:
    """One worktree that can be looked at."""

    worktree: int
    repository: str
    name: str
    path: str
    branch: str | None
    """As the daemon has seen it last; None when detached."""


@dataclass(frozen=True, kw_only=True)
class HeadView:
    """Where the worktree stands."""

    commit: str
    branch: str | None
    summary: str


@dataclass(frozen=True, kw_only=True)
class AdapterView:
    """The live adapter."""

    commit: str
    generation: int
    name: str
    """Of its directory; completions name the generation that answered by it."""
    published_at: datetime
    n_bytes: int
    is_current: bool
    """Whether it is the adapter of HEAD."""
    use: Use
    """Whose weights it has."""


@dataclass(frozen=True, kw_only=True)
class StateView:
    """The stored state nearest to HEAD."""

    commit: str
    step: int
    provisional: bool
    anchor: str
    anchor_role: str
    behind: int
    """Commits from HEAD back to it."""


@dataclass(frozen=True, kw_only=True)
class BackfillView:
    """How far the replay of older history has come."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class RefreshView:
    """What one generation took to make, its waiting left out."""

    generation: int
    name: str
    commit: str
    published_at: datetime
    embed_ms: float | None
    """None, as `advance_ms`, when its state has been replaced."""
    advance_ms: float | None
    publish_ms: float


@dataclass(frozen=True, kw_only=True)
class ModelView:
    """The model, and what was found of it on repositories that it had never seen."""

    name: str
    base: str
    checkpoint: str
    verdict: str | None
    """Of the audit; None when there was none."""
    tests: list[dict[str, Any]]
    """The audit's, each with its name."""
    n_audited: int
    gain_over_base: float | None
    """Nats a token that own adapters save; None when it was not measured."""
    gain_over_generic: float | None
    n_measured: int
    """Repositories that the gain was measured on."""


@dataclass(frozen=True, kw_only=True)
class PlaceView(Place):
    """All that is shown of one worktree, beside its commits."""

    problem: str | None
    """Why git cannot be read; what is stored is shown all the same."""
    head: HeadView | None
    """None on an unborn branch."""
    adapter: AdapterView | None
    state: StateView | None
    backfill: BackfillView | None
    standing: Standing | None
    """The running gain and what serves for it; None before the first state."""
    model: ModelView | None
    n_states: int
    n_adapters: int
    adapter_bytes: int
    refreshes: list[RefreshView]
    """The newest, oldest first."""
    failures: list[Failure]
    """Those that are not resolved, newest first."""
    newest_state: int | None
    """Tells when there is a new one."""


def places(store: Store) -> list[Place]:
    """Return every worktree, by the name of its repository."""
    names = {repository.id: repository.name for repository in store.repositories()}
    found = [
        _place(worktree, names[worktree.repository_id])
        for worktree in store.worktrees()
        if worktree.repository_id in names
    ]
    return sorted(found, key=lambda place: (place.name.casefold(), place.worktree))


def place_view(settings: Settings, store: Store, worktree: Worktree) -> PlaceView:
    """Return what is known of a worktree. A repository that cannot be read is a `problem`."""
    repository = store.repository(worktree.repository_id)
    head, recent, problem = _read_git(worktree)
    here = position(settings, store, worktree, head, recent)
    sizes = store.sizes(worktree.repository_id)
    newest = store.recent_states(worktree.repository_id, limit=1)
    return PlaceView(
        **asdict(_place(worktree, repository.name if repository else "")),
        problem=problem,
        head=_head_view(head, recent),
        adapter=_adapter_view(here),
        state=_state_view(here.nearest),
        backfill=_backfill_view(here.backfill),
        standing=here.standing,
        model=_model_view(settings, here.checkpoint),
        n_states=sizes.n_states,
        n_adapters=sizes.n_adapters,
        adapter_bytes=sizes.adapter_bytes,
        refreshes=_refresh_views(store, worktree.repository_id),
        failures=store.failures(worktree.repository_id, limit=_N_FAILURES),
        newest_state=newest[0].id if newest else None,
    )


def _place(worktree: Worktree, name: str) -> Place:
    return Place(
        worktree=worktree.id,
        repository=worktree.repository_id,
        name=name,
        path=worktree.path or worktree.git_dir,
        branch=worktree.head_branch,
    )


def _read_git(worktree: Worktree) -> tuple[Head, list[Commit], str | None]:
    """Return HEAD, its nearest first parents, and why not if they cannot be read."""
    try:
        with open_registered(worktree) as history:
            return *read_head(history), None
    except UserError as error:
        return Head(worktree.head_commit, worktree.head_branch), [], error.message


def _head_view(head: Head, recent: Sequence[Commit]) -> HeadView | None:
    if head.commit is None:
        return None
    summary = recent[0].summary if recent else ""
    return HeadView(commit=head.commit, branch=head.branch, summary=summary)


def _adapter_view(here: Position) -> AdapterView | None:
    live = here.live
    if live is None:
        return None
    return AdapterView(
        commit=live.commit,
        generation=live.generation,
        name=Path(live.path).name,
        published_at=live.published_at,
        n_bytes=live.n_bytes,
        is_current=here.is_current,
        use=live.use,
    )


def _state_view(nearest: Nearest | None) -> StateView | None:
    if nearest is None:
        return None
    return StateView(
        commit=nearest.info.commit,
        step=nearest.info.step,
        provisional=nearest.info.provisional,
        anchor=nearest.anchor_commit,
        anchor_role=nearest.anchor_role,
        behind=nearest.behind,
    )


def _backfill_view(progress: BackfillProgress | None) -> BackfillView | None:
    if progress is None or progress.anchor.total_commits is None:
        return None
    return BackfillView(done=progress.done_commits, total=progress.anchor.total_commits)


def _refresh_views(store: Store, repository_id: str) -> list[RefreshView]:
    adapters = store.adapters(repository_id, include_pruned=True, limit=_N_REFRESHES)[::-1]
    infos = {
        (checkpoint, commit): info
        for checkpoint in {adapter.checkpoint for adapter in adapters}
        for commit, info in store.state_infos(
            repository_id, checkpoint, [a.commit for a in adapters if a.checkpoint == checkpoint]
        ).items()
    }
    views = []
    for adapter in adapters:
        info = infos.get((adapter.checkpoint, adapter.commit))
        of_it = info if info is not None and info.id == adapter.state_id else None
        views.append(
            RefreshView(
                generation=adapter.generation,
                name=Path(adapter.path).name,
                commit=adapter.commit,
                published_at=adapter.published_at,
                embed_ms=of_it.embed_ms if of_it else None,
                advance_ms=of_it.advance_ms if of_it else None,
                publish_ms=adapter.generate_ms + adapter.write_ms,
            )
        )
    return views


def _model_view(settings: Settings, checkpoint: Checkpoint | None) -> ModelView | None:
    """Return the model that serves, or will; None when its files cannot be read."""
    shown = shown_model(settings, checkpoint)
    if shown is None:
        return None
    model, config = shown
    audit = config.audit
    tests = audit.tests if audit else {}
    return ModelView(
        name=model.name,
        base=config.base.id,
        checkpoint=checkpoint.fingerprint if checkpoint else "",
        verdict=audit.verdict if audit else None,
        tests=[{"name": name, **asdict(test)} for name, test in tests.items()],
        n_audited=audit.n_repositories if audit else 0,
        gain_over_base=_gain(config, "own_minus_base"),
        gain_over_generic=_gain(config, "own_minus_generic"),
        n_measured=int(config.metrics.get("n_repositories", 0)),
    )


def _gain(config: CheckpointConfig, comparison: str) -> float | None:
    """Return how many nats a token the own adapter saves; the audit's word before the figures'."""
    tests = config.audit.tests if config.audit else {}
    if comparison in tests and tests[comparison].mean is not None:
        return -float(tests[comparison].mean or 0.0)
    figure = config.metrics.get(comparison)
    return -float(figure) if isinstance(figure, int | float) else None
