"""Keep our hooks as blocks in hook files, for git that knows no hooks in its configuration.

A file is edited only where it is the repository's own: in its git directory, or in the working
tree where git ignores it (husky's generated `.husky/_`). What is committed, or shared with other
repositories through `core.hooksPath`, is the user's to edit; he is given the line.

Files are replaced by rename, so that a hook that is running, or a kill, never meets half a script.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from code2lora.hooks.block import (
    NEW_FILE,
    Marks,
    extract,
    insert,
    is_current,
    is_damaged,
    is_ours_alone,
    why_not_shell,
)
from code2lora.hooks.body import body, line_to_add, pokes_by_hand
from code2lora.hooks.git import Git
from code2lora.hooks.model import EVENTS, HookSpec, HookState

_COMMENT = (
    "# Tells code2lora's daemon that HEAD may have moved; prints nothing, never fails.\n"
    "# `code2lora deinit` takes these lines out again.\n"
)
_SET_ASIDE = (".legacy", ".old")
"""Where pre-commit and lefthook move a hook that was there before theirs."""


def install_in_files(git: Git, spec: HookSpec) -> tuple[tuple[HookState, ...], bool]:
    """Write what is missing or outdated; return how every event stands, and whether we wrote.

    A file that cannot be written leaves its event blocked, with the system's reason.
    """
    settled: list[HookState] = []
    changed = False
    makes_directory = not git.hooks_directory.exists()
    for state in inspect_files(git, spec):
        if state.status == "blocked" or (state.status == "installed" and not state.outdated):
            settled.append(state)
            continue
        assert state.path is not None
        try:
            _write_block(state.path, _block_text(state.event, spec), makes_directory)
        except OSError as error:
            settled.append(_unwritable(state.event, state.path, error))
        else:
            changed = True
            settled.append(HookState(state.event, "installed", how="file", path=state.path))
    return tuple(settled), changed


def inspect_files(git: Git, spec: HookSpec) -> tuple[HookState, ...]:
    """Return how every event stands, judged by the hook files alone."""
    return tuple(_inspect_file(git, spec, event) for event in EVENTS)


def remove_from_files(git: Git) -> tuple[tuple[str, ...], tuple[HookState, ...]]:
    """Take our blocks out; return the events that had one, and those that could not be cleaned.

    Also looks where other tools set hooks aside, so that ours does not come back with them, and in
    the default folder if `core.hooksPath` was set since.
    """
    removed: list[str] = []
    left: list[HookState] = []
    made: set[Path] = set()
    for event, path in _candidates(git):
        try:
            marks = _remove_block(path)
        except OSError as error:
            left.append(_unwritable(event, path, error))
            continue
        except _Damaged:
            left.append(_damaged(event, path))
            continue
        if marks is None:
            continue
        if event not in removed:
            removed.append(event)
        if marks.directory:
            made.add(path.parent)
    for directory in made:
        with suppress(OSError):  # somebody else uses it by now
            directory.rmdir()
    return tuple(removed), tuple(left)


class _Damaged(Exception):
    """A marker of ours stands alone."""


def _inspect_file(git: Git, spec: HookSpec, event: str) -> HookState:
    path = git.hooks_directory / event
    line = line_to_add(event, spec)

    def blocked(reason: str, hint: str) -> HookState:
        return HookState(event, "blocked", path=path, reason=reason, hint=hint, line=line)

    if git.hooks_directory.exists() and not git.hooks_directory.is_dir():
        return HookState(
            event,
            "blocked",
            path=path,
            reason=f"core.hooksPath is {git.hooks_directory}, which is not a folder",
            hint="`git config --unset core.hooksPath`, or git 2.54 or later",
        )
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = None
    except OSError as error:
        return blocked(f"{path} cannot be read: {error.strerror}", "make it a readable file")
    if content is not None:
        found = _inspect_content(path, content, event, spec)
        if found is not None:
            return found
    reason = _why_not_ours(git, path)
    if reason is not None:
        return blocked(reason, "add the line to it yourself, or use git 2.54 or later")
    if content is None:
        return HookState(event, "missing", path=path)
    reason = why_not_shell(content)
    if reason is not None:
        return blocked(f"{path} {reason}", "have it run the line, or use git 2.54 or later")
    if not _is_executable(path):
        return blocked(f"{path} is not executable, so git ignores it", f"`chmod +x {path}`")
    return HookState(event, "missing", path=path)


def _inspect_content(path: Path, content: bytes, event: str, spec: HookSpec) -> HookState | None:
    """Return the state that what is in the file decides; None if it has nothing of ours."""
    if is_damaged(content):
        return _damaged(event, path)
    has_block = extract(content) is not None
    if not has_block and not pokes_by_hand(content, event, spec):
        return None
    if not _is_executable(path):
        return HookState(
            event,
            "blocked",
            path=path,
            reason=f"{path} is not executable, so git ignores it",
            hint=f"`chmod +x {path}`",
        )
    if not has_block:
        return HookState(event, "installed", how="by hand", path=path)
    outdated = not is_current(content, _block_text(event, spec))
    return HookState(event, "installed", how="file", path=path, outdated=outdated)


def _why_not_ours(git: Git, path: Path) -> str | None:
    """Return why a hook file is not the repository's own to edit; None if it is."""
    if path.is_symlink():
        return f"{path} is a symbolic link to {os.readlink(path)}"
    real = path.parent.resolve() / path.name
    if _is_private(git, real):
        return None
    worktree = git.target.worktree
    if worktree is None or not real.is_relative_to(worktree.resolve()):
        return f"{path} lies outside the repository and may serve others (core.hooksPath)"
    if git.is_ignored(real):
        return None
    return f"{path} belongs to the working tree (core.hooksPath), so it is or may be committed"


