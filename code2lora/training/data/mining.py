"""Turn local git repositories into shards: histories, snapshots and targets to write.

Reads   git object databases, through `history` (never a working tree, never the network).
Writes  one folder for each repository below the output folder (`shards`), and beside them what no
        evaluation may ask (`leakage`).

A repository that is finished for the same head and settings is skipped, so a run that was cut off
goes on where it stopped. The same repository and settings give the same bytes, in any order and on
any number of processes.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from code2lora.errors import UserError
from code2lora.history.open import open_history
from code2lora.training.data import shards
from code2lora.training.data.leakage import write_leaks
from code2lora.training.data.mine_config import MineConfig
from code2lora.training.data.tables import collect

__all__ = ["MineConfig", "Mined", "Repository", "mine", "mine_one"]


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository to mine."""

    name: str
    """`owner/name`; it decides the repository's bucket."""
    git_dir: Path


@dataclass(frozen=True, slots=True)
class Mined:
    """What became of one repository."""

    name: str
    status: str
    """`mined`, `kept` (it was finished before) or `failed`."""
    rows: dict[str, int]
    """Rows of each table; empty for a failure."""
    reason: str = ""
    """Why it failed."""


def mine(
    repositories: Sequence[Repository],
    out_dir: Path,
    config: MineConfig,
    *,
    workers: int = 1,
    progress: Callable[[Mined, int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[Mined]:
    """Mine every repository and return what became of each, in the order of completion.

    workers: processes; each takes one repository at a time
    progress: called with (result, number done, number of all) after each repository
    stop: asked after each repository; when it answers true, no further one is begun
    A repository that cannot be read is reported as failed and the others go on.

    Raises UserError when two repositories have the same name, because they share a folder.
    """
    times = Counter(shards.folder_name(repository.name) for repository in repositories)
    if times and max(times.values()) > 1:
        raise UserError(
            f"two repositories are called {times.most_common(1)[0][0].replace('+', '/')}",
            hint="say whose each one is: owner/name=PATH",
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    results: list[Mined] = []
    outcomes = (
        _in_pool(repositories, out_dir, config, workers)
        if workers > 1
        else (mine_one(repository, out_dir, config) for repository in repositories)
    )
    with closing(outcomes):
        for result in outcomes:
            results.append(result)
            if progress is not None:
                progress(result, len(results), len(repositories))
            if stop is not None and stop():
                break
    if any(result.status != "failed" for result in results):
        write_leaks(out_dir)
    return results


def mine_one(repository: Repository, out_dir: Path, config: MineConfig) -> Mined:
    """Mine one repository into its shard, or find that its shard is up to date."""
    settings = json.loads(json.dumps(asdict(config)))
    try:
        history = open_history(repository.git_dir)
        try:
            head = history.resolve("HEAD")
            found = shards.read_shard(out_dir / shards.folder_name(repository.name))
            if found and found.manifest["head"] == head and found.manifest["settings"] == settings:
                return Mined(repository.name, "kept", dict(found.manifest["rows"]))
            collected = collect(history, head, config)
        finally:
            history.close()
    except UserError as error:
        return Mined(repository.name, "failed", {}, error.message)
    manifest = {"head": head, "settings": settings, "opens": collected.opens}
    path = shards.write_shard(out_dir, repository.name, collected.tables, manifest)
    written = shards.read_shard(path)
    if written is None:
        raise AssertionError(f"{path} was written and cannot be read")
    return Mined(repository.name, "mined", dict(written.manifest["rows"]))


def _in_pool(
    repositories: Sequence[Repository], out_dir: Path, config: MineConfig, workers: int
) -> Generator[Mined]:
    # Processes are spawned, because a forked copy of a threaded process may hang.
    context = multiprocessing.get_context("spawn")
    # ^C is for the parent, which asks `stop`; a worker finishes the repository it has begun.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(workers, context, signal.signal, ignore) as pool:
        waiting: list[Future[Mined]] = [
            pool.submit(mine_one, repository, out_dir, config) for repository in repositories
        ]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            for future in waiting:
                future.cancel()
