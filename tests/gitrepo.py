"""Real git repositories for tests: the git command, a clean environment, fixed people and dates.

The same calls give the same commit ids on every machine and on every run. Nothing of the user's
own git configuration or environment reaches these repositories.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

FIRST_DATE_S = 1_700_000_000
"""Committer time of the first commit; each later command is dated one minute after the last."""


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment without any GIT_*, and with no system or user configuration."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    fixed = {
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_EDITOR": "true",
        "GIT_AUTHOR_NAME": "Ada Author",
        "GIT_AUTHOR_EMAIL": "ada@example.com",
        "GIT_COMMITTER_NAME": "Carl Committer",
        "GIT_COMMITTER_EMAIL": "carl@example.com",
        "GIT_ALLOW_PROTOCOL": "file",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
    }
    return kept | fixed | dict(extra or {})


class GitError(AssertionError):
    """A git command failed; the text holds all that is needed to see why."""


class GitRepo:
    """One working tree, driven through the git command."""

    def __init__(
        self,
        path: Path | str,
        *,
        init: bool = True,
        bare: bool = False,
        options: Sequence[str] = (),
    ) -> None:
        """Make a repository at `path` on branch `main`, or wrap the one there if `init` is False.

        options: further arguments of `git init`, such as `--object-format=sha256`.
        """
        self.path = Path(path)
        self.now_s = FIRST_DATE_S
        if init:
            self.path.mkdir(parents=True, exist_ok=True)
            bareness = ["--bare"] if bare else []
            self.git("init", "--quiet", "--initial-branch=main", *bareness, *options)

    @property
    def environment(self) -> dict[str, str]:
        """What git runs in, with the dates of this moment."""
        date = f"{self.now_s} +0000"
        return clean_environment({"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date})

    def run(
        self, *args: str, check: bool = True, data: bytes | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run git here and return the finished process; each call is a minute later."""
        self.now_s += 60
        done = subprocess.run(
            ["git", *args],
            cwd=self.path,
            env=self.environment,
            input=b"" if data is None else data,
            capture_output=True,
            check=False,
        )
        if check and done.returncode != 0:
            raise GitError(
                f"git {' '.join(args)} in {self.path}: exit {done.returncode}\n"
                f"{done.stdout.decode(errors='replace')}\n{done.stderr.decode(errors='replace')}"
            )
        return done

    def git(self, *args: str, data: bytes | None = None) -> str:
        """Run git here and return its output without the last newline; GitError on failure."""
        return self.run(*args, data=data).stdout.decode("utf-8", "surrogateescape").rstrip("\n")

    @property
    def head(self) -> str:
        """The full hash of HEAD."""
        return self.git("rev-parse", "HEAD")

    def write(self, files: Mapping[str, str | bytes | None]) -> None:
        """Write files below the working tree; None removes one, and folders left empty."""
        for name in (name for name, content in files.items() if content is None):
            target = self.path / name
            target.unlink()
            while not any(target.parent.iterdir()) and target.parent != self.path:
                target = target.parent
                target.rmdir()
        for name, content in files.items():
            if content is not None:
                target = self.path / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.encode() if isinstance(content, str) else content)

    def commit(
        self,
        files: Mapping[str, str | bytes | None] | None = None,
        message: str = "change",
        *,
        allow_empty: bool = False,
        amend: bool = False,
    ) -> str:
        """Write the files, commit everything, and return the full hash."""
        self.write(files or {})
        self.git("add", "--all")
        flags = [*(["--allow-empty"] if allow_empty else []), *(["--amend"] if amend else [])]
        self.git("commit", "--quiet", "--message", message, *flags)
        return self.head

    def branch(self, name: str, start: str = "HEAD") -> None:
        """Create a branch and stay where we are."""
        self.git("branch", name, start)

    def switch(self, name: str, *, create: bool = False, orphan: bool = False) -> None:
        """Go to a branch; `create` makes it here, `orphan` makes it without history or files."""
        flags = ["--create"] if create else ["--orphan"] if orphan else []
        self.git("switch", "--quiet", *flags, name)

    def merge(self, name: str, message: str = "merge") -> str:
        """Merge a branch with a merge commit, never a fast-forward, and return its full hash."""
        self.git("merge", "--quiet", "--no-ff", "--message", message, name)
        return self.head

    def reset(self, revision: str) -> str:
        """Move the branch and the working tree to a revision and return its full hash."""
        self.git("reset", "--quiet", "--hard", revision)
        return self.head

    def clone(self, path: Path | str, *options: str) -> GitRepo:
        """Clone this repository through the file protocol and return the clone."""
        self.git("clone", "--quiet", *options, self.path.as_uri(), str(path))
        return self._wrap(path)

    def worktree(self, path: Path | str, branch: str, start: str = "HEAD") -> GitRepo:
        """Add a linked worktree on a new branch and return it."""
        self.git("worktree", "add", "--quiet", "-b", branch, str(path), start)
        return self._wrap(path)

    def _wrap(self, path: Path | str) -> GitRepo:
        other = GitRepo(path, init=False)
        other.now_s = self.now_s
        return other
