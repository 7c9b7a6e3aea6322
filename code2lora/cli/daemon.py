"""`code2lora daemon`: start, stop and look at the background process."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from code2lora.cli import edge, render
from code2lora.cli.options import GuessingGroup, examples, json_option

if TYPE_CHECKING:
    from code2lora.cli.processes import ProcessView

_FOLLOW_INTERVAL_S = 0.2


@click.group(
    "daemon",
    cls=GuessingGroup,
    epilog=examples(
        ("code2lora daemon status", "does it run, and what does it hold"),
        ("code2lora daemon logs -f", "watch it work"),
        ("code2lora daemon install", "start it at login"),
    ),
)
def daemon() -> None:
    """Start, stop and look at the background process.

    Nobody needs to: `init`, the hooks and `complete` start it when it does not run.
    """


@daemon.command("start", epilog=examples(("code2lora daemon start", "harmless if it runs")))
def start() -> None:
    """Start the daemon in the background unless it runs."""
    from code2lora.daemon import control
    from code2lora.settings import load_settings

    settings = load_settings()
    was_running = control.supervisor_status(settings).running
    now = control.start(settings, os.environ)
    word = "runs already" if was_running else "started"
    render.emit(f"{word}, process {now.pid}" if now.pid else word)


@daemon.command(
    "stop", epilog=examples(("code2lora daemon stop", "the next commit starts it again"))
)
def stop() -> None:
    """Stop the daemon and its model worker; no work is lost."""
    from code2lora.daemon import control
    from code2lora.settings import load_settings

    render.emit("stopped" if control.stop(load_settings()) else "was not running")


@daemon.command(
    "restart", epilog=examples(("code2lora daemon restart", "after a change of the settings"))
)
def restart() -> None:
    """Stop the daemon if it runs, and start it."""
    from code2lora.daemon import control
    from code2lora.settings import load_settings

    settings = load_settings()
    control.stop(settings)
    now = control.start(settings, os.environ)
    render.emit(f"started, process {now.pid}" if now.pid else "started")


@daemon.command(
    "status",
    epilog=examples(
        ("code2lora daemon status", "exit status 1 when it does not run"),
        ("code2lora daemon status --json", "for programs"),
    ),
)
@json_option
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Show whether the daemon runs, its processes, and where it logs."""
    from code2lora.cli.processes import daemon_view
    from code2lora.daemon.control import supervisor_log, worker_log
    from code2lora.daemon.platform import service_file
    from code2lora.settings import load_settings

    settings = load_settings()
    view = daemon_view(settings)
    service = service_file(Path.home())
    if as_json:
        render.emit_json(
            {
                "running": view.running,
                "supervisor": view.supervisor,
                "worker": view.worker,
                "socket": settings.socket,
                "logs": [supervisor_log(settings), worker_log(settings)],
                "service": service if service.exists() else None,
            }
        )
    else:
        rows = [
            ("daemon", _process(view.supervisor) if view.running else "not running"),
            ("worker", _process(view.worker) if view.worker else "not loaded"),
            ("socket", str(settings.socket)),
            ("logs", f"{supervisor_log(settings)}\n{worker_log(settings)}"),
            ("at login", str(service) if service.exists() else "no: `code2lora daemon install`"),
        ]
        render.emit(render.fields(rows))
    if not view.running:
        ctx.exit(edge.USER_ERROR)


@daemon.command(
    "logs",
    epilog=examples(
        ("code2lora daemon logs -n 100", "the last hundred lines"),
        ("code2lora daemon logs -f --worker", "follow the model worker until ^C"),
    ),
)
@click.option("-f", "--follow", is_flag=True, help="Stay and print what is added, until ^C.")
@click.option(
    "-n",
    "--lines",
    "n_lines",
    default=20,
    show_default=True,
    type=click.IntRange(min=0),
    help="Print this many of the last lines first.",
)
@click.option("--worker", is_flag=True, help="The model worker's log, not the supervisor's.")
def logs(follow: bool, n_lines: int, worker: bool) -> None:
    """Print the end of the daemon's log."""
    from code2lora.daemon.control import supervisor_log, worker_log
    from code2lora.settings import load_settings

    settings = load_settings()
    path = worker_log(settings) if worker else supervisor_log(settings)
    if not path.exists() and not follow:
        render.remark(f"nothing is logged yet in {path}")
        return
    for text in last_lines(path, n_lines):
        click.echo(render.clean(text))
    if follow:
        with edge.ends_by_interrupt():
            for text in added_lines(path):
                click.echo(render.clean(text))


@daemon.command(
    "run",
    epilog=examples(("code2lora daemon run", "see what goes wrong at the start; ^C stops it")),
)
def run() -> None:
    """Run the daemon in the foreground; its log goes to the terminal too."""
    from code2lora.daemon.__main__ import run as run_supervisor
    from code2lora.settings import load_settings

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("code2lora").addHandler(handler)
    run_supervisor(load_settings())


@daemon.command(
    "install", epilog=examples(("code2lora daemon install", "systemd on Linux, launchd on macOS"))
)
def install() -> None:
    """Have the system start the daemon when you log in."""
    from code2lora.daemon.service import install_service

    path = install_service(Path.home(), os.environ)
    render.emit(f"installed {path}")


@daemon.command(
    "uninstall", epilog=examples(("code2lora daemon uninstall", "hooks still start it when needed"))
)
def uninstall() -> None:
    """Stop starting the daemon at login."""
    from code2lora.daemon.service import remove_service

    render.emit("removed" if remove_service(Path.home()) else "was not installed")


def last_lines(path: Path, n: int) -> list[str]:
    """Return the last `n` lines of a log; none of a file that is not there."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            size, block = file.tell(), b""
            # Lines of a log are short; one window of this size holds more than enough of them.
            file.seek(max(0, size - 400 * (n + 1)))
            block = file.read()
            if block.count(b"\n") <= n and len(block) < size:
                file.seek(0)
                block = file.read()
    except FileNotFoundError:
        return []
    lines = block.decode("utf-8", "replace").splitlines()
    return lines[-n:] if n else []


def added_lines(path: Path) -> Iterator[str]:
    """Yield each line that is written to a log from now on, over its rotations; never ends."""
    at = path.stat().st_size if path.exists() else 0
    rest = ""
    while True:
        size = path.stat().st_size if path.exists() else 0
        if size < at:  # rotated: go on with the new file
            at = 0
        if size > at:
            with open(path, "rb") as file:
                file.seek(at)
                block = file.read()
            at += len(block)
            *whole, rest = (rest + block.decode("utf-8", "replace")).split("\n")
            yield from whole
        time.sleep(_FOLLOW_INTERVAL_S)


def _process(view: ProcessView | None) -> str:
    if view is None:
        return "runs"
    since = render.span((datetime.now(UTC) - view.started_at).total_seconds())
    return f"process {view.pid}, {render.size(view.rss_bytes)}, for {since}"
