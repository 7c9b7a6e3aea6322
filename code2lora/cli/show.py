"""`code2lora show`: everything that is stored of one commit."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from code2lora.cli import render
from code2lora.cli.options import examples, json_option, path_option
from code2lora.errors import UserError

if TYPE_CHECKING:
    from code2lora.cli.place import Place
    from code2lora.history.model import Commit
    from code2lora.state_store.records import Adapter, Anchor, Checkpoint, StateInfo


@dataclass(frozen=True, kw_only=True)
class CommitView:
    """A commit, its state, and the adapters made from it."""

    commit: str
    author: str
    committed_at: datetime
    summary: str
    state: StateInfo
    state_bytes: int | None
    """None where the state was thinned: it is computed again when it is wanted."""
    anchor: Anchor | None
    checkpoint: Checkpoint
    adapters: list[Adapter]
    """Newest first, pruned ones included."""
    is_live: bool


@click.command(
    "show",
    epilog=examples(
        ("code2lora show HEAD", "the state of the current commit"),
        ("code2lora show v1.2 --json", "of a tag, for programs"),
    ),
)
@click.argument("commit")
@path_option
@json_option
def show(commit: str, path: Path, as_json: bool) -> None:
    """Show what is stored of COMMIT, any revision of git's."""
    from code2lora.cli.place import open_place

    with open_place(path) as place:
        view = commit_view(place, commit)
    if as_json:
        render.emit_json(_as_json(view))
    else:
        render.emit(_render(view))


def commit_view(place: Place, revision: str) -> CommitView:
    """Return what is stored of a commit. Raises UserError when there is no state of it."""
    from code2lora.cli.overview import checkpoint_of

    commit: Commit = place.history.commit(place.resolve(revision))
    live = place.store.live_adapter(place.worktree.id)
    checkpoint = checkpoint_of(place, live)
    infos: dict[str, StateInfo] = {}
    if checkpoint is not None:
        key = (place.repository.id, checkpoint.fingerprint)
        infos = place.store.state_infos(*key, [commit.id])
    if checkpoint is None or commit.id not in infos:
        raise _no_state(place, commit, checkpoint)
    info = infos[commit.id]
    stored = place.store.state_at(info.anchor_id, commit.id)
    published = place.store.adapters(place.repository.id, include_pruned=True)
    return CommitView(
        commit=commit.id,
        author=commit.author,
        committed_at=datetime.fromtimestamp(commit.committed_at_s, UTC),
        summary=commit.summary,
        state=info,
        state_bytes=None if stored is None else len(stored.state),
        anchor=place.store.anchor(info.anchor_id),
        checkpoint=checkpoint,
        adapters=[adapter for adapter in published if adapter.commit == commit.id],
        is_live=live is not None and live.commit == commit.id,
    )


def _no_state(place: Place, commit: Commit, checkpoint: Checkpoint | None) -> UserError:
    """Return the error for a commit without a state; one between steps has none for a reason."""
    bearer = _bearer(place, commit, checkpoint) if checkpoint else None
    if bearer is not None:
        return UserError(
            f"commit {render.short(commit.id)} is between steps: "
            f"its change is in the state of {render.short(bearer)}",
            hint=f"`code2lora show {render.short(bearer)}`",
        )
    return UserError(
        f"no state is stored for commit {render.short(commit.id)}",
        hint="`code2lora log` lists the commits that have one",
    )


def _bearer(place: Place, commit: Commit, checkpoint: Checkpoint) -> str | None:
    """Return the commit near HEAD whose state carries the change of one between steps."""
    from code2lora.daemon.lineage import carried_by
    from code2lora.daemon.position import MAX_BEHIND

    head = place.history.head().commit
    if head is None:
        return None
    walked = list(place.history.first_parents(head, limit=MAX_BEHIND))
    ids = [each.id for each in walked]
    infos = place.store.state_infos(place.repository.id, checkpoint.fingerprint, ids)
    return carried_by(walked, infos).get(commit.id)


def _as_json(view: CommitView) -> dict[str, Any]:
    """Return the view without the checkpoint's configuration, which `models show` prints."""
    checkpoint = {
        "fingerprint": view.checkpoint.fingerprint,
        "name": view.checkpoint.name,
        "base_model": view.checkpoint.base_model,
    }
    return {**view.__dict__, "checkpoint": checkpoint}


def _render(view: CommitView) -> str:
    state = view.state
    rows = [
        ("commit", view.commit),
        ("author", render.line(view.author)),
        ("date", f"{view.committed_at:%Y-%m-%d %H:%M:%S} UTC"),
        ("parent", _parent(view)),
        ("step", _step(view)),
        ("state", f"sha256 {state.state_sha256}, {_size(view)}"),
        ("drift", "-" if state.drift is None else f"{state.drift:.6f}"),
        ("read", _read(state)),
        ("took", _took(state)),
        (
            "model",
            f"{view.checkpoint.name}, checkpoint {render.short(view.checkpoint.fingerprint)}",
        ),
        *(("adapter", _adapter(adapter)) for adapter in view.adapters),
        ("live", "yes" if view.is_live else "no"),
    ]
    return f"{render.styled(render.line(view.summary), 'bold')}\n{render.fields(rows)}"


def _size(view: CommitView) -> str:
    if view.state_bytes is None:
        return "thinned: computed again when it is wanted"
    return render.size(view.state_bytes)


def _parent(view: CommitView) -> str:
    if view.state.parent is None:
        return "none: the state was read from the snapshot"
    if view.state.provisional:
        return f"{view.state.parent}, the last step; this state is provisional"
    return view.state.parent


def _step(view: CommitView) -> str:
    if view.anchor is None:
        return str(view.state.step)
    return (
        f"{view.state.step} after the {view.anchor.role} anchor {render.short(view.anchor.commit)}"
    )


def _read(state: StateInfo) -> str:
    files = render.count(state.n_changed_files, "file")
    return f"{files}, {render.count(state.n_tokens, 'token')}"


def _took(state: StateInfo) -> str:
    embed, advance = render.span(state.embed_ms / 1e3), render.span(state.advance_ms / 1e3)
    return f"{embed} to read, {advance} to advance"


def _adapter(adapter: Adapter) -> str:
    place = "pruned" if adapter.pruned_at else adapter.path
    whose = "" if adapter.use == "own" else f", {adapter.use} weights"
    return f"generation {adapter.generation}{whose}, {render.size(adapter.n_bytes)}, {place}"
