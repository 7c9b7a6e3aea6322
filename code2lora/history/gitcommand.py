"""Run the git command so that nothing in the environment or the repository steers it.

The one place of this room that starts a process and that looks at the environment: a child needs
PATH and HOME, and must not see the GIT_* that git itself sets for its hooks.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from code2lora.errors import UserError

# Where a person keeps their configuration, and with it the folders that they trust.
_KEPT = {"GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM"}

_FIXED = {
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_TERMINAL_PROMPT": "0",
    # A partial clone would fetch what it lacks, object by object: newer git heeds the first,
    # every git the second.
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_ALLOW_PROTOCOL": "none",
    "LC_ALL": "C",
    "LANGUAGE": "C",
}


def git_environment() -> dict[str, str]:
    """Return the environment in which every git process of ours runs."""
    inherited = os.environ.items()
    kept = {key: value for key, value in inherited if not key.startswith("GIT_") or key in _KEPT}
    return kept | _FIXED


def git_arguments(arguments: Sequence[str], *, git_dir: Path | None = None) -> list[str]:
    """Return the whole command line."""
    place = [] if git_dir is None else [f"--git-dir={git_dir}"]
    return ["git", "--no-pager", *place, *arguments]


def run_git(
    *arguments: str, cwd: Path | None = None, git_dir: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run git to its end and return it, whatever its exit status.

    cwd: where git looks for the repository, from there upwards
    git_dir: the git directory itself; git then does not ask who owns it

    Raises UserError when git is not installed.
    """
    try:
        return subprocess.run(
            git_arguments(arguments, git_dir=git_dir),
            cwd=cwd,
            env=git_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            check=False,
        )
    except FileNotFoundError as error:
        raise git_not_installed() from error


def resolve_revision(git_dir: Path, revision: str) -> str | None:
    """Return the full id of the commit that a revision names, or None."""
    asked = ("--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    done = run_git("rev-parse", *asked, git_dir=git_dir)
    return done.stdout.strip() if done.returncode == 0 else None


def first_complaint(stderr: str) -> str:
    """Return what git complains of first, fatal before others, without the prefix."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    fatal = [line for line in lines if line.startswith("fatal: ")] or lines
    return re.sub(r"^(?:fatal|error|warning): ", "", fatal[0]) if fatal else ""


def git_not_installed() -> UserError:
    """Return the error for a machine without git."""
    return UserError("the git command was not found", hint="install git, or add it to PATH")
