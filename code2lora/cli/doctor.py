"""`code2lora doctor`: look at everything that must be right, and say what to do where it is not."""

from __future__ import annotations

from pathlib import Path

import click

from code2lora.cli import edge, render
from code2lora.cli.options import examples, json_option, path_argument


@click.command(
    "doctor",
    epilog=examples(
        ("code2lora doctor", "this machine and this repository"),
        ("code2lora doctor --json", "for a bug report"),
    ),
)
@path_argument
@json_option
@click.pass_context
def doctor(ctx: click.Context, path: Path, as_json: bool) -> None:
    """Check git, hooks, database, daemon, model and disk.

    Each line is `ok`, `warn` or `fail`; a hint says what to do. Changes nothing. Exits with 1 when
    a check fails.
    """
    from code2lora.cli.checks import examine

    checks = examine(path)
    if as_json:
        render.emit_json(checks)
    else:
        styles = {"ok": "green", "warn": "yellow", "fail": "red"}
        for check in checks:
            mark = render.styled(f"{check.status:<4}", styles[check.status])
            render.emit(f"{mark}  {check.name}: {render.clean(check.detail)}")
            if check.hint:
                render.emit(f"      hint: {render.clean(check.hint)}")
    if any(check.status == "fail" for check in checks):
        ctx.exit(edge.USER_ERROR)
