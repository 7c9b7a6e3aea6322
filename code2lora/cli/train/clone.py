"""`code2lora train clone`: public repositories at pinned commits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from code2lora.cli import render
from code2lora.cli.options import examples, json_option
from code2lora.cli.progress import progress, stop_on_interrupt
from code2lora.cli.train.options import leave_if, out_option
from code2lora.errors import UserError

if TYPE_CHECKING:
    from code2lora.training.data.cloning import Cloned

pins_option = click.option(
    "--list",
    "list_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="One `owner/name COMMIT` a line, # starts a comment.  [default: those of the bundled "
    "recipes]",
)
source_option = click.option(
    "--from",
    "source",
    default="https://github.com/",
    show_default=True,
    metavar="URL",
    help="What names are appended to; https or file.",
)


@click.command(
    "clone",
    epilog=examples(
        ("code2lora train clone --out clones -j 4", "what the bundled recipes learn from"),
        ("code2lora train clone --list mine.txt --out clones", "repositories of your own choice"),
        ("code2lora train mine --list clones/list.txt --out mined", "then mine them"),
    ),
)
@out_option
@pins_option
@source_option
@click.option(
    "-j",
    "--workers",
    default=4,
    show_default=True,
    type=click.IntRange(min=1),
    help="Repositories at a time.",
)
@json_option
def clone(out_dir: Path, list_file: Path | None, source: str, workers: int, as_json: bool) -> None:
    """Clone public repositories at the commits that a list pins.

    Each comes with its whole history up to that commit, without a working tree, into OUT; nothing
    of it is run. What is there is skipped. Writes OUT/list.txt, which `train mine --list` takes.
    """
    from code2lora.training.data import cloning

    pins = cloning.read_pins(list_file)
    with stop_on_interrupt() as stop, progress("cloning") as tell:
        results = cloning.clone(
            pins,
            out_dir,
            source=source,
            workers=workers,
            progress=lambda result, done, total: tell(done / total, result.name),
            stop=stop,
        )
    failures = [result for result in results if result.status == "failed"]
    for failed in failures:
        render.remark(f"{failed.name}: {render.line(failed.reason)}")
    if failures and len(failures) == len(results):
        raise UserError(
            f"none of {render.count(len(pins), 'repository', 'repositories')} could be cloned",
            hint=f"see whether {source} can be reached",
        )
    if as_json:
        render.emit_json(results)
    else:
        render.emit(_table(results))
    leave_if(len(results) < len(pins))


def _table(results: Sequence[Cloned]) -> str:
    rows = [[result.status, result.name] for result in results]
    return render.table(["STATUS", "REPOSITORY"], rows)
