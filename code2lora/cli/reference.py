"""Turn the commands into the pages of docs/reference/cli.md.

What the reference says is what `--help` says: both come from the same click objects.
"""

from __future__ import annotations

from collections.abc import Iterator

import click

_WIDTH = 96

_HEAD = """\
# Command reference

Made from the commands' own help by `python docs/generate_reference.py`; do not edit it by hand.

Data goes to stdout, everything else to stderr, so every command can stand in a pipe. Exit status:
0 done, 1 something you can mend (the message says how), 2 wrong usage, 3 a bug in code2lora (its
traceback is in a file that the message names), 130 interrupted.

"""


def walk(command: click.Command, *names: str) -> Iterator[tuple[str, click.Context]]:
    """Yield every command below and including `command`, with its full name, parents first."""
    name = " ".join((*names, command.name or ""))
    ctx = click.Context(
        command,
        info_name=name,
        help_option_names=["-h", "--help"],
        max_content_width=_WIDTH,
        terminal_width=_WIDTH,
    )
    yield name, ctx
    if isinstance(command, click.Group):
        for child in command.list_commands(ctx):
            found = command.get_command(ctx, child)
            assert found is not None
            yield from walk(found, *names, command.name or "")


def render_reference(root: click.Command) -> str:
    """Return the whole page as Markdown."""
    sections = [
        f"{'#' * (2 + (name.count(' ') > 1))} {name}\n\n```text\n{ctx.get_help()}\n```\n"
        for name, ctx in walk(root)
    ]
    return _HEAD + "\n".join(sections)
