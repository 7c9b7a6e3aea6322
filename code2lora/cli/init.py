"""`code2lora init`: take a repository in, and wait for its first adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from code2lora.cli import render
from code2lora.cli.options import examples, json_option, path_argument, timeout_option

if TYPE_CHECKING:
    from code2lora.cli.place import Place
    from code2lora.cli.waiting import Arrival, Stages
    from code2lora.daemon.registration import Registration
    from code2lora.hooks import HookState


@dataclass(frozen=True, kw_only=True)
class InitView:
    """What `init` did."""

    repository_id: str
    path: str
    is_new: bool
    hooks: tuple[HookState, ...]
    commit: str | None
    """None on an unborn branch, or when the adapter was not waited for."""
    adapter: str | None
    waited_s: float | None
    backfill_commits: int
    """Older commits that are replayed in the background from here on."""


@click.command(
    "init",
    epilog=examples(
        ("code2lora init", "the repository around the current directory"),
        ("code2lora init ~/src/project", "another one"),
        ("code2lora init --no-wait", "return at once; `code2lora status` tells when it is there"),
    ),
)
@path_argument
@click.option("--no-wait", is_flag=True, help="Return before the first adapter is there.")
@timeout_option
@json_option
def init(path: Path, no_wait: bool, timeout_s: float, as_json: bool) -> None:
    """Take a repository in and make its first adapter.

    The adapter is made at once from the files at HEAD; older history is replayed in the background
    and sharpens it. From then on every commit refreshes it. Running it again is harmless and mends
    the hooks.
    """
    from code2lora.cli.place import open_place, open_store
    from code2lora.cli.waiting import ensure_daemon, moment, stages, wait_for_head
    from code2lora.daemon.registration import register
    from code2lora.settings import load_settings

    settings = load_settings()
    with stages() as tell, open_store(settings) as store:
        since = moment()
        registration = register(settings, store, path)
        _tell_registration(tell, registration)
        tell.now("starting the daemon")
        if ensure_daemon(settings):
            tell.done("daemon started")
        with open_place(path) as place:
            is_born = place.history.head().commit is not None
            arrival = None
            if is_born and not no_wait:
                arrival = wait_for_head(place, tell, timeout_s=timeout_s, since=since)
                tell.done(f"adapter published after {render.span(arrival.waited_s)}")
            view = _view(registration, place, arrival)
    if as_json:
        render.emit_json(view)
        return
    _print(view)
    _print_next(view, is_born)


def _tell_registration(tell: Stages, registration: Registration) -> None:
    place = render.clean(registration.repository.path)
    tell.done(f"{'registered' if registration.is_new else 'registered before'}: {place}")
    states = registration.hooks.states
    n_installed = sum(state.status == "installed" for state in states)
    tell.done(f"{n_installed} of {render.count(len(states), 'hook')} installed")
    for state in registration.hooks.blocked:
        tell.done(f"{state.event} cannot be installed: {render.line(state.reason or 'unknown')}")
        for advice in (state.hint, state.line):
            if advice:
                tell.done(f"  {render.clean(advice)}")


def _view(registration: Registration, place: Place, arrival: Arrival | None) -> InitView:
    adapter = arrival.adapter if arrival else None
    waiting = None
    if adapter is not None:
        waiting = place.store.backfill_progress(place.repository.id, adapter.checkpoint)
    return InitView(
        repository_id=registration.repository.id,
        path=str(place.path),
        is_new=registration.is_new,
        hooks=registration.hooks.states,
        commit=adapter.commit if adapter else None,
        adapter=adapter.path if adapter else None,
        waited_s=arrival.waited_s if arrival else None,
        backfill_commits=(waiting.anchor.total_commits or 0) if waiting else 0,
    )


def _print(view: InitView) -> None:
    if view.adapter is not None and view.commit is not None:
        rows = [("commit", view.commit), ("adapter", render.clean(view.adapter))]
        render.emit(render.fields(rows))


def _print_next(view: InitView, is_born: bool) -> None:
    from code2lora.cli.place import NO_COMMIT

    if not is_born:
        render.remark(NO_COMMIT)
        return
    if view.adapter is None:
        render.remark("the adapter is being made: `code2lora status --watch`")
        return
    if view.backfill_commits:
        older = render.count(view.backfill_commits, "older commit")
        render.remark(f"{older} are replayed in the background: `code2lora status` shows how far")
    render.remark("every commit refreshes the adapter from now on")
    render.remark("next: `code2lora complete FILE:LINE --compare`, `code2lora status`")
