"""Clone public repositories, each at the commit that a list pins it to.

Reads   a list of `owner/name COMMIT`; a server, through the git command, over https or file only.
Writes  <out>/<owner+name>.git/, bare, HEAD detached at the commit, and <out>/list.txt, which
        `train mine --list` takes.

A commit is asked for by its own id and comes with its whole history and nothing else, so a list
gives the same histories whatever has been pushed since. Nothing of a repository is run: without a
working tree there are neither filters nor submodules, and the clones have no hooks. A clone is made
under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from code2lora.errors import UserError
from code2lora.history.gitcommand import (
    first_complaint,
    git_arguments,
    git_environment,
    git_not_installed,
    resolve_revision,
)
from code2lora.training.data.shards import folder_name

LIST = "list.txt"
"""What is in the folder of clones, as `train mine --list` takes it."""

_BUNDLED = resources.files("code2lora.training") / "recipes" / "repositories.txt"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PROTOCOLS = ("https", "file")
_POLL_S = 0.1

_ENVIRONMENT = {
    "GIT_ALLOW_PROTOCOL": ":".join(_PROTOCOLS),
    "GIT_ASKPASS": "",  # nor any other program that would ask for a password
}
_SETTINGS = (
    *("-c", "credential.helper="),
    *("-c", f"core.hooksPath={os.devnull}"),
    *("-c", "protocol.version=2"),  # under which a server gives any commit that it has
    *("-c", "gc.auto=0", "-c", "maintenance.auto=false"),
    *("-c", "http.lowSpeedLimit=1", "-c", "http.lowSpeedTime=120"),  # a dead connection ends
)


@dataclass(frozen=True, slots=True)
class Pin:
    """A public repository at one commit."""

    name: str
    """`owner/name`"""
    commit: str


@dataclass(frozen=True, slots=True)
class Cloned:
    """What became of one repository."""

    name: str
    status: str
    """`cloned`, `moved` (it was there at another commit), `kept` or `failed`."""
    reason: str = ""
    """Why it failed."""


class _Stopped(Exception):
    """A process was ended because somebody asked to stop."""


def read_pins(path: Path | None = None) -> list[Pin]:
    """Return the repositories that a file lists, or those of the bundled recipes.

    Raises UserError that names the line which is not `owner/name COMMIT`, or a name that is twice
    there.
    """
    source = _BUNDLED if path is None else path
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source} cannot be read: {error}") from error
    pins = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if words:
            pins.append(_pin(words, f"{source}, line {number}"))
    times = Counter(folder_name(pin.name) for pin in pins)
    if times and max(times.values()) > 1:
        name = times.most_common(1)[0][0].replace("+", "/")
        raise UserError(f"{source} lists {name} more than once", hint="leave one of the lines")
    return pins


def _pin(words: list[str], where: str) -> Pin:
    if len(words) != 2:
        raise UserError(f"{where}: expected `owner/name COMMIT`, found {' '.join(words)!r}")
    name, commit = words
    if not _NAME.fullmatch(name) or ".." in name:
        raise UserError(f"{where}: {name!r} is no owner/name")
    if not _COMMIT.fullmatch(commit):
        raise UserError(f"{where}: {commit!r} is no full commit id", hint="`git rev-parse HEAD`")
    return Pin(name, commit)


def clone(
    pins: Sequence[Pin],
    out_dir: Path,
    *,
    source: str,
    workers: int = 1,
    progress: Callable[[Cloned, int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[Cloned]:
    """Clone what is missing and return what became of each, in the order of completion.

    source: the URL that names are appended to
    workers: repositories at a time
    progress: called with (result, number done, number of all) after each repository
    stop: when it answers true, what is being fetched is given up and no further one is begun
    A repository that cannot be had is reported as failed and the others go on.

    Raises UserError when the source is not of an allowed protocol.
    """
    if not source.startswith(tuple(f"{protocol}://" for protocol in _PROTOCOLS)):
        raise UserError(f"cannot clone from {source!r}: expected https:// or file://")
    out_dir.mkdir(parents=True, exist_ok=True)
    stopped = stop or (lambda: False)
    results: list[Cloned] = []
    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(_clone_one, pin, out_dir, source, stopped) for pin in pins]
        for future in as_completed(waiting):
            result = future.result()
            if result is None:
                continue
            results.append(result)
            if progress is not None:
                progress(result, len(results), len(pins))
    _write_list(out_dir, pins, {each.name for each in results if each.status != "failed"})
    return results


def _clone_one(pin: Pin, out_dir: Path, source: str, stop: Callable[[], bool]) -> Cloned | None:
    """Return what became of one repository; None when it was given up."""
    place, url = out_dir / _folder(pin), f"{source.rstrip('/')}/{pin.name}"
    try:
        if stop():
            return None
        if not place.exists():
            _fetch_whole(place, url, pin.commit, stop)
            return Cloned(pin.name, "cloned")
        if resolve_revision(place, "HEAD") == pin.commit:
            return Cloned(pin.name, "kept")
        _fetch(place, url, pin.commit, stop)
        return Cloned(pin.name, "moved")
    except _Stopped:
        return None
    except UserError as error:
        return Cloned(pin.name, "failed", error.message)
    except OSError as error:
        return Cloned(pin.name, "failed", str(error))


def _fetch_whole(place: Path, url: str, commit: str, stop: Callable[[], bool]) -> None:
    """Make a repository that holds a commit's history, or none."""
    temporary = place.with_name(f".tmp-{place.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # what a kill has left
    try:
        shape = ("--bare", "--template=", "--object-format=sha1")
        _git(temporary, "init", "--quiet", *shape, stop=stop)
        _fetch(temporary, url, commit, stop)
        os.replace(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fetch(git_dir: Path, url: str, commit: str, stop: Callable[[], bool]) -> None:
    """Bring a commit's history into a repository, and then move its HEAD there."""
    alone = ("--quiet", "--no-tags", "--no-recurse-submodules")
    _git(git_dir, "fetch", *alone, "--", url, commit, stop=stop)
    _git(git_dir, "update-ref", "--no-deref", "HEAD", commit, stop=stop)


def _git(git_dir: Path, *arguments: str, stop: Callable[[], bool]) -> None:
    """Run git to its end, or until somebody asks to stop.

    It has a process group of its own, so that ^C comes to us alone, and all of it can be ended.
    Raises UserError with what git says, and _Stopped.
    """
    try:
        child = subprocess.Popen(
            git_arguments([*_SETTINGS, *arguments], git_dir=git_dir),
            env=git_environment() | _ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            process_group=0,
        )
    except FileNotFoundError as error:
        raise git_not_installed() from error
    with child:
        while True:
            try:
                _, said = child.communicate(timeout=_POLL_S)
                break
            except subprocess.TimeoutExpired:
                if stop():
                    with suppress(ProcessLookupError, PermissionError):  # it has just ended
                        os.killpg(child.pid, signal.SIGTERM)
    # A ^C between its fork and its own group ends it before we are told to stop.
    if child.returncode == -signal.SIGINT or (child.returncode and stop()):
        raise _Stopped
    if child.returncode:
        raise UserError(first_complaint(said) or f"git ended with status {child.returncode}")


def _folder(pin: Pin) -> str:
    return f"{folder_name(pin.name)}.git"


def _write_list(out_dir: Path, pins: Sequence[Pin], there: set[str]) -> None:
    lines = [f"{pin.name}={_folder(pin)}\n" for pin in pins if pin.name in there]
    temporary = out_dir / f".tmp-{LIST}"
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, out_dir / LIST)
