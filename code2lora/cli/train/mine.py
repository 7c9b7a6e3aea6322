"""`code2lora train mine`: from repositories to tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from code2lora.cli import render
from code2lora.cli.options import examples, json_option
from code2lora.cli.progress import progress, stop_on_interrupt
from code2lora.cli.train.options import (
    leave_if,
    out_option,
    recipe_option,
)

if TYPE_CHECKING:
    from code2lora.training.data.mining import Mined, Repository


@click.command(
    "mine",
    epilog=examples(
        ("code2lora train mine ~/src/* --out mined -j 2", "two repositories at a time"),
        ("code2lora train mine torvalds/linux=~/linux --out mined", "say whose it is"),
    ),
)
@click.argument("repositories", nargs=-1, required=True, metavar="[NAME=]PATH...")
@out_option
@recipe_option
@click.option(
    "-j",
    "--workers",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Repositories at a time.",
)
@json_option
def mine(
    repositories: tuple[str, ...], out_dir: Path, recipe_name: str, workers: int, as_json: bool
) -> None:
    """Turn local repositories into training tasks.

    NAME is `owner/name`; it decides whether a repository is trained on or held out. Without one,
    the last two folders of the path are taken. What is finished is skipped.
    """
    from code2lora.training.recipe import load_recipe
    from code2lora.training.run import mine as run_mine

    chosen = [parse_repository(text) for text in repositories]
    recipe = load_recipe(recipe_name)
    with stop_on_interrupt() as stop, progress("mining") as tell:
        results = run_mine(
            recipe,
            chosen,
            out_dir,
            workers=workers,
            progress=lambda mined, done, total: tell(done / total, mined.name),
            stop=stop,
        )
    for failed in (result for result in results if result.status == "failed"):
        render.remark(f"{render.line(failed.name)}: {render.line(failed.reason)}")
    if as_json:
        render.emit_json(results)
    else:
        render.emit(_mined_table(results))
    leave_if(len(results) < len(chosen))


def parse_repository(text: str) -> Repository:
    """Return what `[NAME=]PATH` names. Raises click.UsageError when there is no such directory."""
    from code2lora.training.data.mining import Repository

    name, _, path_text = text.rpartition("=")
    path = Path(path_text).expanduser().absolute()
    if not path.is_dir():
        raise click.UsageError(f"there is no directory {path}")
    return Repository(name or "/".join(path.parts[-2:]), path)


def _mined_table(results: Sequence[Mined]) -> str:
    rows = [
        [result.status, render.line(result.name), f"{sum(result.rows.values()):,}"]
        for result in results
    ]
    return render.table(["STATUS", "REPOSITORY", "ROWS"], rows, right=["ROWS"])
