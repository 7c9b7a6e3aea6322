"""`code2lora train fit`: encoder and hypernetwork from tasks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from code2lora.cli import render
from code2lora.cli.options import examples, json_option
from code2lora.cli.progress import stop_on_interrupt
from code2lora.cli.train.live import fit_display
from code2lora.cli.train.options import (
    decoder_options,
    device_option,
    leave_if,
    load_recipe_and_decoder,
    minutes_option,
)

if TYPE_CHECKING:
    import torch

    from code2lora.training.fitting.schedule import FitResult

_RELEASED = "released"
_GPU_BACKEND = "cuda:nccl,cpu:gloo"
"""Gradients are summed where they are; figures and decisions are agreed on from the CPU."""


@click.command(
    "fit",
    epilog=examples(
        (
            "code2lora train fit --mined mined --base base/export --out m --features encoder",
            "by the recipe `mini`, on what `train embed` wrote",
        ),
        ("code2lora train fit ... --recipe mini-gru", "a GRU, with an encoder of its own"),
        ("accelerate launch -m code2lora train fit ...", "on several devices"),
        ("code2lora train fit ... --minutes 10", "a shorter run"),
    ),
)
@decoder_options
@click.option(
    "--features",
    metavar="ENCODER|released",
    help="The directory of the frozen encoder that `train embed` ran, or `released` for the"
    " vectors that an imported data set came with.",
)
@device_option
@minutes_option
@json_option
def fit(
    mined: Path,
    base_dir: Path,
    base_name: str | None,
    out_dir: Path,
    recipe_name: str,
    features: str | None,
    device: str,
    minutes: float | None,
    as_json: bool,
) -> None:
    """Fit encoder and hypernetwork on mined tasks.

    Goes on where OUT/run was cut off. Writes OUT/encoder and OUT/hypernetwork when the budget is
    spent, or when looks at unseen repositories have stopped getting better.
    """
    from code2lora.training.pretraining.ranks import rank
    from code2lora.training.run import fit as run_fit

    where = _place(device)
    recipe, decoder = load_recipe_and_decoder(recipe_name, base_dir, base_name, where)
    if minutes is not None:
        recipe = replace(recipe, fit=replace(recipe.fit, max_seconds=60 * minutes))
    with stop_on_interrupt() as stop, fit_display(quiet=rank() > 0) as display:
        result = run_fit(
            recipe,
            mined,
            decoder,
            out_dir,
            features=_features(features),
            begun=display.begun,
            progress=display.step,
            stop=stop,
        )
    if rank() == 0:
        _report(result, out_dir, as_json=as_json)
    _part()
    leave_if(not result.finished)


def _features(given: str | None) -> Path | Literal["released"] | None:
    if given is None:
        return None
    if given == _RELEASED:
        return "released"
    path = Path(given)
    if not path.is_dir():
        raise click.BadParameter(f"there is no directory {given}", param_hint="--features")
    return path


def _place(device: str) -> torch.device:
    """Return where to train; a process that was launched with others joins them."""
    from code2lora.serving.model import resolve_device

    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return resolve_device(device)
    from accelerate import PartialState

    on_cpu = resolve_device(device).type == "cpu"
    own: torch.device = PartialState(cpu=on_cpu, backend=None if on_cpu else _GPU_BACKEND).device
    return own


def _part() -> None:
    """Leave the other processes."""
    import torch.distributed as distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _report(result: FitResult, out_dir: Path, *, as_json: bool) -> None:
    if as_json:
        render.emit_json({**result.__dict__, "path": out_dir})
        return
    gap = result.best_own_minus_wrong
    why = ", looks got no better" if result.stopped_early else ""
    rows = [
        ("steps", f"{result.step:,}{why}; the weights are of step {result.best_step:,}"),
        ("unseen", "none given" if gap is None else f"own-wrong {gap:+.4f} nats a token"),
        ("model", str(out_dir) if result.finished else "not written yet"),
    ]
    render.emit(render.fields(rows))
