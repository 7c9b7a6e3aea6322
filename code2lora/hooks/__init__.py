"""Install, inspect and remove the git hooks that wake the daemon.

A hook appends one line to the inbox with shell built-ins and returns. It never starts Python in
the foreground, never waits and never changes the exit status or output of a git command.
"""

from code2lora.hooks.install import inspect, install, remove
from code2lora.hooks.model import (
    EVENTS,
    HookSpec,
    HookState,
    HookTarget,
    InstallReport,
    RemovalReport,
)

__all__ = [
    "EVENTS",
    "HookSpec",
    "HookState",
    "HookTarget",
    "InstallReport",
    "RemovalReport",
    "inspect",
    "install",
    "remove",
]
