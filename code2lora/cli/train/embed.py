"""`code2lora train embed`: from mined repositories to feature vectors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from code2lora.cli import render
from code2lora.cli.options import examples, json_option
from code2lora.cli.progress import progress, stop_on_interrupt
from code2lora.cli.train.options import (
    EXISTING,
    device_option,
    hush_progress_bars,
    leave_if,
    mined_option,
)

if TYPE_CHECKING:
    from code2lora.training.data.embedding import Embedded, EmbedProgress

_CHUNK_CHARS = 200_000
"""Read together on a CPU, where this much keeps ^C waiting for long enough."""
_ACCELERATED_CHUNK_CHARS = 16_000_000


@click.command(
    "embed",
    epilog=examples(
        ("code2lora train embed --mined mined --encoder encoder", "read all that is mined"),
        ("code2lora train embed --mined mined --encoder e --precision bfloat16", "faster on a GPU"),
    ),
)
@mined_option
@click.option(
    "--encoder", "encoder_dir", required=True, type=EXISTING, help="The frozen encoder's directory."
)
@click.option(
    "--base",
    "base_dir",
    type=EXISTING,
    help="The base decoder's directory, for an encoder that reads its gradients.",
)
@device_option
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="What a transformer encoder computes in.",
)
@json_option
def embed(
    mined: Path,
    encoder_dir: Path,
    base_dir: Path | None,
    device: str,
    precision: Literal["float32", "bfloat16"],
    as_json: bool,
) -> None:
    """Turn what was mined into feature vectors, for training behind a frozen encoder.

    Every distinct diff and every distinct version of a file is read once, also when repositories
    are mined again. What is finished is skipped.
    """
    from code2lora.serving.model import resolve_device
    from code2lora.training.data.embedding import EmbedConfig, embed_mined

    hush_progress_bars()
    where = resolve_device(device)
    chunk_chars = _CHUNK_CHARS if where.type == "cpu" else _ACCELERATED_CHUNK_CHARS
    clock = _Clock()
    with stop_on_interrupt() as stop, progress("embedding") as tell:
        results = embed_mined(
            mined,
            encoder_dir,
            EmbedConfig(precision=precision, chunk_chars=chunk_chars),
            base=base_dir,
            device=where,
            progress=lambda now: tell(now.share, clock.say(now)),
            stop=stop,
        )
    if as_json:
        render.emit_json(results)
    else:
        render.emit(_embedded_table(results))
    leave_if(stop())


class _Clock:
    """Says how fast it goes, and how long it will still take."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()

    def say(self, now: EmbedProgress) -> str:
        """Return the repository, the speed, and the time that is left."""
        elapsed_s = time.monotonic() - self._start_s
        said = f"{render.line(now.repository)}, {now.n_tokens / max(elapsed_s, 1e-9):,.0f} tokens/s"
        read = now.share - now.kept  # what was there before took no time
        if read <= 0 or now.share >= 1:
            return said
        return f"{said}, {render.span(elapsed_s * (1 - now.share) / read)} left"


def _embedded_table(results: Sequence[Embedded]) -> str:
    rows = [
        [
            result.status,
            render.line(result.name),
            f"{result.n_diffs:,}",
            f"{result.n_files:,}",
            f"{result.n_tokens:,}",
        ]
        for result in results
    ]
    headers = ["STATUS", "REPOSITORY", "DIFFS", "FILES", "TOKENS"]
    return render.table(headers, rows, right=headers[2:])
