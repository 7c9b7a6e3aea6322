"""Turn values into text for a terminal, a pipe or a program.

Data goes to stdout, everything else to stderr. A terminal gets colour and lines cut to its width; a
pipe gets neither. Nothing is said by colour alone. Text that comes from a repository or from a
model passes through `clean` first, because a terminal obeys what it is sent.

Plain strings and no rich here: `status` would spend a tenth of its time on importing it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

_BLOCKS = "▁▂▃▄▅▆▇█"
_SHORT = 12

# Control characters, and the bidirectional overrides that make text read as what it is not.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def emit(text: str) -> None:
    """Print to stdout; what is no terminal gets no colour."""
    click.echo(text)


def emit_json(value: Any) -> None:
    """Print one JSON document to stdout."""
    click.echo(json.dumps(value, indent=2, default=_plain))


def remark(text: str) -> None:
    """Print a line to stderr: what is going on, what to do next."""
    click.echo(text, err=True)


def error_console() -> Console:
    """Return a rich console on stderr, for what moves: spinners and progress bars."""
    from rich.console import Console

    return Console(stderr=True, markup=False, emoji=False, highlight=False)


def styled(text: str, style: str) -> str:
    """Return text in `bold`, `dim` or a colour, unless NO_COLOR is set (no-color.org)."""
    if os.environ.get("NO_COLOR"):
        return text
    if style in ("bold", "dim"):
        return click.style(text, bold=style == "bold" or None, dim=style == "dim" or None)
    return click.style(text, fg=style)


def clean(text: str) -> str:
    """Return text that a terminal shows rather than obeys: unsafe characters become U+FFFD."""
    return _UNSAFE.sub("\ufffd", text)


def line(text: str) -> str:
    """Return the text's first line, cleaned."""
    return clean(text.partition("\n")[0])


def short(commit: str) -> str:
    """Return the beginning of a hash, long enough to name it."""
    return commit[:_SHORT]


def count(n: int, noun: str, plural: str | None = None) -> str:
    """Return `1 commit`, `2 commits`, `1,000 commits`."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def size(n_bytes: float) -> str:
    """Return bytes for people, in powers of 1000: `8.2 kB`."""
    if n_bytes < 1000:
        return f"{n_bytes:.0f} B"
    value = float(n_bytes)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5 or unit == "GB":
            break
    return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"


def span(seconds: float) -> str:
    """Return a length of time for people: `12 ms`, `1.4 s`, `3 min`, `2 h`, `5 d`."""
    if seconds < 0.9995:
        return f"{max(seconds, 0) * 1000:.0f} ms"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    for limit_s, unit_s, unit in ((5400, 60, "min"), (129600, 3600, "h")):
        if seconds < limit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def age(then: datetime, now: datetime | None = None) -> str:
    """Return how long ago a moment was: `just now`, `3 min ago`."""
    seconds = ((now or datetime.now(UTC)) - then).total_seconds()
    return "just now" if seconds < 1 else f"{span(seconds)} ago"


def gain(mean: float, error: float | None = None) -> str:
    """Return nats a token with their sign, and their standard error: `+0.112 ±0.020`."""
    return f"{mean:+.3f}" + ("" if error is None else f" ±{error:.3f}")


def sparkline(values: Sequence[float]) -> str:
    """Return one block character a value, the highest for the largest; all lowest for zeros."""
    top = max(values, default=0.0)
    if top <= 0:
        return _BLOCKS[0] * len(values)
    steps = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round(steps * max(value, 0.0) / top)] for value in values)


def bar(done: int, total: int, *, width: int = 24) -> str:
    """Return a progress bar with its numbers: `███░░░ 12/24`."""
    filled = width if total <= 0 else min(width, width * done // total)
    return f"{'█' * filled}{'░' * (width - filled)} {done}/{total}"


def fields(rows: Iterable[tuple[str, str]]) -> str:
    """Return labels and values side by side; further lines of a value stand below its first."""
    known = list(rows)
    width = max((len(label) for label, _ in known), default=0)
    lines = []
    for label, value in known:
        for number, part in enumerate(value.split("\n")):
            name = "" if number else label
            lines.append(f"  {styled(f'{name:<{width}}', 'dim')}  {part}")
    return "\n".join(lines)


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Iterable[str] = (),
    elastic: str | None = None,
) -> str:
    """Return a table without rules.

    right: the headers of columns of numbers. elastic: the header of the one column that is cut
    when the terminal is too narrow.
    """
    cells = [list(row) for row in rows]
    widths = [max(map(_width, column)) for column in zip(headers, *cells, strict=True)]
    if elastic is not None and sys.stdout.isatty():
        at = headers.index(elastic)
        spare = shutil.get_terminal_size().columns - sum(widths) - 2 * (len(widths) - 1)
        widths[at] = max(widths[at] + min(spare, 0), len(elastic), 8)
        for row in cells:
            row[at] = _cut(row[at], widths[at])
    numbers = frozenset(right)
    is_number = [header in numbers for header in headers]
    lines = [_table_line([styled(header, "bold") for header in headers], widths, is_number)]
    lines.extend(_table_line(row, widths, is_number) for row in cells)
    return "\n".join(lines)


def _table_line(cells: Sequence[str], widths: Sequence[int], is_number: Sequence[bool]) -> str:
    padded = []
    for cell, width, number in zip(cells, widths, is_number, strict=True):
        blanks = " " * (width - _width(cell))
        padded.append(blanks + cell if number else cell + blanks)
    return "  ".join(padded).rstrip()


def _width(text: str) -> int:
    """Return the columns that a terminal needs for a text with or without colour."""
    from rich.cells import cell_len

    return cell_len(click.unstyle(text))


def _cut(text: str, width: int) -> str:
    if _width(text) <= width:
        return text
    from rich.cells import set_cell_size

    return set_cell_size(click.unstyle(text), width - 1).rstrip() + "…"


def _plain(value: Any) -> Any:
    """Return what JSON can hold for a value it cannot."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds")
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
