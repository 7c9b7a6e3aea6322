"""`code2lora train baselines`: rows to compare a model with, trained on the same items."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import click

from code2lora.cli import render
from code2lora.cli.options import examples, json_option
from code2lora.cli.progress import progress, stop_on_interrupt
from code2lora.cli.train.options import (
    EXISTING,
    decoder_options,
    device_option,
    leave_if,
    load_recipe_and_decoder,
    test_bucket_option,
)

_ROWS = ("shared_lora", "text_lora", "full_tuning", "full_tuning_rag", "repository_lora")


@click.command(
    "baselines",
    epilog=examples(
        (
            "code2lora train baselines --mined mined --base base/export --like my-model --out b",
            "all rows, for as many steps as my-model took",
        ),
        (
            "code2lora train baselines ... --row shared_lora --row repository_lora",
            "some of them",
        ),
        ("code2lora train evaluate ... --baselines b", "measured beside the model"),
    ),
)
@decoder_options
@click.option(
    "--row",
    "rows",
    multiple=True,
    type=click.Choice(_ROWS),
    help="What to train; repeatable.  [default: all]",
)
@click.option(
    "--like",
    type=EXISTING,
    help="The fitted model to compare with: the shared rows take as many steps as its run.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="Steps of the shared rows, in place of the recipe's and the model's.",
)
@click.option(
    "--description-encoder",
    type=EXISTING,
    help="A sentence-transformers encoder for text_lora.  [default: the decoder's embeddings]",
)
@device_option
@test_bucket_option
@json_option
def baselines(
    mined: Path,
    base_dir: Path,
    base_name: str | None,
    out_dir: Path,
    recipe_name: str,
    rows: tuple[str, ...],
    like: Path | None,
    steps: int | None,
    description_encoder: Path | None,
    device: str,
    test_bucket: bool,
    as_json: bool,
) -> None:
    """Train the rows that a fitted model is compared with.

    One LoRA for all repositories, a head that is told descriptions, the whole decoder with and
    without retrieved context, and a LoRA of its own for each evaluated repository. All but the
    last take the items that the model was fitted on, as many steps and rows. Writes OUT/ROW; a row
    that is complete is left alone.
    """
    from code2lora.serving.model import resolve_device
    from code2lora.training.baselines.material import Compared
    from code2lora.training.baselines.stage import train_baselines

    where = resolve_device(device)
    recipe, decoder = load_recipe_and_decoder(recipe_name, base_dir, base_name, where)
    if steps is not None:
        recipe = replace(recipe, baselines=replace(recipe.baselines, steps=steps))
    compared = Compared(like=like, description_encoder=description_encoder, test=test_bucket)
    with stop_on_interrupt() as stop, progress("training") as tell:
        results = train_baselines(
            recipe, mined, decoder, out_dir, rows or _ROWS, compared, progress=tell, stop=stop
        )
    if as_json:
        render.emit_json([{**asdict(result), "path": result.path} for result in results])
    else:
        render.emit(
            render.fields(
                (
                    result.row,
                    f"step {result.best_step:,} of {result.steps:,}"
                    + ("" if result.watched_nll is None else f", {result.watched_nll:.4f} nats")
                    + ("" if result.finished else ", not complete yet"),
                )
                for result in results
            )
        )
    leave_if(not all(result.finished for result in results))
