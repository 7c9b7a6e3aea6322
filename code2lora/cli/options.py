"""Parameters and help text that several commands share."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from code2lora.cli.edge import Hinted
from code2lora.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])


class GuessingGroup(click.Group):
    """A group that names the nearest command when the one that was asked for is not there."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is meant. Raises Hinted when there is none."""
        name, known = args[0], self.list_commands(ctx)
        if name not in known and not name.startswith("-"):
            near = difflib.get_close_matches(name, known, n=1)
            path = ctx.command_path
            hint = f"did you mean `{path} {near[0]}`?" if near else f"`{path} --help`"
            raise Hinted(f"there is no command `{path} {name}`", hint, ctx)
        return super().resolve_command(ctx, args)


class Folder(click.Path):
    """A place in a repository; a file is refused in plain words."""

    def __init__(self, *, exists: bool = True) -> None:
        super().__init__(exists=exists, file_okay=False, path_type=Path)

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        """Return the path. Raises Hinted when it is a file."""
        if Path(value).is_file():
            raise Hinted(
                f"a directory is expected, but {value} is a file",
                f"give the directory that it is in: {Path(value).parent}",
                ctx,
            )
        return super().convert(value, param, ctx)


def examples(*lines: tuple[str, str]) -> str:
    """Return an epilog of commands with what each is for."""
    width = max(len(command) for command, _ in lines)
    listed = "\n".join(f"  {command:<{width}}   {purpose}" for command, purpose in lines)
    return f"\b\nExamples:\n{listed}"


def path_argument(function: F) -> F:
    """Add `[PATH]`: a place in the repository, by default here."""
    return click.argument(
        "path",
        default=".",
        type=Folder(),
    )(function)


def path_option(function: F) -> F:
    """Add `--repo PATH`, where the arguments are something else."""
    return click.option(
        "--repo",
        "path",
        default=".",
        metavar="PATH",
        help="A place in the repository.  [default: here]",
        type=Folder(),
    )(function)


def json_option(function: F) -> F:
    """Add `--json`."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document instead of text."
    )(function)


def timeout_option(function: F) -> F:
    """Add `--timeout SECONDS`, as `timeout_s`."""
    return click.option(
        "--timeout",
        "timeout_s",
        default=300.0,
        show_default=True,
        metavar="SECONDS",
        type=click.FloatRange(min=0, min_open=True),
        help="Give up waiting after this long; the daemon goes on.",
    )(function)


def yes_option(function: F) -> F:
    """Add `--yes`."""
    return click.option("--yes", "-y", is_flag=True, help="Do not ask.")(function)


def confirm(question: str, *, yes: bool) -> None:
    """Return if the user agrees.

    Raises UserError when there is nobody to ask, click.Abort when the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError("this needs your confirmation", hint="add `--yes`")
    click.confirm(question, abort=True, err=True)
