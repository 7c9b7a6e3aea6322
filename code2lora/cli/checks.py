"""The checks of `doctor`: each turns one thing that must be right into a line with advice."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from code2lora import __version__
from code2lora.cli import render
from code2lora.cli.overview import hook_states
from code2lora.cli.place import has_database, not_registered
from code2lora.cli.processes import daemon_view
from code2lora.errors import UserError
from code2lora.settings import Settings, config_file, load_settings

if TYPE_CHECKING:
    from code2lora.history.model import History
    from code2lora.state_store import Store

Status = Literal["ok", "warn", "fail"]

_LOW_DISK_BYTES = 2e9
_NO_DISK_BYTES = 2e8
_INOTIFY = Path("/proc/sys/fs/inotify")
_FEW_WATCHES = 1024
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


@dataclass(frozen=True)
class Check:
    """One line of `doctor`."""

    name: str
    status: Status
    detail: str
    hint: str | None = None


def examine(path: Path) -> list[Check]:
    """Return every check of this machine and of the repository at a path."""
    about = f"{__version__}, Python {platform.python_version()}, {platform.platform()}"
    checks = [
        Check("code2lora", "ok", about),
        Check("python", "ok", f"{platform.python_version()} at {sys.executable}"),
        _git(),
    ]
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
    roots = (settings.state_dir, settings.data_dir, settings.runtime_dir)
    places = (*roots, settings.inbox, settings.log_dir, settings.adapters_dir)
    missing = [place for place in places if not os.path.exists(place)]
    if not missing:
        settings.prepare()  # makes nothing here; refuses what others could have planted
    for place in places:
        problem = _cannot_write("directories", _nearest(place))
        if problem:
            return problem
    shared = [place for place in roots if os.path.exists(place) and place.stat().st_mode & 0o077]
    if shared:
        return Check(
            "directories",
            "warn",
            f"others can look into {', '.join(map(str, shared))}",
            f"`chmod 700 {' '.join(map(str, shared))}`",
        )
    if missing:
        return Check("directories", "ok", f"would be made: {', '.join(map(str, missing))}")
    return Check("directories", "ok", f"{settings.state_dir}, {settings.data_dir}")


def _cannot_write(name: str, folder: Path) -> Check | None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        hint = "give yourself access to it"
        return Check(name, "fail", f"cannot write {folder}: {error.strerror}", hint)


def _nearest(place: Path) -> Path:
    """Return a place, or what is there of the folders that it would be made in."""
    return next(found for found in (place, *place.parents) if os.path.exists(found))


def _database(settings: Settings) -> Check:
    if not has_database(settings):
        return Check("database", "ok", f"would be made at {settings.state_dir / 'state.db'}")
    with _as_it_is(settings) as store:
        store.check()
        n = len(store.worktrees())
    return Check("database", "ok", f"whole, {render.count(n, 'worktree')} registered")


def _as_it_is(settings: Settings) -> Store:
    """Open the store without making or upgrading anything."""
    from code2lora.state_store import Store

    return Store.open(settings.resolved_database_url, migrate=False)


def _device(settings: Settings) -> Check:
    # Whether the device is there only torch can tell, and importing it takes seconds.
    if _DEVICE.fullmatch(settings.device):
        return Check("device", "ok", settings.device)
    return Check(
        "device",
        "fail",
        f"the device is {settings.device!r}, expected auto, cpu, mps, cuda or cuda:N",
        f"mend the variable CODE2LORA_DEVICE, or device in {config_file()}",
    )


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
    places = (settings.state_dir, settings.data_dir)
    free = min(shutil.disk_usage(_nearest(place)).free for place in places)
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
    ("device", _device),
    ("model", _model),
    ("disk", _disk),
    ("watches", _watches),
)


def _repository(settings: Settings, path: Path) -> Iterator[Check]:
    """Yield the checks of the repository at a path, as far as they make sense."""
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
            if not has_database(settings):
                raise not_registered(history)
            with _as_it_is(settings) as store:
                yield from _registered(settings, store, history)
        except UserError as error:
            yield _failed("repository", error)


def _registered(settings: Settings, store: Store, history: History) -> Iterator[Check]:
    from code2lora.daemon.looking import registered

    repository = registered(store, history)
    if repository is None:
        raise not_registered(history)
    yield Check("registered", "ok", f"as {repository.name}")
    yield _hooks_check(settings, history)
    folder = settings.adapters_dir / repository.id
    problem = _cannot_write("adapters", folder) if folder.exists() else None
    if problem:
        yield problem
    for failure in store.failures(repository.id, limit=1):
        detail = f"{render.age(failure.at)}: {render.line(failure.message)}"
        yield Check("last failure", "warn", detail, failure.hint)


def _hooks_check(settings: Settings, history: History) -> Check:
    states = hook_states(settings, history)
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
    at = history.worktree or history.git_dir
    hint = next((state.hint for state in bad if state.hint), f"`code2lora init {at}`")
    # The daemon also looks by itself, so a missing hook costs delay and nothing else.
    return Check("hooks", "warn", told, hint)
