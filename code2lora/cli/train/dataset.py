"""`code2lora train dataset`: mined tasks to and from the layout of the released data sets."""

from __future__ import annotations

from pathlib import Path

import click

from code2lora.cli import render
from code2lora.cli.options import GuessingGroup, examples, json_option
from code2lora.cli.progress import progress, stop_on_interrupt
from code2lora.cli.train.mine import leaks_line, mined_table
from code2lora.cli.train.options import EXISTING, leave_if, mined_option, out_option

RELEASED = "released"
"""What `--vectors` calls the vectors of an import."""


@click.group(
    "dataset",
    cls=GuessingGroup,
    epilog=examples(
        (
            "code2lora train dataset import data --out mined",
            "read a released one",
        ),
        ("code2lora train dataset export --mined mined --out data", "write one like it"),
    ),
)
def dataset() -> None:
    """Exchange tasks with other trainers, in the layout of the paper's data sets.

    It has the folders commits/, qna/, snapshots/commits/ and snapshots/qna/, each with a parquet
    file for train, cr_val and cr_test.
    """


@dataset.command(
    "export",
    epilog=examples(
        ("code2lora train dataset export --mined mined --out data", "texts and tasks"),
        (
            "code2lora train dataset export --mined mined --out data --vectors released",
            "with the vectors of an import",
        ),
    ),
)
@mined_option
@out_option
@click.option(
    "--vectors",
    metavar="FINGERPRINT",
    help="Add the vectors that `train embed` made with this encoder, as the folders of "
    f"MINED/.features are named, or `{RELEASED}` for those that an imported data set came with.",
)
@json_option
def export(mined: Path, out_dir: Path, vectors: str | None, as_json: bool) -> None:
    """Write mined tasks as a data set of the released layout.

    Tasks that training has seen are left out of it.
    """
    from code2lora.training.data.released import export_released

    with progress("exporting") as tell:
        exported = export_released(
            mined,
            out_dir,
            with_vectors=vectors is not None,
            fingerprint=None if vectors == RELEASED else vectors,
            progress=lambda name, done, total: tell(done / total, name),
        )
    render.remark(f"{exported.n_left_out:,} tasks that training has seen are left out")
    if as_json:
        render.emit_json(exported)
    else:
        rows = [[name, f"{n_rows:,}"] for name, n_rows in exported.rows.items()]
        render.emit(render.table(["FILE", "ROWS"], rows, right=["ROWS"]))


@dataset.command(
    "import",
    epilog=examples(
        ("code2lora train dataset import data --out mined", "all repositories of a folder"),
    ),
)
@click.argument("folder", type=EXISTING)
@out_option
@json_option
def import_(folder: Path, out_dir: Path, as_json: bool) -> None:
    """Read a data set of the released layout as if it had been mined.

    FOLDER holds commits/*.parquet and qna/*.parquet, or commits.parquet and qna.parquet. Vectors in
    it are kept. What is finished is skipped.
    """
    from code2lora.training.data.leakage import read_leaks
    from code2lora.training.data.released_import import import_released

    with stop_on_interrupt() as stop, progress("importing") as tell:
        imported = import_released(
            folder,
            out_dir,
            progress=lambda result, done, total: tell(done / total, result.name),
            stop=stop,
        )
    if imported.results:
        render.remark(leaks_line(read_leaks(out_dir)))
    if as_json:
        render.emit_json(imported.results)
    else:
        render.emit(mined_table(imported.results))
    leave_if(not imported.is_whole)