def _is_private(git: Git, real: Path) -> bool:
    """Tell whether a resolved path lies in the git directory rather than in the working tree."""
    target = git.target
    inner = {target.git_dir.resolve(), target.common_dir.resolve()}
    outer = {target.worktree.resolve()} if target.worktree is not None else set()
    # Either may lie within the other: `project/.git`, or worktrees kept inside a bare repository.
    nearest = next((parent for parent in real.parents if parent in inner | outer), None)
    return nearest in inner


def _candidates(git: Git) -> Iterator[tuple[str, Path]]:
    """Yield the event and path of every existing file that may hold a block of ours to remove."""
    directories = dict.fromkeys((git.hooks_directory, git.target.common_dir / "hooks"))
    for event in EVENTS:
        for directory in directories:
            for suffix in ("", *_SET_ASIDE):
                path = directory / (event + suffix)
                if path.is_file() and _why_not_ours(git, path) is None:
                    yield event, path


def _write_block(path: Path, text: bytes, makes_directory: bool) -> None:
    """Put a block with this text into the hook file, in place of an older one. Raises OSError."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        path.parent.mkdir(exist_ok=True)
        marks = Marks(file=True, directory=makes_directory)
        _replace(path, insert(NEW_FILE, text, marks), mode=0o755)
        return
    rest, marks = extract(content) or (content, Marks())
    _replace(path, insert(rest, text, marks), mode=_mode(path))


def _remove_block(path: Path) -> Marks | None:
    """Take our block out of a hook file, or the file away if it is all ours. Raises OSError.

    Returns the block's marks, None if there was no block. Raises _Damaged.
    """
    content = path.read_bytes()
    if is_damaged(content):
        raise _Damaged
    found = extract(content)
    if found is None:
        return None
    rest, marks = found
    if is_ours_alone(rest, marks):
        path.unlink()
    else:
        _replace(path, rest, mode=_mode(path))
    return marks


def _replace(path: Path, content: bytes, *, mode: int) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _block_text(event: str, spec: HookSpec) -> bytes:
    return _COMMENT.encode() + os.fsencode(body(event, spec))


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _is_executable(path: Path) -> bool:
    return bool(_mode(path) & 0o111)


def _damaged(event: str, path: Path) -> HookState:
    return HookState(
        event,
        "blocked",
        path=path,
        reason=f"{path} holds only one end of our block",
        hint="delete what is left of it, from `# >>> code2lora` to `# <<< code2lora`",
    )


def _unwritable(event: str, path: Path, error: OSError) -> HookState:
    return HookState(
        event,
        "blocked",
        path=path,
        reason=f"{path} cannot be written: {error.strerror}",
        hint="make the file and its folder writable",
    )
