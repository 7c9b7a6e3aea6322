"""`code2lora train bundle`: one model directory."""

from __future__ import annotations

from pathlib import Path

import click

from code2lora.cli import render
from code2lora.cli.options import examples
from code2lora.cli.train.options import (
    EXISTING,
    mined_option,
    out_option,
)


@click.command(
    "bundle",
    epilog=examples(
        (
            "code2lora train bundle --mined mined --base base --fitted m --out models/mine",
            "a model",
        ),
    ),
)
@mined_option
@click.option("--base", "base_dir", required=True, type=EXISTING, help="What `train base` filled.")
@click.option("--fitted", required=True, type=EXISTING, help="What `train evaluate` measured.")
@click.option(
    "--base-of",
    metavar="NAME",
    help="A model beside OUT with the same base, which is then not copied.",
)
@out_option
def bundle(mined: Path, base_dir: Path, fitted: Path, base_of: str | None, out_dir: Path) -> None:
    """Put base, encoder and hypernetwork together as one model, with its card.

    `CODE2LORA_MODEL=OUT` uses it.
    """
    from code2lora.training.bundle import bundle as put_together

    paths = put_together(out_dir, base=base_dir, fitted=fitted, mined=mined, base_of=base_of)
    render.emit(str(paths.card))
