"""Turn the way a command ended into words on stderr and an exit status.

0 done, 1 something a person can mend, 2 wrong usage, 3 a bug of ours, 130 interrupted. A bug
leaves its traceback in a file under the log directory; the screen gets the path.
"""

from __future__ import annotations

import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from code2lora import __version__
from code2lora.errors import UserError

_TRAIN_PACKAGES = frozenset({"accelerate", "datasets", "pyarrow", "tensorboard"})
_TRAIN_HINT = "`pip install 'code2lora-daemon[train]'`"

OK, USER_ERROR, USAGE, BUG, INTERRUPTED = 0, 1, 2, 3, 130


class Hinted(click.UsageError):
    """Wrong usage with something to do about it."""

    def __init__(self, message: str, hint: str, ctx: click.Context | None = None) -> None:
        super().__init__(message, ctx)
        self.hint = hint


def report(error: BaseException, argv: list[str]) -> int:
    """Tell on stderr what ended a command, and return the exit status for it."""
    if isinstance(error, UserError):
        complain(error.message, error.hint)
        return USER_ERROR
    if isinstance(error, click.Abort):
        return _report_abort(error)
    if isinstance(error, KeyboardInterrupt):
        complain("interrupted")
        return INTERRUPTED
    if isinstance(error, click.NoSuchOption):
        complain(_first_lower(error.message), _option_hint(error))
        return USAGE
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.message, err=True)
        return USAGE
    if isinstance(error, click.UsageError):
        complain(_first_lower(error.format_message()), _usage_hint(error))
        return USAGE
    if isinstance(error, click.ClickException):
        complain(_first_lower(error.format_message()))
        return USER_ERROR
    if isinstance(error, ModuleNotFoundError) and error.name in _TRAIN_PACKAGES:
        complain(f"training needs the package {error.name}", _TRAIN_HINT)
        return USER_ERROR
    return _report_bug(error, argv)


@contextmanager
def ends_by_interrupt() -> Iterator[None]:
    """End in silence at ^C, which is how one leaves what is meant to run until then."""
    try:
        yield
    except KeyboardInterrupt:
        raise click.exceptions.Exit(INTERRUPTED) from None


def complain(message: str, hint: str | None = None) -> None:
    """Print an error, and what to do about it, to stderr."""
    click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True)
    if hint:
        click.echo(f"{click.style('hint:', fg='cyan', bold=True)} {hint}", err=True)


def _report_abort(error: click.Abort) -> int:
    if isinstance(error.__cause__, KeyboardInterrupt):
        complain("interrupted")
        return INTERRUPTED
    if error.__context__ is not None:  # at a question: the terminal has echoed ^C or ^D
        click.echo(err=True)
    if isinstance(error.__context__, KeyboardInterrupt):
        complain("interrupted")
        return INTERRUPTED
    complain("not confirmed; nothing was changed")
    return USER_ERROR


def _usage_hint(error: click.UsageError) -> str | None:
    if isinstance(error, Hinted):
        return error.hint
    if error.ctx is None:
        return None
    return f"`{error.ctx.command_path} --help`"


def _option_hint(error: click.NoSuchOption) -> str | None:
    if not error.possibilities:
        return _usage_hint(error)
    return f"did you mean `{min(error.possibilities)}`?"


def _first_lower(text: str) -> str:
    """Return the sentence as our messages read: no capital at the front, no stop at the end."""
    text = text.strip().removesuffix(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _report_bug(error: BaseException, argv: list[str]) -> int:
    summary = traceback.format_exception_only(error)[-1].strip().partition("\n")[0]
    where = _write_traceback(error, argv)
    if where is None:
        traceback.print_exception(error)
        complain(f"this is a bug: {summary}")
    else:
        complain(f"this is a bug: {summary}", f"the traceback is in {where}")
    return BUG


def _write_traceback(error: BaseException, argv: list[str]) -> Path | None:
    """Write what a bug report needs; None when there is nowhere to write."""
    from code2lora.settings import load_settings

    text = (
        f"code2lora {__version__}, Python {platform.python_version()}, {platform.platform()}\n"
        f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n"
        f"arguments: {argv!r}\n\n"
        f"{''.join(traceback.format_exception(error))}"
    )
    try:
        folder = load_settings().log_dir
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except (OSError, UserError):
        return None
    return path


def soften_streams() -> None:
    """Print what the terminal's encoding cannot hold as escapes, rather than fail on it."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
