"""`code2lora train keys`: the encoder through which a base model's gradients are seen."""

from __future__ import annotations

from pathlib import Path

import click

from code2lora.cli import render
from code2lora.cli.options import examples, json_option
from code2lora.cli.progress import progress, stop_on_interrupt
from code2lora.cli.train.options import (
    decoder_options,
    device_option,
    leave_if,
    load_recipe_and_decoder,
)


@click.command(
    "keys",
    epilog=examples(
        (
            "code2lora train keys --mined mined --base base/export --out encoder",
            "write the encoder",
        ),
        (
            "code2lora train embed --mined mined --base base/export --encoder encoder",
            "read all with it",
        ),
        ("code2lora train fit ... --features encoder", "then fit the memory"),
    ),
)
@decoder_options
@device_option
@json_option
def keys(
    mined: Path,
    base_dir: Path,
    base_name: str | None,
    out_dir: Path,
    recipe_name: str,
    device: str,
    as_json: bool,
) -> None:
    """Find where repositories differ to a decoder's gradients.

    For the family `memory`. Reads the newest snapshot of each training repository and writes OUT,
    an encoder that reads a text as the gradient of the base decoder's own loss, seen through these
    directions.
    """
    from code2lora.serving.model import resolve_device
    from code2lora.training.pretraining.keys import find_keys
    from code2lora.training.run import split

    where = resolve_device(device)
    recipe, decoder = load_recipe_and_decoder(recipe_name, base_dir, base_name, where)
    shards, _ = split(mined)
    with stop_on_interrupt() as stop, progress("finding keys") as tell:
        found = find_keys(
            shards,
            decoder,
            recipe.keys,
            out_dir,
            progress=lambda name, share: tell(share, render.line(name)),
            stop=stop,
        )
    leave_if(found is None)
    if as_json:
        render.emit_json(found)
    elif found is not None:
        blocks = found.blocks
        render.emit(
            f"wrote {out_dir}: {len(blocks.places)} projections, {blocks.n_keys} keys each, "
            f"{blocks.width:,} numbers a text"
        )
