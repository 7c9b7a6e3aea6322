"""Show how far a long piece of work is, and let ^C ask it to stop instead of cutting it off."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from code2lora.cli import render

_LINE_EVERY_S = 10.0

Tell = Callable[[float, str], None]
"""Called with the share that is done, 0 to 1, and what there is to say."""


@contextmanager
def progress(title: str) -> Iterator[Tell]:
    """Yield a teller: a bar on a terminal, a line now and then elsewhere; all on stderr."""
    if not sys.stderr.isatty():
        yield _liner(title)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=render.error_console()) as bars:
        task = bars.add_task(title, total=1.0, said="")

        def tell(share: float, said: str) -> None:
            bars.update(task, completed=share, said=said)

        yield tell


def _liner(title: str) -> Tell:
    told_s = float("-inf")

    def tell(share: float, said: str) -> None:
        nonlocal told_s
        now_s = time.monotonic()
        if now_s - told_s >= _LINE_EVERY_S or share >= 1.0:
            told_s = now_s
            render.remark(f"{title} {share:.0%}  {said}")

    return tell


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether ^C or SIGTERM has asked for an end.

    The second ^C interrupts at once, as if this were not here.
    """
    asked = False

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, previous[signal.Signals(number)])
        render.remark("stopping at the next whole step; ^C again to stop at once")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
