"""Fixtures of the hooks' tests: a daemon's folders, both ways of installing, a repository.

The environment variable CODE2LORA_TEST_GIT names a git of 2.54 or later where the `git` on PATH is
older; without one, the tests of hooks in git's configuration are skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import code2lora.hooks.git
from code2lora.hooks import HookSpec, HookTarget
from tests.gitrepo import GitRepo

# Read at import: the session fixture that makes the run hermetic drops the variable.
_TEST_GIT = os.environ.get("CODE2LORA_TEST_GIT")
_NEVER = (99, 0)

SHELLS = {
    "sh": ["sh"],
    "dash": ["dash"],
    "bash": ["bash"],
    "busybox": ["busybox", "sh"],
    "ksh93": ["ksh93"],
    "mksh": ["mksh"],
    "zsh": ["zsh"],
}


def _git_version(executable: str) -> tuple[int, int]:
    text = subprocess.run([executable, "version"], capture_output=True, text=True, check=True)
    found = re.search(r"(\d+)\.(\d+)", text.stdout)
    assert found is not None
    return int(found[1]), int(found[2])


def git_with_config_hooks() -> str | None:
    """Return a git that runs hooks from its configuration, or None."""
    for candidate in (_TEST_GIT, shutil.which("git")):
        if candidate and _git_version(candidate) >= code2lora.hooks.git.CONFIG_HOOKS_SINCE:
            return candidate
    return None


def use_git(executable: str, patch: pytest.MonkeyPatch) -> None:
    """Put a git first on PATH."""
    patch.setenv("PATH", f"{Path(executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def by_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks go into hook files, whatever the git on PATH could do."""
    monkeypatch.setattr(code2lora.hooks.git, "CONFIG_HOOKS_SINCE", _NEVER)


@pytest.fixture
def by_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks go into git's configuration; the test is skipped where no git can do that."""
    executable = git_with_config_hooks()
    if executable is None:
        pytest.skip("needs git 2.54 or later: name one in CODE2LORA_TEST_GIT")
    use_git(executable, monkeypatch)


@pytest.fixture(params=["file", "config"])
def method(request: pytest.FixtureRequest) -> str:
    """Each way of installing in turn."""
    request.getfixturevalue(f"by_{request.param}")
    name: str = request.param
    return name


@dataclass(frozen=True)
class Daemon:
    """The folders of a daemon that lives, because its pid file names the test's own process."""

    spec: HookSpec

    @property
    def lines(self) -> list[list[str]]:
        """The fields of every line in the inbox."""
        pokes = self.spec.inbox / "pokes"
        if not pokes.exists():
            return []
        text = os.fsdecode(pokes.read_bytes())
        assert text.endswith("\n")
        return [line.split("\t") for line in text.removesuffix("\n").split("\n")]

    def take(self) -> list[str]:
        """Return the events in the inbox and empty it."""
        events = [fields[0] for fields in self.lines]
        (self.spec.inbox / "pokes").unlink(missing_ok=True)
        return events

    def die(self) -> None:
        """Leave no pid that answers."""
        done = subprocess.Popen([sys.executable, "-c", ""])
        done.wait()
        self.spec.pid_file.write_text(str(done.pid))


def make_daemon(root: Path, start_command: tuple[str, ...] = ("/does/not/exist",)) -> Daemon:
    """Make a daemon's folders below `root`."""
    inbox = root / "inbox"
    inbox.mkdir(parents=True)
    pid_file = root / "supervisor.pid"
    pid_file.write_text(str(os.getpid()))
    return Daemon(HookSpec(inbox=inbox, pid_file=pid_file, start_command=start_command))


@pytest.fixture
def daemon(tmp_path: Path) -> Daemon:
    """A living daemon in a folder with an awkward name."""
    return make_daemon(tmp_path / 'it\'s a "state" dir, $HOME `é`\nof two lines')


def target_of(repo: GitRepo) -> HookTarget:
    """Return where the hooks of a repository go."""
    git_dir = Path(repo.git("rev-parse", "--absolute-git-dir"))
    common_dir = (repo.path / repo.git("rev-parse", "--git-common-dir")).resolve()
    is_bare = repo.git("rev-parse", "--is-bare-repository") == "true"
    return HookTarget(git_dir, common_dir, None if is_bare else repo.path.resolve())


def write_hook(repo: GitRepo, event: str, content: str | bytes, *, mode: int = 0o755) -> Path:
    """Write a hook file into the repository's own folder."""
    path = repo.path / ".git" / "hooks" / event
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def hook_tree(repo: GitRepo) -> Mapping[str, tuple[int, bytes]]:
    """Return mode and content of everything in the repository's hooks folder and its config."""
    git_dir = repo.path / ".git"
    paths = [git_dir / "config", *sorted((git_dir / "hooks").glob("*"))]
    found = {
        str(path.relative_to(git_dir)): (path.stat().st_mode, path.read_bytes()) for path in paths
    }
    return found | ({"hooks": (0, b"")} if (git_dir / "hooks").exists() else {})


@pytest.fixture(params=[name for name, words in SHELLS.items() if shutil.which(words[0])])
def shell(request: pytest.FixtureRequest) -> list[str]:
    """The start of a command line, for each shell of the machine."""
    return SHELLS[request.param]
