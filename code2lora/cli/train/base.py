"""`code2lora train base`: a base decoder from scratch."""

from __future__ import annotations

from pathlib import Path

import click

from code2lora.cli import render
from code2lora.cli.options import examples, json_option
from code2lora.cli.progress import progress, stop_on_interrupt
from code2lora.cli.train.options import (
    EXISTING,
    hush_progress_bars,
    leave_if,
    minutes_option,
    out_option,
    recipe_option,
)


@click.command(
    "base",
    epilog=examples(
        ("code2lora train base --out base --minutes 60", "from the packages of this Python"),
        ("code2lora train base --out base --site other/site-packages", "and of another"),
    ),
)
@out_option
@recipe_option
@click.option(
    "--site",
    "site_dirs",
    multiple=True,
    type=EXISTING,
    help="A folder with installed packages; repeatable.  [default: this Python's]",
)
@minutes_option
@json_option
def base(
    out_dir: Path,
    recipe_name: str,
    site_dirs: tuple[Path, ...],
    minutes: float | None,
    as_json: bool,
) -> None:
    """Train a small base decoder on permissively licensed Python.

    Reads the standard library and installed packages whose licence allows it, trains a tokenizer
    on them, then the decoder. Writes OUT/export, a Hugging Face model, and OUT/manifest.json, which
    names every package and its licence.
    """
    from code2lora.training.pretraining.pretrain import train_base
    from code2lora.training.recipe import load_recipe

    hush_progress_bars()
    recipe = load_recipe(recipe_name)
    with stop_on_interrupt() as stop, progress("training the decoder") as tell:
        result = train_base(recipe, out_dir, site_dirs, minutes, tell, stop)
    if as_json:
        render.emit_json(result)
    else:
        rows = [
            ("decoder", str(result.export_dir)),
            ("steps", f"{result.step:,}, {result.n_tokens:,} tokens"),
            ("held out", f"{result.bits_per_byte:.4f} bits a byte"),
        ]
        render.emit(render.fields(rows))
    leave_if(not result.finished)
