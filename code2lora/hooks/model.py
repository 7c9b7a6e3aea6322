"""The words of this room: where hooks go, what they do, and how they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

EVENTS = (
    "post-commit",
    "post-merge",
    "post-checkout",
    "post-rewrite",
    "post-applypatch",
)
"""The git events after which HEAD may stand elsewhere. None of them covers them all."""

POKES = "pokes"
"""The file of the inbox that hooks append to."""
STARTS = "starts"
"""The file of the inbox that counts starts of the daemon which did not succeed."""
START_LOG = "start.log"
"""The file of the inbox that holds what the last start printed."""

Status = Literal["installed", "missing", "blocked"]
Method = Literal["config", "file", "by hand"]


@dataclass(frozen=True, slots=True)
class HookTarget:
    """A repository, seen from one of its worktrees."""

    git_dir: Path
    """This worktree's git directory."""
    common_dir: Path
    """The git directory that all worktrees share; equal to `git_dir` in the main worktree."""
    worktree: Path | None
    """The working tree's root; None in a bare repository."""


@dataclass(frozen=True, slots=True)
class HookSpec:
    """What the hooks do. All paths are absolute."""

    inbox: Path
    """The directory whose file `pokes` gets one line for each event."""
    pid_file: Path
    """Holds the running supervisor's pid in decimal; absent or stale when none runs."""
    start_command: Sequence[str]
    """Starts the supervisor in the background and exits 0 once one runs; first an absolute path."""

    def __post_init__(self) -> None:
        paths = (self.inbox, self.pid_file, Path(self.start_command[0]))
        assert all(path.is_absolute() for path in paths), f"hooks need absolute paths: {paths}"


@dataclass(frozen=True, slots=True)
class HookState:
    """How the hook of one event stands."""

    event: str
    status: Status
    how: Method | None = None
    """Set when installed: in git's configuration, as a block in a hook file, or by the user."""
    path: Path | None = None
    """The hook file concerned; None for hooks in git's configuration."""
    outdated: bool = False
    """True when installed for other paths or by another version; `install` renews it."""
    reason: str | None = None
    """Set when blocked: what stands in the way, in one line."""
    hint: str | None = None
    """Set when blocked: what the user can do about it."""
    line: str | None = None
    """Set when the user can add a line of shell to a hook of his own; this is the line."""


@dataclass(frozen=True, slots=True)
class InstallReport:
    """How every event stands after `install` or under `inspect`."""

    states: tuple[HookState, ...]
    changed: bool = False
    """Whether this call wrote anything."""

    @property
    def blocked(self) -> tuple[HookState, ...]:
        """The events that cannot be had without the user."""
        return tuple(state for state in self.states if state.status == "blocked")

    @property
    def complete(self) -> bool:
        """Whether every event is installed and up to date."""
        return all(state.status == "installed" and not state.outdated for state in self.states)


@dataclass(frozen=True, slots=True)
class RemovalReport:
    """What `remove` took away, and what it had to leave."""

    removed: tuple[str, ...]
    """The events whose hook is gone, in the order of `EVENTS`."""
    left: tuple[HookState, ...]
    """Hooks of ours that are still there, each with its reason."""
