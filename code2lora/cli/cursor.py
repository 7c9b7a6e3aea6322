"""Turn what the user points at (FILE:LINE, standard input, --prompt) into prompt and suffix."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from code2lora.cli import render
from code2lora.errors import UserError

MAX_CHARACTERS = 200_000
"""Kept on either side of the cursor; far more than any context window of the worker holds."""

# Not `splitlines`, for which a form feed ends a line; editors number by line feeds.
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_CURSOR = re.compile(r"(?P<file>.+?):(?P<line>\d+)(?::(?P<column>\d+))?", re.DOTALL)


@dataclass(frozen=True)
class Cursor:
    """What to complete."""

    prompt: str
    suffix: str | None
    file: Path | None
    """The file the text is from; its repository is the one to ask."""


def read_cursor(target: str | None, prompt: str | None, suffix: str | None) -> Cursor:
    """Return the text around the cursor.

    target: FILE:LINE[:COLUMN], `-` for standard input, or None with a prompt

    Raises click.UsageError when nothing or too much is asked, UserError when the file has no such
    line or cannot be read.
    """
    if target is not None and prompt is not None:
        raise click.UsageError(f"{target} and --prompt exclude each other")
    if suffix is not None and target not in (None, "-"):
        raise click.UsageError("--suffix goes with --prompt or standard input")
    if prompt is not None:
        return Cursor(prompt, suffix, None)
    if target == "-" or (target is None and not sys.stdin.isatty()):
        return Cursor(sys.stdin.read()[-MAX_CHARACTERS:], suffix, None)
    if target is None:
        raise click.UsageError("nothing to complete: give FILE:LINE, --prompt TEXT, or `-`")
    return _in_file(target)


def _in_file(target: str) -> Cursor:
    found = _CURSOR.fullmatch(target)
    if found is None:
        raise click.UsageError(f"{target!r} is not FILE:LINE or FILE:LINE:COLUMN")
    file, number = Path(found["file"]), int(found["line"])
    try:
        # Not `read_text`: a file's own line ends are part of what is completed.
        text = file.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise UserError(
            f"cannot read {file}: {error.strerror}",
            hint="give FILE:LINE of a file that is there and that you may read",
        ) from error
    lines = _LINE.findall(text)
    if not lines and number != 1:
        raise UserError(f"{file} is empty, not a line {number}", hint="line 1 is all it has")
    if lines and not 1 <= number <= len(lines):
        raise UserError(
            f"{file} has {render.count(len(lines), 'line')}, not a line {number}",
            hint=f"lines 1 to {len(lines)}" if len(lines) > 1 else "line 1",
        )
    line = lines[number - 1] if lines else ""
    length = len(line.rstrip("\r\n"))
    column = length + 1 if found["column"] is None else int(found["column"])
    if not 1 <= column <= length + 1:
        has = f"line {number} of {file} has {render.count(length, 'character')}"
        raise UserError(
            f"{has}, not a column {column}",
            hint=f"columns 1 to {length + 1}" if length else "column 1",
        )
    at = sum(map(len, lines[: number - 1])) + column - 1
    before, after = text[:at], text[at:]
    return Cursor(before[-MAX_CHARACTERS:], after[:MAX_CHARACTERS], file)
