"""`code2lora train mine`: from repositories to tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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
    from code2lora.training.data.leakage import Leaks
    from code2lora.training.data.mining import Mined, Repository


@click.command(
    "mine",
    epilog=examples(
        ("code2lora train mine ~/src/* --out mined -j 2", "two repositories at a time"),
        ("code2lora train mine torvalds/linux=~/linux --out mined", "say whose it is"),
        ("code2lora train mine --list repositories.txt --out mined", "those that a file lists"),
        ("code2lora train mine ~/src/* --recipe paper --out mined", "the paper's steps and tasks"),
    ),
)
@click.argument("repositories", nargs=-1, metavar="[NAME=]PATH...")
@click.option(
    "--list",
    "list_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Read more repositories from a file: one [NAME=]PATH a line, # starts a comment.",
)
@out_option
@recipe_option
@click.option(
    "--stream",
    type=click.Choice(["commits", "assertions"]),
    help="Which commits are steps, in place of the recipe's: all, or those that change an "
    "assertion of a Python test.",
)
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
    repositories: tuple[str, ...],
    list_file: Path | None,
    out_dir: Path,
    recipe_name: str,
    stream: Literal["commits", "assertions"] | None,
    workers: int,
    as_json: bool,
) -> None:
    """Turn local repositories into training tasks.

    NAME is `owner/name`; it decides whether a repository is trained on or held out. Without one,
    the last two folders of the path are taken. What is finished is skipped. At the end, tasks that
    training has seen are looked for; no evaluation asks them.
    """
    from code2lora.training.data.leakage import read_leaks
    from code2lora.training.recipe import load_recipe
    from code2lora.training.run import mine as run_mine

    listed = read_list(list_file) if list_file is not None else []
    chosen = [parse_repository(text) for text in [*repositories, *listed]]
    if not chosen:
        raise click.UsageError("no repository is given: name some, or a file with --list")
    recipe = load_recipe(recipe_name)
    if stream is not None:
        recipe = dataclasses.replace(recipe, mine=dataclasses.replace(recipe.mine, stream=stream))
    with stop_on_interrupt() as stop, progress("mining") as tell:
        results = run_mine(
            recipe,
            chosen,
            out_dir,
            workers=workers,
            progress=lambda mined, done, total: tell(done / total, mined.name),
            stop=stop,
        )
    report_failures(results)
    if any(result.status != "failed" for result in results):
        render.remark(leaks_line(read_leaks(out_dir)))
    if as_json:
        render.emit_json(results)
    else:
        render.emit(mined_table(results))
    leave_if(len(results) < len(chosen))


def read_list(path: Path) -> list[str]:
    """Return the repositories that a file lists, paths taken from the file's own folder.

    Raises click.UsageError when it is no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{path} is not UTF-8 text") from error
    found = []
    for line in lines:
        text = line.strip()
        if text and not text.startswith("#"):
            name, equals, place = text.rpartition("=")
            found.append(f"{name}{equals}{path.parent / Path(place).expanduser()}")
    return found


def parse_repository(text: str) -> Repository:
    """Return what `[NAME=]PATH` names. Raises click.UsageError when there is no such directory."""
    from code2lora.training.data.mining import Repository

    name, _, path_text = text.rpartition("=")
    path = Path(path_text).expanduser().absolute()
    if not path.is_dir():
        raise click.UsageError(f"there is no directory {path}")
    return Repository(name or "/".join(path.parts[-2:]), path)


def report_failures(results: Sequence[Mined]) -> None:
    """Say on stderr what failed, and why."""
    for failed in (result for result in results if result.status == "failed"):
        render.remark(f"{render.line(failed.name)}: {render.line(failed.reason)}")


def leaks_line(leaks: Leaks) -> str:
    """Return what the search for tasks that training has seen came to."""
    n_seen = leaks.n_in_repository + leaks.n_across
    return (
        f"{n_seen:,} of {leaks.n_targets:,} tasks for evaluation were seen in training and are "
        f"never asked: {leaks.n_in_repository:,} in their own repository, {leaks.n_across:,} in "
        "another"
    )


def mined_table(results: Sequence[Mined]) -> str:
    """Return a table of what became of each repository."""
    rows = [
        [
            result.status,
            render.line(result.name),
            f"{result.rows.get('commits', 0):,}",
            f"{result.rows.get('targets', 0):,}",
        ]
        for result in results
    ]
    columns = ["STATUS", "REPOSITORY", "STEPS", "TASKS"]
    return render.table(columns, rows, right=["STEPS", "TASKS"])
