"""`code2lora log`: the history of the state along the commits that led to HEAD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import click

from code2lora.cli import render
from code2lora.cli.options import examples, json_option, path_argument

if TYPE_CHECKING:
    from code2lora.cli.place import Place
    from code2lora.history.model import Commit
    from code2lora.state_store.records import Score, StateInfo


@dataclass(frozen=True, kw_only=True)
class LogEntry:
    """One commit and what is stored of it; the figures are None without a state."""

    commit: str
    summary: str
    committed_at: datetime
    has_state: bool
    is_live: bool
    """Whether the live adapter is this commit's."""
    is_anchor: bool
    is_provisional: bool
    """Whether it is no step of the model's stream, and its state only served while it was HEAD."""
    is_between_steps: bool
    """Whether it has no state because a later step, or HEAD's provisional state, carries it too."""
    step: int | None = None
    drift: float | None = None
    n_tokens: int | None = None
    n_changed_files: int | None = None
    embed_ms: float | None = None
    advance_ms: float | None = None
    generation: int | None = None
    """The newest adapter that was published for it, pruned or not."""
    gain_over_base: float | None = None
    """Nats a token that its parent's adapter saved on its added lines; None where not scored, and
    where no line counted."""
    gain_over_generic: float | None = None
    n_scored_tokens: int | None = None


@click.command(
    "log",
    epilog=examples(
        ("code2lora log", "the newest 20 commits"),
        ("code2lora log -n 500 | less", "more of them"),
        ("code2lora log --json", "for programs"),
    ),
)
@path_argument
@click.option(
    "-n",
    "--max-count",
    "limit",
    default=20,
    show_default=True,
    type=click.IntRange(min=1),
    help="Show at most this many commits.",
)
@json_option
def log(path: Path, limit: int, as_json: bool) -> None:
    """Show the states along the first parents of HEAD, newest first.

    STEP counts commits since the anchor, DRIFT is how far a commit moved the state (1 - cosine),
    GEN the generation of the adapter that was published for it, and GAIN how many nats a token the
    adapter of the state before the commit saved on the lines that the commit added, over the base
    model. What was read, how long it took and the gain over the generic adapter are in `--json`.
    `(live)` stands before the commit whose adapter serves, `(anchor)` where the chain of states
    starts, `(no state)` where nothing is stored.

    For some models only some commits are steps of the state: `(between steps)` stands before one
    whose change came in with a later commit, `(provisional)` before one that had a state of its own
    only because it was HEAD.
    """
    from code2lora.cli.place import NO_COMMIT, open_place

    with open_place(path) as place:
        entries = log_entries(place, limit)
    if as_json:
        render.emit_json(entries)
    elif entries:
        render.emit(_render(entries))
    else:
        render.remark(NO_COMMIT)


def log_entries(place: Place, limit: int) -> list[LogEntry]:
    """Return the newest `limit` first parents of HEAD with what is stored of each."""
    from code2lora.cli.overview import checkpoint_of
    from code2lora.daemon.lineage import carried_by

    head = place.history.head().commit
    if head is None:
        return []
    commits = list(islice(place.history.first_parents(head), limit))
    live = place.store.live_adapter(place.worktree.id)
    checkpoint = checkpoint_of(place, live)
    infos: dict[str, StateInfo] = {}
    scores: dict[str, Score] = {}
    generations: dict[str, int] = {}
    if checkpoint is not None:
        ids = [commit.id for commit in commits]
        infos = place.store.state_infos(place.repository.id, checkpoint.fingerprint, ids)
        scores = place.store.scores(place.repository.id, checkpoint.fingerprint, ids)
        for adapter in reversed(place.store.adapters(place.repository.id, include_pruned=True)):
            if adapter.checkpoint == checkpoint.fingerprint:
                generations[adapter.commit] = adapter.generation
    live_commit = live.commit if live else None
    carried = carried_by(commits, infos)
    return [
        _entry(
            commit,
            infos.get(commit.id),
            generations.get(commit.id),
            scores.get(commit.id),
            is_live=live_commit == commit.id,
            is_between_steps=commit.id in carried,
        )
        for commit in commits
    ]


def _entry(
    commit: Commit,
    info: StateInfo | None,
    generation: int | None,
    score: Score | None,
    *,
    is_live: bool,
    is_between_steps: bool,
) -> LogEntry:
    from code2lora.daemon.gain import per_token

    committed_at = datetime.fromtimestamp(commit.committed_at_s, UTC)
    entry = LogEntry(
        commit=commit.id,
        summary=commit.summary,
        committed_at=committed_at,
        has_state=info is not None,
        is_live=is_live,
        is_anchor=info is not None and info.parent is None,
        is_provisional=info is not None and info.provisional,
        is_between_steps=is_between_steps,
        generation=generation,
        gain_over_base=per_token(score, "base") if score else None,
        gain_over_generic=per_token(score, "generic") if score else None,
        n_scored_tokens=score.n_tokens if score else None,
    )
    if info is None:
        return entry
    return replace(
        entry,
        step=info.step,
        drift=info.drift,
        n_tokens=info.n_tokens,
        n_changed_files=info.n_changed_files,
        embed_ms=info.embed_ms,
        advance_ms=info.advance_ms,
    )


def _render(entries: Sequence[LogEntry]) -> str:
    now = datetime.now(UTC)
    rows = [
        [
            render.short(entry.commit),
            render.span((now - entry.committed_at).total_seconds()),
            _or_dash(entry.step, "d"),
            _or_dash(entry.drift, ".4f"),
            _or_dash(entry.generation, "d"),
            "-" if entry.gain_over_base is None else render.gain(entry.gain_over_base),
            f"{_marks(entry)}{render.line(entry.summary)}",
        ]
        for entry in entries
    ]
    headers = ["COMMIT", "AGE", "STEP", "DRIFT", "GEN", "GAIN", "SUMMARY"]
    right = ["AGE", "STEP", "DRIFT", "GEN", "GAIN"]
    return render.table(headers, rows, right=right, elastic="SUMMARY")


def _marks(entry: LogEntry) -> str:
    marks = [
        ("live", entry.is_live),
        ("anchor", entry.is_anchor),
        ("provisional", entry.is_provisional),
        ("between steps", entry.is_between_steps),
        ("no state", not entry.has_state and not entry.is_between_steps),
    ]
    words = ", ".join(word for word, holds in marks if holds)
    return f"({words}) " if words else ""


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
