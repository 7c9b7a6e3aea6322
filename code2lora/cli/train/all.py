"""`code2lora train all`: from a list of public repositories to a model, in one command."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from code2lora.cli import edge, render
from code2lora.cli.options import examples, json_option
from code2lora.cli.train.clone import pins_option, source_option
from code2lora.cli.train.options import DIRECTORY, EXISTING, device_option, recipe_option

_TIMES = "times.json"


@click.command(
    "all",
    epilog=examples(
        ("code2lora train all --out made", "clone, train, measure, audit, bundle"),
        ("code2lora train all --out made", "once more: go on after ^C"),
        ("code2lora train all ... --base base --clones clones", "with what another run has made"),
        ("code2lora train all ... --from https://example.org/", "where GitHub is out of reach"),
    ),
)
@recipe_option
@click.option("--out", "out_dir", required=True, type=DIRECTORY, help="Where all of it is made.")
@click.option("--name", metavar="MODEL", help="What the model is called.  [default: the recipe's]")
@pins_option
@source_option
@click.option("--clones", type=DIRECTORY, help="The folder of clones.  [default: OUT/clones]")
@click.option(
    "--base", type=EXISTING, help="What `train base` filled, in place of a base of its own."
)
@click.option(
    "--site",
    "sites",
    multiple=True,
    type=EXISTING,
    help="A folder with installed packages for the base; repeatable.  [default: this Python's]",
)
@click.option(
    "--shared/--no-shared",
    default=True,
    show_default=True,
    help="Train one LoRA for all repositories as well, and compare with it.",
)
@click.option(
    "-j",
    "--workers",
    default=2,
    show_default=True,
    type=click.IntRange(min=1),
    help="Repositories that are cloned or mined at a time.",
)
@device_option
@json_option
def all_stages(*, as_json: bool, **options: Any) -> None:
    """Make a model from public repositories: every stage, in order.

    Clones what the list pins, trains a base decoder, mines, fits, trains the shared LoRA, evaluates
    on bucket 8, audits and bundles, by the commands that can also be given one by one. The same
    command goes on where it was cut off. Writes OUT/MODEL, and OUT/times.json with the wall time of
    each stage and the machine.

    Exits as `train audit` does, or with the status of a stage that failed.
    """
    from code2lora.cli.train.plan import Plan
    from code2lora.cli.train.stages import run_stages
    from code2lora.training.data.cloning import read_pins
    from code2lora.training.recipe import load_recipe
    from code2lora.training.times import machine, open_times, versions

    plan = Plan(**options)
    pins, recipe = read_pins(plan.list_file), load_recipe(plan.recipe_name)
    stages = plan.stages(recipe)
    plan.out_dir.mkdir(parents=True, exist_ok=True)
    times = open_times(plan.out_dir / _TIMES, plan.made_with(recipe, pins))
    status = run_stages(stages, times, output=sys.stderr if as_json else None)
    if status != edge.OK:
        render.remark("not finished; the same command goes on from here")
        raise click.exceptions.Exit(status)
    cloned = {"listed": len(pins), "cloned": len(plan.cloned.read_text("utf-8").splitlines())}
    content = times.write(repositories=cloned, machine=machine(), versions=versions())
    if as_json:
        render.emit_json({**content, "path": plan.model})
    else:
        render.emit(_text(content, plan.model))
    raise click.exceptions.Exit(times.stages["audit"].status or edge.OK)


def _text(content: Mapping[str, Any], model: Path) -> str:
    spent = {name: stage["seconds"] for name, stage in content["stages"].items()}
    rows = [
        [name, f"{seconds:,.0f}", render.span(seconds)]
        for name, seconds in [*spent.items(), ("all", content["seconds"])]
    ]
    machine, cloned = content["machine"], content["repositories"]
    on = f"{machine['processor']}, {render.count(machine['cores'], 'core')}"
    fields = [
        ("on", on if machine["gpu"] is None else f"{on}, {machine['gpu']}"),
        ("learnt from", f"{cloned['cloned']:,} of {cloned['listed']:,} repositories"),
        ("model", str(model)),
    ]
    table = render.table(["STAGE", "SECONDS", "TIME"], rows, right=["SECONDS", "TIME"])
    return f"{table}\n\n{render.fields(fields)}"
