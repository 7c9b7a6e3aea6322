"""The `code2lora` command group: which commands there are, and how any of them ends.

A command's module is imported when the command is named; listing them imports all, which is cheap
because what is heavy is imported inside the commands.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import click

from code2lora import __version__
from code2lora.cli import edge
from code2lora.cli.options import GuessingGroup, examples

COMMANDS: Mapping[str, str] = {
    "init": "code2lora.cli.init:init",
    "status": "code2lora.cli.status:status",
    "log": "code2lora.cli.log:log",
    "show": "code2lora.cli.show:show",
    "refresh": "code2lora.cli.refresh:refresh",
    "complete": "code2lora.cli.complete:complete",
    "dashboard": "code2lora.cli.dashboard:dashboard",
    "adapter": "code2lora.cli.adapter:adapter",
    "publish": "code2lora.cli.publish:publish",
    "editor": "code2lora.cli.editor:editor",
    "daemon": "code2lora.cli.daemon:daemon",
    "models": "code2lora.cli.models:models",
    "doctor": "code2lora.cli.doctor:doctor",
    "deinit": "code2lora.cli.deinit:deinit",
    "demo": "code2lora.cli.demo:demo",
    "train": "code2lora.cli.train:train",
    "completion": "code2lora.cli.completion:completion",
}
"""Command -> where it is, in the order of `--help`."""


class Root(GuessingGroup):
    """A group that imports its commands by name and ends by our rules."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of first use, not of the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        where = COMMANDS.get(cmd_name)
        if where is None:
            return None
        module, _, attribute = where.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run a command line and exit with its status."""
        argv = list(sys.argv[1:] if args is None else args)
        edge.soften_streams()
        try:
            status = super().main(argv, "code2lora", complete_var, False, **extra)
            sys.stdout.flush()
        except BrokenPipeError:
            _let_go_of_stdout()
            status = edge.OK
        except Exception as error:  # SystemExit passes
            status = edge.report(error, argv)
        sys.exit(status if isinstance(status, int) else edge.OK)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a reader that has seen enough is no error."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            _let_go_of_stdout()
            ctx.exit(edge.OK)


@click.group(
    "code2lora",
    cls=Root,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96},
    epilog=examples(
        ("code2lora init", "take this repository in and make its first adapter"),
        ("code2lora status", "see what is known and whether it is current"),
        ("code2lora complete app.py:12", "complete from line 12 with the repository's adapter"),
    ),
)
@click.version_option(__version__, message="code2lora %(version)s")
def cli() -> None:
    """Keep a LoRA adapter that knows your repository, fresh at every commit.

    `code2lora init` in a repository is all it takes: from then on every commit refreshes the
    adapter in the background, and `code2lora complete` answers with it.
    """


def _let_go_of_stdout() -> None:
    """Keep the interpreter from complaining, at its end, that nobody reads stdout any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
