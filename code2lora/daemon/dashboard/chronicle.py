"""Tell a worktree's commits with what is stored of each, page by page, in lanes to be drawn.

The first lane is the first parents of HEAD. Others hold what was left behind and has states of its
own (another worktree's HEAD, a branch that was switched away from), down to where it began.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from code2lora.daemon.gain import per_token
from code2lora.daemon.lineage import carried_by, serving_checkpoint
from code2lora.daemon.looking import open_registered
from code2lora.errors import UserError
from code2lora.history.model import Commit, Head, History
from code2lora.state_store import Store
from code2lora.state_store.records import Adapter, Score, StateInfo, Worktree

MAX_LANES = 5

_N_RECENT = 200
"""Stored states among which side branches are looked for."""
_MAX_EXCESS = 50
"""Commits that a page may have beyond what was asked for."""
_MAX_SIDE = 60
"""Commits of one side branch; a longer one is not shown."""


@dataclass(frozen=True, kw_only=True)
class CommitView:
    """One commit and what is stored of it; the figures are None without a state."""

    commit: str
    parent: str | None
    """Its first parent, which need not be on this page."""
    is_merge: bool
    summary: str
    committed_at: datetime
    lane: int
    heads: list[str]
    """Branches, or `detached`, of the worktrees that stand here."""
    mark: str | None
    """`anchor`, `provisional`, `between steps`, `no state`, or None for an ordinary step."""
    is_head: bool
    is_live: bool
    step: int | None
    drift: float | None
    n_tokens: int | None
    n_changed_files: int | None
    embed_ms: float | None
    advance_ms: float | None
    generation: int | None
    """The newest adapter that was published for it, pruned or not."""
    gain_over_base: float | None
    """Nats a token that the adapter before it saved on its added lines; None where not scored."""
    gain_over_generic: float | None
    n_scored_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class Chronicle:
    """One page of commits, newest first; each stands before its parent."""

    commits: list[CommitView]
    n_lanes: int
    following: str | None
    """What to ask for as `before` to get the next page; None at the end."""


@dataclass
class _Lane:
    """A run of first parents, newest first, and the commit of another lane that it grew from."""

    commits: list[Commit]
    root: str | None = None
    n_told: int = 0


@dataclass
class _Known:
    """What is stored of the commits of a page."""

    head: Head
    live: Adapter | None
    infos: dict[str, StateInfo]
    carried: dict[str, str]
    adapters: dict[str, Adapter]
    scores: dict[str, Score] = field(default_factory=dict)
    heads: dict[str, list[str]] = field(default_factory=dict)


def chronicle(store: Store, worktree: Worktree, *, before: str | None, limit: int) -> Chronicle:
    """Return the page of commits that follows `before`, or the first.

    limit: commits of the first lane; side branches come on top of it.

    Raises UserError when git cannot be read or has no such commit.
    """
    with open_registered(worktree) as history:
        head = history.head()
        start = before or head.commit
        if start is None:
            return Chronicle(commits=[], n_lanes=0, following=None)
        walked = list(history.first_parents(start, limit=limit + _MAX_EXCESS + 1))
        main = walked[1:] if before else walked
        n_main = _n_shown(store, worktree, main, limit)
        following = main[n_main - 1].id if n_main < len(main) else None
        main = main[:n_main]
        lanes = [_Lane(main), *_side_lanes(store, worktree, history, main, before)]
    known = _known(store, worktree, head, before, lanes)
    if before:  # a page ends with a state where it can, which may carry what the next begins with
        known.carried |= carried_by(walked[: n_main + 1], known.infos)
    told = [_view(commit, lane, known) for commit, lane in _told(lanes)]
    return Chronicle(commits=told, n_lanes=len(lanes), following=following)


def _n_shown(store: Store, worktree: Worktree, main: Sequence[Commit], limit: int) -> int:
    """Return how many commits make a page: `limit`, or so many more that the last has a state."""
    if len(main) <= limit:
        return len(main)
    excess = [commit.id for commit in main[limit - 1 :]]
    live = store.live_adapter(worktree.id)
    checkpoint = serving_checkpoint(store, worktree.repository_id, live)
    if checkpoint is None:
        return limit
    infos = store.state_infos(worktree.repository_id, checkpoint.fingerprint, excess)
    n_more = next((n for n, commit in enumerate(excess) if commit in infos), 0)
    return limit + n_more


def _side_lanes(
    store: Store,
    worktree: Worktree,
    history: History,
    main: Sequence[Commit],
    before: str | None,
) -> Iterator[_Lane]:
    """Yield the lanes that begin on this page, the one that was at work last before the others."""
    recent = store.recent_states(worktree.repository_id, limit=_N_RECENT)
    followed = {info.parent for info in recent}
    tips = [info.commit for info in recent if info.commit not in followed]
    others = [w.head_commit for w in store.worktrees(worktree.repository_id) if w.head_commit]
    reached = {commit.id for commit in main}
    n_lanes = 1
    for tip in dict.fromkeys([*others, *tips]):
        if n_lanes == MAX_LANES:
            return
        lane = _grown_from(history, tip, reached, before)
        if lane is not None:
            reached.update(commit.id for commit in lane.commits)
            n_lanes += 1
            yield lane


def _grown_from(history: History, tip: str, reached: set[str], before: str | None) -> _Lane | None:
    """Return the first parents of a tip down to one of `reached`.

    None when there is none near, or when they pass `before`, where an earlier page told of them.
    """
    if tip in reached:
        return None
    lane = _Lane([])
    try:
        for commit in history.first_parents(tip, limit=_MAX_SIDE + 1):
            if commit.id in reached:
                lane.root = commit.id
                return lane
            if commit.id == before:
                return None
            lane.commits.append(commit)
    except UserError:  # rewritten, and collected as garbage since
        return None
    return None


def _told(lanes: Sequence[_Lane]) -> Iterator[tuple[Commit, int]]:
    """Yield all commits with their lanes: by time, but each before what it grew from."""
    while True:
        waited_for = {lane.root for lane in lanes if lane.n_told < len(lane.commits)}
        ready = [
            (lane.commits[lane.n_told].committed_at_s, -number)
            for number, lane in enumerate(lanes)
            if lane.n_told < len(lane.commits) and lane.commits[lane.n_told].id not in waited_for
        ]
        if not ready:
            return
        number = -max(ready)[1]
        lane = lanes[number]
        yield lane.commits[lane.n_told], number
        lane.n_told += 1


def _known(
    store: Store, worktree: Worktree, head: Head, before: str | None, lanes: Sequence[_Lane]
) -> _Known:
    live = store.live_adapter(worktree.id)
    known = _Known(head, live, infos={}, carried={}, adapters={})
    for other in store.worktrees(worktree.repository_id):
        seen = Head(other.head_commit, other.head_branch)
        stands = head if other.id == worktree.id else seen
        if stands.commit is not None:
            known.heads.setdefault(stands.commit, []).append(stands.branch or "detached")
    checkpoint = serving_checkpoint(store, worktree.repository_id, live)
    if checkpoint is not None:
        ids = [commit.id for lane in lanes for commit in lane.commits]
        ids += [before] if before else []
        named = (worktree.repository_id, checkpoint.fingerprint, ids)
        known.infos = store.state_infos(*named)
        known.adapters = store.newest_adapters(*named)
        known.scores = store.scores(*named)
        for lane in lanes:
            known.carried |= carried_by(lane.commits, known.infos)
    return known


def _view(commit: Commit, lane: int, known: _Known) -> CommitView:
    info, adapter = known.infos.get(commit.id), known.adapters.get(commit.id)
    score = known.scores.get(commit.id)
    return CommitView(
        commit=commit.id,
        parent=commit.parents[0] if commit.parents else None,
        is_merge=len(commit.parents) > 1,
        summary=commit.summary,
        committed_at=datetime.fromtimestamp(commit.committed_at_s, UTC),
        lane=lane,
        heads=known.heads.get(commit.id, []),
        mark=_mark(commit, info, known),
        is_head=commit.id == known.head.commit,
        is_live=known.live is not None and known.live.commit == commit.id,
        step=info.step if info else None,
        drift=info.drift if info else None,
        n_tokens=info.n_tokens if info else None,
        n_changed_files=info.n_changed_files if info else None,
        embed_ms=info.embed_ms if info else None,
        advance_ms=info.advance_ms if info else None,
        generation=adapter.generation if adapter else None,
        gain_over_base=per_token(score, "base") if score else None,
        gain_over_generic=per_token(score, "generic") if score else None,
        n_scored_tokens=score.n_tokens if score else None,
    )


def _mark(commit: Commit, info: StateInfo | None, known: _Known) -> str | None:
    if info is None:
        return "between steps" if commit.id in known.carried else "no state"
    if info.parent is None:
        return "anchor"
    return "provisional" if info.provisional else None
