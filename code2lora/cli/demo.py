"""`code2lora demo`: the whole loop on a scratch repository, apart from everything of the user's.

Writes  one temporary directory, which holds the repository and the state, data, runtime and config
        directories of the demo's own daemon.

The directory and the daemon are gone at the end, also after ^C: the user's are never touched.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from code2lora.cli import edge, render
from code2lora.cli.options import examples
from code2lora.errors import UserError

if TYPE_CHECKING:
    from code2lora.settings import Settings

_DIRECTORIES = ("config", "state", "data", "runtime")
_PATIENCE_S = 60.0
_TERMINATED = 143


@click.command("demo", epilog=examples(("code2lora demo", "about a minute; needs no network")))
def demo() -> None:
    """Show the whole loop on a scratch repository.

    Real commits, a daemon of its own, everything in one temporary directory that is removed at
    the end. Your repositories and your settings are not touched.
    """
    with _scratch() as root:
        Stage(root).play()


class Stage:
    """A scratch directory, and the commands that are played in it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._repository = root / "tidewater"
        self._environment = demo_environment(root)

    def play(self) -> None:
        """Play every act. Raises UserError when a command fails."""
        self._grow()
        self._adopt()
        self._commit()
        self._switch()
        self._complete()
        self._leave()

    def _grow(self) -> None:
        from code2lora.cli.demo_project import COMMITS

        self._say(f"A scratch repository: an invented project with {len(COMMITS) - 1} commits.")
        self._repository.mkdir()
        self._git("init", "--quiet", "--initial-branch=main")
        for message, files in COMMITS[:-1]:
            self._stage(files)
            self._git("commit", "--quiet", "--message", message)
        self._show("git", "log", "--oneline")

    def _adopt(self) -> None:
        self._say("One command takes it in: hooks, daemon, and an adapter made of its files.")
        self._code2lora("init")

    def _commit(self) -> None:
        from code2lora.cli.demo_project import COMMITS

        message, files = COMMITS[-1]
        self._say("A commit. Its hook wakes the daemon, which absorbs the diff in the background.")
        self._stage(files)
        self._timed("git", "commit", "--quiet", "--message", message)
        self._code2lora("status")

    def _switch(self) -> None:
        self._say("Back to a commit that is known: its state is stored, so this is a look-up.")
        self._timed("git", "switch", "--quiet", "--detach", "HEAD~1")
        self._timed("git", "switch", "--quiet", "main")
        self._code2lora("log", "-n", "5")

    def _complete(self) -> None:
        from code2lora.cli.demo_project import ASKED, BEGUN

        self._say("A new file is begun. The same local model, without and with the adapter:")
        self._write(BEGUN)
        self._code2lora("complete", ASKED, "--compare", "--max-tokens", "24")

    def _leave(self) -> None:
        self._say("And out again: the hooks, the states and the adapters are removed.")
        self._code2lora("deinit", "--yes")
        self._say("That was all. In a repository of yours: `code2lora init`.")

    def _say(self, text: str) -> None:
        click.echo(f"\n{click.style(f'# {text}', bold=True)}")

    def _write(self, files: Mapping[str, str]) -> None:
        for name, text in files.items():
            target = self._repository / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")

    def _stage(self, files: Mapping[str, str]) -> None:
        self._write(files)
        self._git("add", "--all")

    def _code2lora(self, *arguments: str) -> None:
        command = [sys.executable, "-I", "-m", "code2lora.cli", *arguments]
        self._show("code2lora", *arguments, command=command)

    def _show(self, *words: str, command: list[str] | None = None) -> None:
        """Print a command and run it with its output as it comes."""
        click.echo(click.style(f"$ {shlex.join(words)}", fg="cyan"))
        sys.stdout.flush()
        done = subprocess.run(
            command or list(words),
            cwd=self._repository,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode != 0:
            raise UserError(
                f"`{shlex.join(words)}` ended with status {done.returncode}",
                hint="`code2lora doctor`",
            )

    def _timed(self, *words: str) -> None:
        """Show a git command, and how long after it the adapter of the new HEAD is live."""
        from code2lora.cli.place import open_store, place_of
        from code2lora.cli.waiting import moment, stages, wait_for_head
        from code2lora.history import open_history

        settings = demo_settings(self._root)
        with (
            closing(open_history(self._repository)) as history,
            open_store(settings) as store,
            stages() as tell,
        ):
            place = place_of(settings, store, history)
            since = moment()
            self._show(*words)
            arrival = wait_for_head(place, tell, timeout_s=_PATIENCE_S, since=since)
        commit, after = render.short(arrival.adapter.commit), render.span(arrival.waited_s)
        click.echo(f"the adapter of {commit} is live {after} after the command")

    def _git(self, *arguments: str) -> None:
        """Run git out of sight."""
        done = subprocess.run(
            ["git", *arguments],
            cwd=self._repository,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise UserError(f"`git {shlex.join(arguments)}`: {done.stderr.strip()}")


def demo_environment(root: Path) -> dict[str, str]:
    """Return an environment in which git and code2lora know nothing of the user's own set-up."""
    ours = ("CODE2LORA_MODEL", "CODE2LORA_DEVICE", "CODE2LORA_THREADS")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in ours or not name.startswith(("GIT_", "CODE2LORA_"))
    }
    directories = {f"CODE2LORA_{name.upper()}_DIR": str(root / name) for name in _DIRECTORIES}
    directories["TMPDIR"] = str(root / "tmp")  # torch leaves caches there
    people = {
        f"GIT_{role}_{field}": value
        for role in ("AUTHOR", "COMMITTER")
        for field, value in (("NAME", "Demo"), ("EMAIL", "demo@example.com"))
    }
    quiet = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_PAGER": "cat"}
    return kept | directories | people | quiet


def demo_settings(root: Path) -> Settings:
    """Return the settings that the demo's commands run under."""
    from code2lora.settings import Settings

    # Not loaded: the user's own config.toml has no say here, and may be out of order.
    return Settings(
        config_dir=root / "config",
        state_dir=root / "state",
        data_dir=root / "data",
        runtime_dir=root / "runtime",
    )


@contextmanager
def _scratch() -> Iterator[Path]:
    """Yield a temporary directory; at the end, however it comes, stop its daemon and remove it."""
    endings = (signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, _terminate) for number in endings}
    root = Path(tempfile.mkdtemp(prefix="code2lora-demo-")).resolve()
    try:
        (root / "tmp").mkdir()
        yield root
    finally:
        interrupt = signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # a second ^C must not cut this off
        _stop_daemon(demo_settings(root))
        shutil.rmtree(root, ignore_errors=True)
        signal.signal(signal.SIGINT, interrupt)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop_daemon(settings: Settings) -> None:
    from code2lora.daemon.control import stop, supervisor_status

    pid = supervisor_status(settings).pid
    try:
        stop(settings)
    except UserError as error:
        edge.complain(error.message)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(_TERMINATED)
