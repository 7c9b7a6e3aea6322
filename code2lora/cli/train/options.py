"""Options and endings that the stages of `code2lora train` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from code2lora.cli import edge, render

if TYPE_CHECKING:
    import torch

    from code2lora.training.recipe import Recipe
    from code2lora.training.run import Decoder

Command = TypeVar("Command", bound=Callable[..., Any])

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
fitted_option = click.option(
    "--out",
    "out_dir",
    required=True,
    type=DIRECTORY,
    help="The fitted model, with encoder/ and hypernetwork/; what is found is written there.",
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="auto, cpu, cuda, cuda:1 or mps; of a launched process, its own.",
)
test_bucket_option = click.option(
    "--test-bucket",
    is_flag=True,
    help="Take the test repositories (bucket 9) and not the validation ones (bucket 8). To be used "
    "once, when everything is chosen.",
)
minutes_option = click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="The budget, in place of the recipe's.",
)


def decoder_options(command: Command) -> Command:
    """Add what every stage takes that works on mined tasks with a decoder."""
    return _with_options(command, out_option)


def fitted_options(command: Command) -> Command:
    """Add the same for a stage that asks a fitted model."""
    return _with_options(command, fitted_option)


def _with_options(command: Command, out: Callable[[Command], Command]) -> Command:
    for option in (recipe_option, out, base_name_option, base_option, mined_option):
        command = option(command)
    return command


def hush_progress_bars() -> None:
    """Keep the loading and writing of weights from drawing over our own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def load_recipe_and_decoder(
    recipe_name: str, base_dir: Path, base_name: str | None, device: torch.device | str = "cpu"
) -> tuple[Recipe, Decoder]:
    """Return a recipe and a decoder by what the options of a stage say."""
    from code2lora.training.recipe import load_recipe
    from code2lora.training.run import load_decoder

    hush_progress_bars()
    recipe = load_recipe(recipe_name)
    name, bf16 = base_name or base_dir.absolute().name, recipe.fit.autocast_bf16
    return recipe, load_decoder(base_dir, name=name, device=device, bf16=bf16)


def leave_if(interrupted: bool) -> None:
    """Exit as interrupted work does."""
    if interrupted:
        render.remark("stopped; the same command goes on from here")
        raise click.exceptions.Exit(edge.INTERRUPTED)
