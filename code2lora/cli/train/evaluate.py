"""`code2lora train evaluate`: figures on unseen repositories."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from code2lora.cli import render
from code2lora.cli.options import examples, json_option
from code2lora.cli.progress import progress
from code2lora.cli.train.options import (
    base_name_option,
    base_option,
    load_recipe_and_decoder,
    mined_option,
    out_option,
    recipe_option,
)

if TYPE_CHECKING:
    pass


@click.command(
    "evaluate",
    epilog=examples(
        ("code2lora train evaluate --mined mined --base base/export --out my-model", "measure it"),
    ),
)
@mined_option
@base_option
@base_name_option
@out_option
@recipe_option
@json_option
def evaluate(
    mined: Path,
    base_dir: Path,
    base_name: str | None,
    out_dir: Path,
    recipe_name: str,
    as_json: bool,
) -> None:
    """Measure a fitted model on held-out repositories.

    Compares the base model, the generic adapter, the repository's own and other repositories'.
    Writes OUT/evaluation.json and the figures into the checkpoint.
    """
    from code2lora.training.run import evaluate as run_evaluate

    recipe, decoder = load_recipe_and_decoder(recipe_name, base_dir, base_name)
    with progress("evaluating") as tell:
        found = run_evaluate(
            recipe,
            mined,
            decoder,
            out_dir,
            progress=lambda done, total: tell(done / total, f"{done} of {total}"),
        )
    headline = found.headline()
    if as_json:
        render.emit_json(headline)
    else:
        render.emit(render.fields((name, f"{value:.4f}") for name, value in headline.items()))
