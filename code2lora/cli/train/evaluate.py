"""`code2lora train evaluate`: a fitted model and its rivals on the same questions."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from code2lora.cli import render
from code2lora.cli.options import examples, json_option
from code2lora.cli.progress import progress, stop_on_interrupt
from code2lora.cli.train.options import (
    EXISTING,
    device_option,
    fitted_options,
    leave_if,
    load_recipe_and_decoder,
    test_bucket_option,
)

if TYPE_CHECKING:
    from code2lora.training.recipe import Recipe

_SUITES = ("cross-repo", "in-repo", "out-of-time")
_ROWS = (
    "pretrained",
    "rag",
    "drc",
    "full_tuning",
    "full_tuning_rag",
    "shared_lora",
    "repository_lora",
    "text_lora",
    "static",
    "evo",
    "memory",
    "generic",
    "wrong",
)
_WIDE = 200
"""Columns of a table that no terminal shows."""


@click.command(
    "evaluate",
    epilog=examples(
        ("code2lora train evaluate --mined mined --base base/export --out m", "all that is there"),
        (
            "code2lora train evaluate ... --baselines baselines --suite cross-repo",
            "beside trained baselines, on unseen repositories",
        ),
    ),
)
@fitted_options
@click.option(
    "--suite",
    "suites",
    multiple=True,
    type=click.Choice(_SUITES),
    help="What to ask about; repeatable.  [default: all]",
)
@click.option(
    "--row",
    "rows",
    multiple=True,
    type=click.Choice(_ROWS),
    help="Whom to ask; repeatable.  [default: all that there are]",
)
@click.option("--baselines", type=EXISTING, help="The folder of trained baselines.")
@click.option(
    "--also",
    multiple=True,
    type=EXISTING,
    help="A further fitted model, measured as a row of its own; repeatable.",
)
@click.option(
    "--items",
    type=click.IntRange(min=1),
    help="Questions of each kind for a repository, in place of the recipe's.",
)
@test_bucket_option
@device_option
@json_option
def evaluate(
    mined: Path,
    base_dir: Path,
    base_name: str | None,
    out_dir: Path,
    recipe_name: str,
    suites: tuple[str, ...],
    rows: tuple[str, ...],
    baselines: Path | None,
    also: tuple[Path, ...],
    items: int | None,
    test_bucket: bool,
    device: str,
    as_json: bool,
) -> None:
    """Measure a fitted model beside what else could be done.

    Every row answers the same questions: the base model, with retrieved text above the prompt,
    trained baselines, the model's adapters, and other repositories' adapters as controls. What was
    not trained is left out. Writes OUT/evaluation.json, OUT/report/index.html and the headline
    figures into the checkpoint; answers are kept in OUT/evaluation, so ^C costs little.
    """
    from code2lora.serving.model import resolve_device
    from code2lora.training.evaluation.stage import Measuring
    from code2lora.training.run import evaluate as run_evaluate

    recipe, decoder = load_recipe_and_decoder(
        recipe_name, base_dir, base_name, resolve_device(device)
    )
    measuring = Measuring(
        suites=suites or _SUITES,
        rows=rows or _ROWS,
        baselines=baselines,
        also=also,
        test=test_bucket,
    )
    with stop_on_interrupt() as stop, progress("evaluating") as tell:
        found = run_evaluate(
            _with_items(recipe, items),
            mined,
            decoder,
            out_dir,
            measuring,
            progress=tell,
            stop=stop,
        )
    if found.finished:
        if as_json:
            render.emit_json(found.content)
        else:
            _show(found.content)
            render.emit(f"report  {found.page}")
    leave_if(not found.finished)


def _with_items(recipe: Recipe, items: int | None) -> Recipe:
    if items is None:
        return recipe
    config = replace(recipe.evaluate, file_items=items, commit_items=items, assertion_items=items)
    return replace(recipe, evaluate=config)


def _show(content: Mapping[str, Any]) -> None:
    """Print a table for each suite, and which rows are left out."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(
        file=sys.stdout,
        width=None if sys.stdout.isatty() else _WIDE,
        markup=False,
        emoji=False,
        highlight=False,
    )
    for suite, found in content["suites"].items():
        table = Table(title=suite, box=SIMPLE_HEAD, title_justify="left")
        table.add_column("row")
        for head in ("NLL", "- pretrained", "EM", "EditSim", "CodeBLEU", "EM (paper)"):
            table.add_column(head, justify="right", no_wrap=True)
        for name, row in found["strata"]["all"].items():
            table.add_row(content["rows"][name]["title"], *_cells(row))
        console.print(table)
    for row in content["rows"].values():
        if not row["measured"]:
            render.remark(f"{row['title']}: {render.line(row['reason'])}")
    for note in content["notes"]:
        render.remark(render.line(note))


def _cells(row: Mapping[str, Any]) -> list[str]:
    columns = row["columns"]
    minus = row["minus"].get("pretrained")
    gap = "" if minus is None else _interval(minus["nll"])
    shares = [columns[name]["mean"] for name in ("exact_match", "edit_similarity", "codebleu")]
    shares.append(row["over_items"]["paper_exact_match"])
    return [f"{columns['nll']['mean']:.4f}", gap, *(f"{share:.1%}" for share in shares)]


def _interval(figures: Mapping[str, float]) -> str:
    return f"{figures['mean']:+.4f} ({figures['low']:+.4f} to {figures['high']:+.4f})"
