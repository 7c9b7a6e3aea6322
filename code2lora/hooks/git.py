"""Ask git about one repository, and edit that repository's own configuration.

Runs the git command that the user's hooks will run under, because its version and its view of
`core.hooksPath` decide where they go. Writes only the repository's local configuration.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from functools import cached_property
from pathlib import Path

from code2lora.errors import UserError
from code2lora.hooks.body import LOCAL_VARIABLES
from code2lora.hooks.model import HookTarget

CONFIG_HOOKS_SINCE = (2, 54)
_TIMEOUT_S = 30.0
_LOCK_PATIENCE_S = 1.0
_LOCK_POLL_S = 0.05


class ConfigWriteError(Exception):
    """The repository's configuration cannot be written; the text is git's reason."""


class Git:
    """One repository as the git command sees it. Methods raise UserError if git cannot be run."""

    def __init__(self, target: HookTarget, executable: str) -> None:
        self.target = target
        self._executable = executable
        self._folder = target.worktree or target.git_dir

    @cached_property
    def version(self) -> tuple[int, int]:
        """Major and minor version."""
        text = os.fsdecode(self._run("version").stdout)
        found = re.search(r"(\d+)\.(\d+)", text)
        if found is None:
            raise UserError(f"`{self._executable} version` says {text.strip()!r}, not a version")
        return int(found[1]), int(found[2])

    @property
    def has_config_hooks(self) -> bool:
        """Whether this git runs hooks that its configuration names."""
        return self.version >= CONFIG_HOOKS_SINCE

    @cached_property
    def hooks_directory(self) -> Path:
        """Where this git looks for hook files; need not exist."""
        done = self._run("rev-parse", "--git-path", "hooks")
        if done.returncode != 0:
            raise UserError(
                f"{self.target.git_dir} is not a git directory: {_reason(done)}",
                hint="run the command inside a git repository",
            )
        return self._folder / os.fsdecode(done.stdout.removesuffix(b"\n"))

    def is_ignored(self, path: Path) -> bool:
        """Tell whether a path of the working tree is untracked and ignored."""
        return self._run("check-ignore", "--quiet", "--", os.fspath(path)).returncode == 0

    def get_config(self, pattern: str, *, local: bool) -> list[tuple[str, str]]:
        """Return keys (section and variable in lower case) and values, the strongest last.

        local: only what stands in the repository's own configuration.
        """
        scope = ["--local"] if local else []
        done = self._run("config", *scope, "--null", "--get-regexp", pattern)
        entries = [entry for entry in done.stdout.split(b"\0") if entry]
        pairs = (os.fsdecode(entry).partition("\n") for entry in entries)
        return [(key, value) for key, _, value in pairs]

    def set_config(self, key: str, value: str) -> None:
        """Give a key of the local configuration this one value. Raises ConfigWriteError."""
        self._edit_config("--replace-all", key, value)

    def remove_section(self, section: str) -> None:
        """Take a whole section out of the local configuration. Raises ConfigWriteError."""
        self._edit_config("--remove-section", section)

    def _edit_config(self, *args: str) -> None:
        """Edit the configuration, waiting while another process holds its lock."""
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while (done := self._run("config", "--local", *args)).returncode != 0:
            is_locked = b"could not lock" in done.stderr and b"exists" in done.stderr
            if not is_locked or time.monotonic() > deadline:
                raise ConfigWriteError(_reason(done))
            time.sleep(_LOCK_POLL_S)

    def _run(self, *args: str) -> subprocess.CompletedProcess[bytes]:
        place = [f"--git-dir={self.target.git_dir}"]
        if self.target.worktree is not None:
            place.append(f"--work-tree={self.target.worktree}")
        environment = {k: v for k, v in os.environ.items() if k not in LOCAL_VARIABLES}
        environment["LC_ALL"] = "C"
        try:
            return subprocess.run(
                [self._executable, *place, *args],
                cwd=self._folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=_TIMEOUT_S,
            )
        except FileNotFoundError as error:
            if not self._folder.is_dir():
                raise UserError(f"{self._folder} does not exist") from error
            raise UserError(
                f"there is no command {self._executable!r}", hint="install git"
            ) from error
        except OSError as error:
            raise UserError(f"cannot run {self._executable!r}: {error.strerror}") from error
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"`git {' '.join(args[:2])}` did not answer in {_TIMEOUT_S:.0f} s"
            ) from error


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    """Return git's last line on stderr, without its prefix."""
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
    return re.sub(r"^(?:fatal|error): ", "", lines[-1])
