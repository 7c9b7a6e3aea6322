"""`code2lora train fit`: encoder and hypernetwork from tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from code2lora.cli import render
from code2lora.cli.options import examples, json_option
from code2lora.cli.progress import progress, stop_on_interrupt
from code2lora.cli.train.options import (
    base_name_option,
    base_option,
    leave_if,
    load_recipe_and_decoder,
    mined_option,
    minutes_option,
    out_option,
    recipe_option,
)

if TYPE_CHECKING:
    pass


@click.command(
    "fit",
    epilog=examples(
        ("code2lora train fit --mined mined --base base/export --out my-model", "by the recipe"),
        ("code2lora train fit ... --minutes 10", "a shorter run"),
    ),
)
@mined_option
@base_option
@base_name_option
@out_option
@recipe_option
@minutes_option
@json_option
def fit(
    mined: Path,
    base_dir: Path,
    base_name: str | None,
    out_dir: Path,
    recipe_name: str,
    minutes: float | None,
    as_json: bool,
) -> None:
    """Fit encoder and hypernetwork on mined tasks.

    Goes on where OUT/run was cut off. Writes OUT/encoder and OUT/hypernetwork when the budget is
    spent.
    """
    from code2lora.training.run import fit as run_fit

    recipe, decoder = load_recipe_and_decoder(recipe_name, base_dir, base_name)
    if minutes is not None:
        recipe = replace(recipe, fit=replace(recipe.fit, max_seconds=60 * minutes))
    with stop_on_interrupt() as stop, progress("fitting") as tell:
        result = run_fit(
            recipe,
            mined,
            decoder,
            out_dir,
            progress=lambda now: tell(
                now.done_share,
                f"step {now.step}, loss {now.loss:.3f}, own-wrong {now.own_minus_wrong:+.3f}",
            ),
            stop=stop,
        )
    if as_json:
        render.emit_json({**result.__dict__, "path": out_dir})
    else:
        gap = result.best_own_minus_wrong
        rows = [
            ("steps", f"{result.step:,}; the weights are of step {result.best_step:,}"),
            ("unseen", "none given" if gap is None else f"own-wrong {gap:+.4f} nats a token"),
            ("model", str(out_dir) if result.finished else "not written yet"),
        ]
        render.emit(render.fields(rows))
    leave_if(not result.finished)
