"""On a terminal: colour, lines no wider than it, and a display that stays."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from code2lora.settings import Settings
from tests.cli.conftest import Known

COMMAND = [sys.executable, "-m", "code2lora.cli"]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A command on a pseudo-terminal of 80 columns."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._main, side = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=side,
            stdout=side,
            stderr=side,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env=os.environ | {"COLUMNS": "80", "TERM": "xterm"} | environment,
        )
        os.close(side)
        self.text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def read_until(self, expected: str) -> None:
        """Read until a text has come."""
        while expected not in ESCAPE.sub("", self.text):
            assert self._read(), f"{expected!r} did not come: {self.text!r}"

    def write(self, text: str) -> None:
        """Type; ^C is the character, which the terminal turns into a signal."""
        time.sleep(0.3)  # a signal between a prompt and its read is only seen at the next key
        os.write(self._main, text.encode())

    def finish(self) -> int:
        """Read to the end and return the exit status."""
        while self._read():
            pass
        os.close(self._main)
        return self.process.wait(30)

    def _read(self) -> bool:
        """Take what has come; False at the end, and after a minute of silence."""
        if not select.select([self._main], [], [], 60)[0]:
            self.process.kill()
            return False
        try:
            block = os.read(self._main, 4096)
        except OSError:  # Linux says so when the last writer has closed
            return False
        self.text += self._decoder.decode(block)
        return bool(block)

    @property
    def lines(self) -> Sequence[str]:
        """The lines as a person reads them."""
        return ESCAPE.sub("", self.text).replace("\r\n", "\n").splitlines()


def test_a_table_is_cut_to_the_terminal(known: Known, here: Path) -> None:
    known.repo.commit({"c.py": "z = 1\n"}, "a summary that goes on " * 10)
    terminal = Terminal("log")
    assert terminal.finish() == 0
    assert "\x1b[1m" in terminal.text
    cut = [line for line in terminal.lines if line.endswith("…")]
    assert cut and {len(line) for line in cut} == {80}
    assert all(len(line) <= 80 for line in terminal.lines)


def test_colour_can_be_refused(known: Known, here: Path) -> None:
    terminal = Terminal("status", NO_COLOR="1")
    assert terminal.finish() == 0
    assert "\x1b" not in terminal.text
    assert "  queue    1 commit behind HEAD" in terminal.lines


def test_a_watched_status_follows_the_repository(known: Known, here: Path) -> None:
    terminal = Terminal("status", "--watch")
    terminal.read_until("1 commit behind HEAD")
    known.repo.reset("HEAD~1")
    terminal.read_until("empty")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.finish() == 130
    assert "Traceback" not in terminal.text
    assert "interrupted" not in terminal.text


def test_following_a_log_ends_in_silence(home: Settings) -> None:
    home.prepare()
    (home.log_dir / "daemon.log").write_text("a line\n")
    terminal = Terminal("daemon", "logs", "-f")
    terminal.read_until("a line")
    terminal.write("\x03")
    assert terminal.finish() == 130
    assert [line for line in terminal.lines if line != "^C"] == ["a line"]


@pytest.mark.parametrize(
    ("answer", "status", "told"),
    [
        ("y\n", 0, "removed 5 hooks, 3 states and 1 adapter (1.2 MB)"),
        ("n\n", 1, "error: not confirmed; nothing was changed"),
        ("\x03", 130, "error: interrupted"),
        ("\x04", 1, "error: not confirmed; nothing was changed"),
    ],
)
def test_a_question_is_answered(
    known: Known, here: Path, answer: str, status: int, told: str
) -> None:
    terminal = Terminal("deinit")
    terminal.read_until(f"3 states and 1 adapter (1.2 MB) of {here}? [y/N]: ")
    terminal.write(answer)
    assert terminal.finish() == status
    assert told in terminal.lines
    assert bool(known.store.repositories()) == (status != 0)
