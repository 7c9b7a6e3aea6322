"""Read and write `code2lora.*` in a repository's own git configuration, and no other key.

All linked worktrees share these values. Writing goes through the git command, which locks the
file and replaces it whole.
"""

from __future__ import annotations

import re
import subprocess
import time
import uuid
from collections.abc import Sequence

from code2lora.errors import UserError
from code2lora.history.gitcommand import first_complaint, run_git
from code2lora.history.model import History

SECTION = "code2lora"

_ID = re.compile(r"[0-9a-f]{32}")
_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_LOCK_TRIES = 20
_LOCK_WAIT_S = 0.05


def repository_id(history: History, *, create: bool = False) -> str | None:
    """Return the repository's id, 32 hex digits; None if it has none and `create` is not set.

    Two processes that create at once agree: the first value in the file counts.
    """
    found = _values(history, "id")
    if not found and create:
        _write(history, "--add", f"{SECTION}.id", uuid.uuid4().hex)
        found = _values(history, "id")
    if not found:
        return None
    if not _ID.fullmatch(found[0]):
        raise UserError(
            f"{SECTION}.id in {history.common_dir / 'config'} is not 32 hex digits: {found[0]!r}",
            hint=f"`git config --local --unset-all {SECTION}.id`, then `code2lora init`",
        )
    return found[0]


def anchors(history: History) -> tuple[str, ...]:
    """Return the anchor commits, full hashes, in the order in which they were added."""
    found = tuple(_values(history, "anchor"))
    for commit in found:
        if not _COMMIT.fullmatch(commit):
            raise UserError(
                f"{SECTION}.anchor in {history.common_dir / 'config'} is not a full commit hash: "
                f"{commit!r}",
                hint=f"`git config --local --unset-all {SECTION}.anchor`, then `code2lora init`",
            )
    return found


def add_anchor(history: History, commit: str) -> None:
    """Record one more anchor commit; nothing happens if it is recorded already."""
    if commit not in anchors(history):
        _write(history, "--add", f"{SECTION}.anchor", _full(commit))


def publishers(history: History) -> tuple[str, ...]:
    """Return what new adapters are pushed to, each as it was written, in the order of adding."""
    return tuple(_values(history, "publish"))


def add_publisher(history: History, value: str) -> None:
    """Record one more place to push adapters to; nothing happens if it is recorded already."""
    if value not in publishers(history):
        _write(history, "--add", f"{SECTION}.publish", value)


def remove_publisher(history: History, value: str) -> None:
    """Remove a place to push adapters to; nothing happens if it is not recorded."""
    if value in publishers(history):
        _write(history, "--fixed-value", "--unset-all", f"{SECTION}.publish", value)


def forget(history: History) -> None:
    """Remove every `code2lora.*` value."""
    if _all_values(history):
        _write(history, "--remove-section", SECTION)


def _full(commit: str) -> str:
    if not _COMMIT.fullmatch(commit):
        raise UserError(f"{commit!r} is not a full commit hash", hint="`git rev-parse REVISION`")
    return commit


def _values(history: History, name: str) -> list[str]:
    return [value for key, value in _all_values(history) if key == name]


def _all_values(history: History) -> list[tuple[str, str]]:
    done = _config(history, ["--null", "--get-regexp", rf"^{SECTION}\.[^.]*$"])
    if done.returncode not in (0, 1):  # 1: no such key
        raise UserError(
            f"git cannot read {history.common_dir / 'config'}: {first_complaint(done.stderr)}",
            hint="`git config --local --list` says more",
        )
    found = []
    for record in done.stdout.split("\0")[:-1]:
        key, given, value = record.partition("\n")
        # A key without `=` means true in git's configuration.
        found.append((key.removeprefix(f"{SECTION}."), value if given else "true"))
    return found


def _write(history: History, *arguments: str) -> None:
    for _ in range(_LOCK_TRIES):
        done = _config(history, arguments)
        if done.returncode == 0:
            return
        if "File exists" not in done.stderr:
            break
        time.sleep(_LOCK_WAIT_S)  # another git holds config.lock
    raise UserError(
        f"cannot write {history.common_dir / 'config'}: {first_complaint(done.stderr)}",
        hint="see that the file and its folder are writable and that no config.lock is left there",
    )


def _config(history: History, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return run_git("config", "--local", *arguments, git_dir=history.git_dir)
