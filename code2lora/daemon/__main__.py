"""`python -m code2lora.daemon start|run|worker`: what hooks, service managers and we ourselves run.

The user's commands are `code2lora daemon ...`; this entry spares a hook the import of the CLI.
"""

from __future__ import annotations

import argparse
import logging
import logging.handlers
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from code2lora.daemon.control import DIRECTORIES, start, supervisor_log, worker_log
from code2lora.errors import UserError
from code2lora.settings import Settings, load_settings

_LOG_BYTES = 4_000_000
_LOG_FILES = 3
_CHATTY = ("apscheduler", "alembic", "asyncio", "filelock", "watchdog")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the daemon's processes. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="code2lora.daemon")
    verbs = parser.add_subparsers(dest="verb", required=True)
    starter = verbs.add_parser("start", help="start the supervisor in the background")
    for name in DIRECTORIES:
        starter.add_argument(f"--{name.replace('_', '-')}", help=f"as CODE2LORA_{name.upper()}")
    verbs.add_parser("run", help="run the supervisor in the foreground")
    worker = verbs.add_parser("worker", help="serve on an inherited socket; for the supervisor")
    worker.add_argument("--socket", type=int, required=True)
    worker.add_argument("--lifeline", type=int, required=True)
    worker.add_argument("--tcp", type=int)
    options = parser.parse_args(arguments)
    try:
        if options.verb == "start":
            named = {name: getattr(options, name) for name in DIRECTORIES}
            # The supervisor and its worker inherit them.
            os.environ.update({f"CODE2LORA_{k.upper()}": v for k, v in named.items() if v})
            start(load_settings(), os.environ)
            return 0
        settings = load_settings()
        if options.verb == "run":
            return run(settings)
        _log_to_file(settings, worker_log(settings))
        from code2lora.daemon.worker import run_worker

        run_worker(settings, options.socket, options.lifeline, options.tcp)
    except UserError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 1
    return 0


def run(settings: Settings) -> int:
    """Run the supervisor in this process until a signal ends it."""
    from code2lora.daemon.supervisor import Supervisor

    settings.prepare()
    _log_to_file(settings, supervisor_log(settings))
    Supervisor(settings, os.environ).run()
    return 0


def _log_to_file(settings: Settings, path: Path) -> None:
    """Send the log of this process to a file of its own, kept small by rotation."""
    handler = logging.handlers.RotatingFileHandler(
        path, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES
    )
    logging.basicConfig(
        level=settings.log_level,
        handlers=[handler],
        format="%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s",
    )
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
