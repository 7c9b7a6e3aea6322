"""The checks of `doctor`: each turns one thing that must be right into a line with advice."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from code2lora.cli import render
from code2lora.cli.overview import hook_states
from code2lora.cli.place import Place
from code2lora.cli.processes import daemon_view
from code2lora.errors import UserError
from code2lora.settings import Settings, config_file, load_settings

Status = Literal["ok", "warn", "fail"]

_LOW_DISK_BYTES = 2e9
_NO_DISK_BYTES = 2e8
_INOTIFY = Path("/proc/sys/fs/inotify")
_FEW_WATCHES = 1024


@dataclass(frozen=True)
class Check:
    """One line of `doctor`."""

    name: str
    status: Status
    detail: str
    hint: str | None = None


def examine(path: Path) -> list[Check]:
    """Return every check of this machine and of the repository at a path."""
    checks = [Check("python", "ok", f"{platform.python_version()} at {sys.executable}"), _git()]
    try:
        settings = load_settings()
    except UserError as error:
        return [*checks, _failed("settings", error)]
    origin = config_file()
    told = str(origin) if origin.exists() else f"defaults; {origin} would be read"
    checks.append(Check("settings", "ok", told))
    checks.extend(_guarded(name, check, settings) for name, check in _MACHINE)
    checks.extend(_repository(settings, path))
    return checks


def _guarded(name: str, check: Callable[[Settings], Check], settings: Settings) -> Check:
    try:
        return check(settings)
    except UserError as error:
        return _failed(name, error)


def _failed(name: str, error: UserError) -> Check:
    return Check(name, "fail", error.message, error.hint)


def _git() -> Check:
    from code2lora.history.gitcommand import run_git

    try:
        done = run_git("version")
    except UserError as error:
        return _failed("git", error)
    return Check("git", "ok", f"{done.stdout.strip()} at {shutil.which('git')}")


def _directories(settings: Settings) -> Check:
    settings.prepare()
    places = (settings.state_dir, settings.inbox, settings.data_dir, settings.runtime_dir)
    for place in places:
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            hint = "give yourself access to it"
            return Check("directories", "fail", f"cannot write {place}: {error.strerror}", hint)
    shared = [place for place in places[:1] + places[2:] if place.stat().st_mode & 0o077]
    if shared:
        return Check(
            "directories",
            "warn",
            f"others can look into {', '.join(map(str, shared))}",
            f"`chmod 700 {' '.join(map(str, shared))}`",
        )
    return Check("directories", "ok", f"{settings.state_dir}, {settings.data_dir}")


def _database(settings: Settings) -> Check:
    from code2lora.cli.place import open_store

    with open_store(settings) as store:
        store.check()
        n = len(store.worktrees())
    return Check("database", "ok", f"whole, {render.count(n, 'worktree')} registered")


def _socket(settings: Settings) -> Check:
    length = len(os.fsencode(settings.socket))
    if length > 100:
        return Check(
            "socket",
            "fail",
            f"the path {settings.socket} has {length} bytes, a Unix socket allows about 100",
            "set CODE2LORA_RUNTIME_DIR to a shorter directory",
        )
    return Check("socket", "ok", str(settings.socket))


def _daemon(settings: Settings) -> Check:
    view = daemon_view(settings)
    if not view.running:
        hint = "`code2lora daemon start`; the next commit starts it too"
        return Check("daemon", "warn", "not running", hint)
    if not settings.socket.exists():
        return Check(
            "daemon", "fail", f"runs, but {settings.socket} is gone", "`code2lora daemon restart`"
        )
    worker = "model loaded" if view.worker else "model not loaded"
    process = f", process {view.supervisor.pid}" if view.supervisor else ""
    return Check("daemon", "ok", f"running{process}; {worker}")


def _model(settings: Settings) -> Check:
    from code2lora.cli.models import checkpoint_config, size_of
    from code2lora.hypernetwork.models import resolve_model

    paths = resolve_model(settings.model, settings.models_dir)
    checkpoint_config(paths)
    root = paths.hypernetwork.parent
    return Check("model", "ok", f"{paths.name}, {render.size(size_of(root))} at {root}")


def _disk(settings: Settings) -> Check:
    free = min(shutil.disk_usage(place).free for place in (settings.state_dir, settings.data_dir))
    detail = f"{render.size(free)} free"
    hint = "free some disk space, or lower keep_adapters in config.toml"
    if free < _NO_DISK_BYTES:
        return Check("disk", "fail", detail, hint)
    if free < _LOW_DISK_BYTES:
        return Check("disk", "warn", detail, hint)
    return Check("disk", "ok", detail)


def _watches(settings: Settings) -> Check:
    limit_file = _INOTIFY / "max_user_watches"
    try:
        limit = int(limit_file.read_text())
    except (OSError, ValueError):
        return Check("watches", "ok", "this system sets no limit on watched directories")
    if limit < _FEW_WATCHES:
        return Check(
            "watches",
            "warn",
            f"at most {render.count(limit, 'watched directory', 'watched directories')}",
            "`sudo sysctl fs.inotify.max_user_watches=65536`",
        )
    return Check("watches", "ok", f"up to {limit:,} directories, one for each worktree is used")


_MACHINE: tuple[tuple[str, Callable[[Settings], Check]], ...] = (
    ("directories", _directories),
    ("database", _database),
    ("socket", _socket),
    ("daemon", _daemon),
    ("model", _model),
    ("disk", _disk),
    ("watches", _watches),
)


def _repository(settings: Settings, path: Path) -> Iterator[Check]:
    """Yield the checks of the repository at a path, as far as they make sense."""
    from code2lora.cli.place import open_store, place_of
    from code2lora.history import open_history

    try:
        history = open_history(path)
    except UserError as error:
        yield Check("repository", "warn", error.message, error.hint)
        return
    with closing(history):
        try:
            head = history.head()
            if head.commit is not None:
                history.commit(head.commit)
            at = render.short(head.commit) if head.commit else "no commit yet"
            yield Check("repository", "ok", f"{history.worktree or history.git_dir} at {at}")
            with open_store(settings) as store:
                place = place_of(settings, store, history)
                yield Check("registered", "ok", f"as {place.repository.name}")
                yield _hooks_check(place)
        except UserError as error:
            yield _failed("repository", error)


def _hooks_check(place: Place) -> Check:
    states = hook_states(place)
    bad = [state for state in states if state.status != "installed" or state.outdated]
    if not bad:
        how = sorted({state.how or "?" for state in states})
        return Check(
            "hooks", "ok", f"{render.count(len(states), 'hook')} installed ({', '.join(how)})"
        )
    told = ", ".join(
        f"{state.event} {'outdated' if state.status == 'installed' else state.status}"
        for state in bad
    )
    hint = next((state.hint for state in bad if state.hint), f"`code2lora init {place.path}`")
    # The daemon also looks by itself, so a missing hook costs delay and nothing else.
    return Check("hooks", "warn", told, hint)
