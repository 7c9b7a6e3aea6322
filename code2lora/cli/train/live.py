"""Show a fit while it runs: a table on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from code2lora.cli import render
from code2lora.cli.progress import progress

if TYPE_CHECKING:
    from rich.table import Table

    from code2lora.training.fitting.schedule import FitProgress


class FitDisplay(NamedTuple):
    """What shows a fit."""

    begun: Callable[[str, float], None]
    """Takes the name of a repository that is read, and the share that is done."""
    step: Callable[[FitProgress], None]


_ROWS = 10
_COLUMNS = ("done", "step", "loss", "margin", "distil", "own-wrong", "unseen", "tasks/s", "memory")


@contextmanager
def fit_display(*, quiet: bool) -> Iterator[FitDisplay]:
    """Yield a display, on stderr. quiet: for the processes that are not to say anything."""
    if quiet:
        yield FitDisplay(lambda name, share: None, lambda now: None)
    elif sys.stderr.isatty():
        with _table() as display:
            yield display
    else:
        with progress("reading") as read, progress("fitting") as line:
            yield FitDisplay(
                lambda name, share: read(share, render.line(name)),
                lambda now: line(now.done_share, said(now)),
            )


def said(now: FitProgress) -> str:
    """Return one line about a step."""
    parts = [f"step {now.step}", f"loss {now.loss:.3f}", f"own-wrong {now.own_minus_wrong:+.3f}"]
    if now.distillation:
        parts.append(f"distillation {now.distillation:.3f}")
    if now.tasks_per_s:
        parts.append(f"{now.tasks_per_s:.1f} tasks/s")
    if now.memory_bytes:
        parts.append(f"{now.memory_bytes / 2**30:.1f} GiB")
    if now.monitor is not None:
        parts.append(f"unseen {now.monitor.strata['all'].own_minus_wrong.mean:+.4f}")
    return ", ".join(parts)


@contextmanager
def _table() -> Iterator[FitDisplay]:
    from rich.live import Live

    rows: deque[tuple[str, ...]] = deque(maxlen=_ROWS)
    unseen = "-"
    with Live(console=render.error_console(), refresh_per_second=4) as live:

        def tell(now: FitProgress) -> None:
            nonlocal unseen
            if now.monitor is not None:
                unseen = f"{now.monitor.strata['all'].own_minus_wrong.mean:+.4f}"
            rows.append(_row(now, unseen))
            live.update(_rendered(rows))

        yield FitDisplay(
            lambda name, share: live.update(f"reading {share:.0%}  {render.line(name)}"), tell
        )


def _row(now: FitProgress, unseen: str) -> tuple[str, ...]:
    return (
        f"{now.done_share:.0%}",
        f"{now.step:,}",
        f"{now.loss:.3f}",
        f"{now.margin_loss:.3f}",
        f"{now.distillation:.3f}",
        f"{now.own_minus_wrong:+.3f}",
        unseen,
        f"{now.tasks_per_s:.1f}",
        f"{now.memory_bytes / 2**30:.1f} GiB",
    )


def _rendered(rows: deque[tuple[str, ...]]) -> Table:
    from rich.table import Table

    table = Table(*_COLUMNS, title="fitting")
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table
