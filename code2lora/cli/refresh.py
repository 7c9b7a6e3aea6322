"""`code2lora refresh`: bring the adapter to HEAD now, and say how long it took."""

from __future__ import annotations

import time
from pathlib import Path

import click

from code2lora.cli import render
from code2lora.cli.options import examples, json_option, path_argument, timeout_option


@click.command(
    "refresh",
    epilog=examples(
        ("code2lora refresh", "after something that runs no hooks, or to see how long it takes"),
        ("code2lora refresh --json", "for programs: commit, adapter, time"),
    ),
)
@path_argument
@timeout_option
@json_option
def refresh(path: Path, timeout_s: float, as_json: bool) -> None:
    """Make the adapter of HEAD live, and wait until it is.

    Hooks do this after every commit; nobody needs this command for them.
    """
    from code2lora.cli.place import NO_COMMIT, open_place
    from code2lora.cli.waiting import ensure_daemon, moment, stages, wait_for_head
    from code2lora.daemon.inbox import poke

    with stages() as tell, open_place(path) as place:
        if place.history.head().commit is None:
            render.remark(NO_COMMIT)
            return
        began_s, since = time.monotonic(), moment()
        before = place.store.live_adapter(place.worktree.id)
        poke(place.settings.inbox, "refresh", place.path)
        if ensure_daemon(place.settings):
            tell.done("daemon started")
        adapter = wait_for_head(place, tell, timeout_s=timeout_s, since=since).adapter
        took_s = time.monotonic() - began_s
    changed = before is None or before.id != adapter.id
    if as_json:
        render.emit_json(
            {
                "commit": adapter.commit,
                "adapter": adapter.path,
                "generation": adapter.generation,
                "changed": changed,
                "took_s": took_s,
            }
        )
        return
    rows = [
        ("commit", adapter.commit),
        ("adapter", render.clean(adapter.path)),
        ("took", render.span(took_s) if changed else f"{render.span(took_s)}, was current"),
    ]
    render.emit(render.fields(rows))
