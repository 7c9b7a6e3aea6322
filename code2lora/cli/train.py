"""`code2lora train`: from repositories to a model, in stages that can be cut off and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from code2lora.cli import edge, render
from code2lora.cli.options import GuessingGroup, examples, json_option
from code2lora.cli.progress import progress, stop_on_interrupt

if TYPE_CHECKING:
    from code2lora.training.mining import Mined, Repository
    from code2lora.training.recipe import Recipe
    from code2lora.training.run import Decoder

_DIRECTORY = click.Path(file_okay=False, path_type=Path)
_EXISTING = click.Path(exists=True, file_okay=False, path_type=Path)

recipe_option = click.option(
    "--recipe",
    "recipe_name",
    default="mini",
    show_default=True,
    metavar="NAME|FILE",
    help="A bundled recipe, or a TOML file of your own.",
)
mined_option = click.option(
    "--mined", required=True, type=_EXISTING, help="The folder that `train mine` filled."
)
base_option = click.option(
    "--base", "base_dir", required=True, type=_EXISTING, help="The base decoder's directory."
)
base_name_option = click.option(
    "--base-name", metavar="NAME", help="What adapters call the decoder.  [default: its folder's]"
)
out_option = click.option(
    "--out", "out_dir", required=True, type=_DIRECTORY, help="Where this stage writes."
)
minutes_option = click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="The budget, in place of the recipe's.",
)


@click.group(
    "train",
    cls=GuessingGroup,
    epilog=examples(
        ("code2lora train base --out base", "a small decoder from installed packages"),
        ("code2lora train mine src/* --out mined", "tasks from the histories of repositories"),
        (
            "code2lora train fit --mined mined --base base/export --out m",
            "encoder and hypernetwork",
        ),
        ("code2lora train evaluate --mined mined --base base/export --out m", "held-out figures"),
    ),
)
def train() -> None:
    """Train a model of your own: base decoder, tasks, hypernetwork, figures.

    Needs `pip install 'code2lora-daemon[train]'`. ^C stops at the next whole step; the same
    command goes on from there.
    """


@train.command(
    "mine",
    epilog=examples(
        ("code2lora train mine ~/src/* --out mined -j 2", "two repositories at a time"),
        ("code2lora train mine torvalds/linux=~/linux --out mined", "say whose it is"),
    ),
)
@click.argument("repositories", nargs=-1, required=True, metavar="[NAME=]PATH...")
@out_option
@recipe_option
@click.option(
    "-j",
    "--workers",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Repositories at a time.",
)
@json_option
def mine(
    repositories: tuple[str, ...], out_dir: Path, recipe_name: str, workers: int, as_json: bool
) -> None:
    """Turn local repositories into training tasks.

    NAME is `owner/name`; it decides whether a repository is trained on or held out. Without one,
    the last two folders of the path are taken. What is finished is skipped.
    """
    from code2lora.training.recipe import load_recipe
    from code2lora.training.run import mine as run_mine

    chosen = [parse_repository(text) for text in repositories]
    recipe = load_recipe(recipe_name)
    with stop_on_interrupt() as stop, progress("mining") as tell:
        results = run_mine(
            recipe,
            chosen,
            out_dir,
            workers=workers,
            progress=lambda mined, done, total: tell(done / total, mined.name),
            stop=stop,
        )
    for failed in (result for result in results if result.status == "failed"):
        render.remark(f"{render.line(failed.name)}: {render.line(failed.reason)}")
    if as_json:
        render.emit_json(results)
    else:
        render.emit(_mined_table(results))
    _leave_if(len(results) < len(chosen))


@train.command(
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
    type=_EXISTING,
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
    from code2lora.training.pretrain import train_base
    from code2lora.training.recipe import load_recipe

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
    _leave_if(not result.finished)


@train.command(
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

    recipe, decoder = _load(recipe_name, base_dir, base_name)
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
    _leave_if(not result.finished)


@train.command(
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

    recipe, decoder = _load(recipe_name, base_dir, base_name)
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


@train.command(
    "bundle",
    epilog=examples(
        (
            "code2lora train bundle --mined mined --base base --fitted m --out models/mine",
            "a model",
        ),
    ),
)
@mined_option
@click.option("--base", "base_dir", required=True, type=_EXISTING, help="What `train base` filled.")
@click.option("--fitted", required=True, type=_EXISTING, help="What `train evaluate` measured.")
@out_option
def bundle(mined: Path, base_dir: Path, fitted: Path, out_dir: Path) -> None:
    """Put base, encoder and hypernetwork together as one model, with its card.

    `CODE2LORA_MODEL=OUT` uses it.
    """
    from code2lora.training.bundle import bundle as put_together

    paths = put_together(out_dir, base=base_dir, fitted=fitted, mined=mined)
    render.emit(str(paths.card))


def parse_repository(text: str) -> Repository:
    """Return what `[NAME=]PATH` names. Raises click.UsageError when there is no such directory."""
    from code2lora.training.mining import Repository

    name, _, path_text = text.rpartition("=")
    path = Path(path_text).expanduser().absolute()
    if not path.is_dir():
        raise click.UsageError(f"there is no directory {path}")
    return Repository(name or "/".join(path.parts[-2:]), path)


def _load(recipe_name: str, base_dir: Path, base_name: str | None) -> tuple[Recipe, Decoder]:
    from code2lora.training.recipe import load_recipe
    from code2lora.training.run import load_decoder

    recipe = load_recipe(recipe_name)
    return recipe, load_decoder(base_dir, name=base_name or base_dir.absolute().name)


def _mined_table(results: Sequence[Mined]) -> str:
    rows = [
        [result.status, render.line(result.name), f"{sum(result.rows.values()):,}"]
        for result in results
    ]
    return render.table(["STATUS", "REPOSITORY", "ROWS"], rows, right=["ROWS"])


def _leave_if(interrupted: bool) -> None:
    """Exit as interrupted work does."""
    if interrupted:
        render.remark("stopped; the same command goes on from here")
        raise click.exceptions.Exit(edge.INTERRUPTED)
