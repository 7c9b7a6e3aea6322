"""Run the stages of a model one after the other, each a command in a process of its own.

What is finished is not run again while all that was made is there; a stage that was cut off goes on
by itself.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from code2lora.cli import edge, render
from code2lora.training.times import StageTime, Times

COMMAND = (sys.executable, "-m", "code2lora", "train")
_SAVE_EVERY_S = 30.0

Options = Mapping[str, object]
"""Names of options, without their dashes, and values."""


@dataclass(frozen=True)
class Stage:
    """One command of `code2lora train`."""

    name: str
    options: Options
    makes: Path
    """What is there when it is finished."""
    answers: tuple[int, ...] = (edge.OK,)
    """Exit statuses that finish it; a verdict of the audit is no accident."""

    @property
    def command(self) -> list[str]:
        """The command line; an option that is None is left out, a tuple is repeated."""
        words = [*COMMAND, self.name]
        for name, value in self.options.items():
            for each in value if isinstance(value, tuple) else (value,):
                words += [] if each is None else [f"--{name}={each}"]
        return words


def run_stages(stages: Sequence[Stage], times: Times, *, output: IO[str] | None) -> int:
    """Run all from the first that is not finished; return 0, or the status of one that failed.

    times: filled and written
    output: where the stages' data goes; None for stdout
    """
    skipping = True
    for number, stage in enumerate(stages, start=1):
        render.remark(render.styled(f"[{number}/{len(stages)}] {stage.name}", "bold"))
        spent = times.stages.setdefault(stage.name, StageTime())
        skipping = skipping and spent.status in stage.answers and stage.makes.exists()
        if skipping:
            render.remark(f"finished before, in {render.span(spent.seconds)}")
            continue
        status = _run(stage, spent, times, output)
        if status not in stage.answers:
            return status
        render.remark(f"{stage.name} took {render.span(spent.seconds)}")
    return edge.OK


def _run(stage: Stage, spent: StageTime, times: Times, output: IO[str] | None) -> int:
    """Run a stage to its end and return its exit status, as a shell has it."""
    spent.status = None
    before_s, begun_s = spent.seconds, time.monotonic()
    with subprocess.Popen(stage.command, stdout=output) as child, _signals_for(child) as received:
        status: int | None = None
        while status is None:
            with suppress(subprocess.TimeoutExpired):
                status = child.wait(timeout=_SAVE_EVERY_S)
            spent.seconds = before_s + time.monotonic() - begun_s
            spent.status = status if status in stage.answers else None
            times.write()
    if status in stage.answers:
        return edge.INTERRUPTED if received else status
    return status if status > 0 else 128 - status  # less than 0: by that signal


@contextmanager
def _signals_for(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Leave it to a stage how it ends, and yield what signals have come.

    A terminal's ^C reaches the stage by itself; SIGTERM is passed on.
    """
    received: list[int] = []

    def receive(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGTERM:
            child.terminate()

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
