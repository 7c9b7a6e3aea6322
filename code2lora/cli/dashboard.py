"""`code2lora dashboard`: open the local page in a browser."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path
from typing import Any

import click

from code2lora.cli import render
from code2lora.cli.options import examples, json_option, path_argument
from code2lora.errors import UserError

_DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY")


@click.command(
    "dashboard",
    epilog=examples(
        ("code2lora dashboard", "look at the repository around the current directory"),
        ("code2lora dashboard --no-open", "print the address alone"),
    ),
)
@path_argument
@click.option("--no-open", is_flag=True, help="Only print the address.")
@json_option
@click.pass_context
def dashboard(ctx: click.Context, path: Path, no_open: bool, as_json: bool) -> None:
    """Open a page with states, adapters and a playground.

    The model worker serves it, on 127.0.0.1 alone; starts the daemon when it does not run. The
    address that is printed logs one browser in, once, within a minute.
    """
    from click.core import ParameterSource

    from code2lora.cli.waiting import ensure_daemon
    from code2lora.serving.client import WorkerClient
    from code2lora.serving.door import LOGIN
    from code2lora.settings import LOOPBACK_ADDRESS, load_settings

    is_asked_for = ctx.get_parameter_source("path") is not ParameterSource.DEFAULT
    place = _place(path, must=is_asked_for)
    settings = load_settings()
    ensure_daemon(settings)
    with WorkerClient(settings.socket) as client:
        told = client.post("/daemon/dashboard", {})
    url = f"http://{LOOPBACK_ADDRESS}:{told['port']}{LOGIN}?code={told['code']}"
    url += f"&place={place}" if place is not None else ""
    opened = not no_open and _open(url)
    if as_json:
        render.emit_json({"url": url, "valid_s": told["code_life_s"], "opened": opened})
        return
    render.emit(url)
    _remark(told, opened=opened, no_open=no_open)


def _place(path: Path, *, must: bool) -> int | None:
    """Return the number of the worktree at a path, None where there is none and need not be."""
    from code2lora.cli.place import has_database, open_place, open_store
    from code2lora.settings import load_settings

    try:
        with open_place(path) as place:
            return place.worktree.id
    except UserError:
        settings = load_settings()
        if must or not has_database(settings):
            raise
        with open_store(settings) as store:
            if not store.repositories():
                raise
    return None


def _open(url: str) -> bool:
    """Open a browser with a window, if there is one; tell whether it was."""
    if sys.platform != "darwin" and not any(os.environ.get(name) for name in _DISPLAYS):
        return False  # or a browser for terminals would take this one
    try:
        return webbrowser.open(url)
    except webbrowser.Error:
        return False


def _remark(told: dict[str, Any], *, opened: bool, no_open: bool) -> None:
    life = render.span(told["code_life_s"])
    if opened:
        render.remark("opened in your browser")
        return
    if not no_open:
        port = told["port"]
        render.remark(f"no browser here; from afar, `ssh -L {port}:127.0.0.1:{port} HOST` first")
    render.remark(f"the address works once, within {life}")
