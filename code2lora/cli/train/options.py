"""Options and endings that the stages of `code2lora train` share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from code2lora.cli import edge, render

if TYPE_CHECKING:
    import torch

    from code2lora.training.recipe import Recipe
    from code2lora.training.run import Decoder

DIRECTORY = click.Path(file_okay=False, path_type=Path)
EXISTING = click.Path(exists=True, file_okay=False, path_type=Path)

recipe_option = click.option(
    "--recipe",
    "recipe_name",
    default="mini",
    show_default=True,
    metavar="NAME|FILE",
    help="A bundled recipe, or a TOML file of your own.",
)
mined_option = click.option(
    "--mined", required=True, type=EXISTING, help="The folder that `train mine` filled."
)
base_option = click.option(
    "--base", "base_dir", required=True, type=EXISTING, help="The base decoder's directory."
)
base_name_option = click.option(
    "--base-name", metavar="NAME", help="What adapters call the decoder.  [default: its folder's]"
)
out_option = click.option(
    "--out", "out_dir", required=True, type=DIRECTORY, help="Where this stage writes."
)
minutes_option = click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="The budget, in place of the recipe's.",
)


def load_recipe_and_decoder(
    recipe_name: str, base_dir: Path, base_name: str | None, device: torch.device | str = "cpu"
) -> tuple[Recipe, Decoder]:
    from code2lora.training.recipe import load_recipe
    from code2lora.training.run import load_decoder

    recipe = load_recipe(recipe_name)
    name, bf16 = base_name or base_dir.absolute().name, recipe.fit.autocast_bf16
    return recipe, load_decoder(base_dir, name=name, device=device, bf16=bf16)


def leave_if(interrupted: bool) -> None:
    """Exit as interrupted work does."""
    if interrupted:
        render.remark("stopped; the same command goes on from here")
        raise click.exceptions.Exit(edge.INTERRUPTED)
