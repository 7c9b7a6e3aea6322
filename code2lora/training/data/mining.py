"""Turn local git repositories into shards: histories, snapshots and completion targets.

Reads   git object databases, through `history` (never a working tree, never the network).
Writes  one folder for each repository below the output folder (`shards`).

A repository that is finished for the same head and settings is skipped, so a run that was cut off
goes on where it stopped. The same repository and settings give the same bytes, in any order and on
any number of processes.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from code2lora.errors import UserError
from code2lora.history.model import Commit, Diff, History, SourceFile
from code2lora.history.open import open_history
from code2lora.history.rules import FileRules
from code2lora.training.data import shards, targets
from code2lora.training.data.targets import TargetConfig


@dataclass(frozen=True, kw_only=True)
class MineConfig:
    """How much of a history is mined."""

    commits: int = 384
    """Newest first-parent commits of a repository."""
    anchor_every: int = 64
    """Commits between two snapshots; the newest commit always has one."""
    target_every: int = 3
    """Every so many commits one gives completion targets."""
    max_files: int = 600
    """Files of a snapshot, the first in the order of their blob ids where there are more."""
    max_change_chars: int = 200_000
    """Added and removed text of one file in one commit; a longer one is left out of the commit."""
    rules: str = "source"
    """Which files count; the rules' name in `history.rules`."""
    targets: TargetConfig = field(default_factory=TargetConfig)


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
    """
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
    return results


def mine_one(repository: Repository, out_dir: Path, config: MineConfig) -> Mined:
    """Mine one repository into its shard, or find that its shard is up to date."""
    settings = asdict(config)
    try:
        history = open_history(repository.git_dir)
        try:
            head = history.resolve("HEAD")
            found = shards.read_shard(out_dir / shards.folder_name(repository.name))
            if found and found.manifest["head"] == head and found.manifest["settings"] == settings:
                return Mined(repository.name, "kept", dict(found.manifest["rows"]))
            tables = _tables(history, head, config)
        finally:
            history.close()
    except UserError as error:
        return Mined(repository.name, "failed", {}, error.message)
    path = shards.write_shard(
        out_dir, repository.name, tables, {"head": head, "settings": settings}
    )
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


def _tables(history: History, head: str, config: MineConfig) -> dict[str, shards.Rows]:
    commits = list(history.first_parents(head, limit=config.commits))[::-1]
    writer = _Writer(history, commits, config, FileRules.named(config.rules))
    newest = len(commits) - 1
    for index, commit in enumerate(commits):
        if index > 0:
            writer.add_commit(index, commit)
        if index % config.anchor_every == 0 or index == newest:
            writer.add_snapshot(index)
    return writer.finish()


class _Writer:
    """Collects the rows of one repository, every blob's text once."""

    def __init__(
        self, history: History, commits: Sequence[Commit], config: MineConfig, rules: FileRules
    ) -> None:
        self._history = history
        self._commits = commits
        self._config = config
        self._rules = rules
        self._tables = shards.empty_tables()
        self._texts: dict[str, str] = {}
        self._names: dict[str, frozenset[str]] = {}

    def add_commit(self, index: int, commit: Commit) -> None:
        """Add a commit's changes and, if it is its turn, its completion targets."""
        diff = self._history.diff(commit.id, self._rules)
        for change in diff.changes:
            if len(change.added) + len(change.removed) > self._config.max_change_chars:
                continue
            shards.append(
                self._tables["changes"],
                index=index,
                path=change.path,
                old_path=change.old_path,
                status=change.status,
                added=change.added,
                removed=change.removed,
            )
        if index % self._config.target_every == 0 and any(c.added for c in diff.changes):
            self._add_commit_targets(index, diff)

    def add_snapshot(self, index: int) -> None:
        """Add the files at a commit and the spans of them that may be asked for."""
        snapshot = self._history.snapshot(self._commits[index].id, self._rules)
        files = sorted(snapshot.files, key=lambda file: (file.blob, file.path))
        files = sorted(files[: self._config.max_files], key=lambda file: file.path)
        counts = self._count_names(files)
        limits = self._config.targets
        for file in files:
            self._texts[file.blob] = file.text
            row: dict[str, Any] = {"index": index, "path": file.path, "blob": file.blob}
            shards.append(self._tables["snapshots"], **row)
            spans = targets.spans_of_lines(
                file.text,
                targets.blocks(file.text, max_lines=limits.max_lines),
                counts,
                self._names_in(file),
                limits,
            )
            self._add_targets("file", row, spans, limits.per_file)

    def finish(self) -> dict[str, shards.Rows]:
        """Return all tables."""
        for index, commit in enumerate(self._commits):
            shards.append(
                self._tables["commits"],
                index=index,
                commit=commit.id,
                committed_at_s=commit.committed_at_s,
            )
        for blob in sorted(self._texts):
            shards.append(self._tables["files"], blob=blob, text=self._texts[blob])
        return self._tables

    def _add_commit_targets(self, index: int, diff: Diff) -> None:
        # What the repository knew before the commit decides what its author had to know.
        before = self._history.snapshot(self._commits[index - 1].id, self._rules)
        after = self._history.snapshot(diff.commit, self._rules)
        counts = self._count_names(before.files)
        old_files = {file.path: file for file in before.files}
        new_files = {file.path: file for file in after.files}
        limits = self._config.targets
        left = limits.per_commit
        for change in diff.changes:
            new = new_files.get(change.path)
            if new is None or not change.added or left <= 0:
                continue
            old = old_files.get(change.old_path or change.path)
            spans = targets.spans_of_lines(
                new.text,
                targets.added_runs(change.patch),
                counts,
                self._names_in(old) if old else frozenset(),
                limits,
            )
            row = {"index": index, "path": new.path, "blob": new.blob}
            if spans:
                self._texts[new.blob] = new.text
                left -= self._add_targets("commit", row, spans, min(limits.per_change, left))

    def _names_in(self, file: SourceFile) -> frozenset[str]:
        names = self._names.get(file.blob)
        if names is None:
            names = self._names[file.blob] = frozenset(targets.identifiers(file.text))
        return names

    def _count_names(self, files: Iterable[SourceFile]) -> Counter[str]:
        counts: Counter[str] = Counter()
        for file in files:
            counts.update(self._names_in(file))
        return counts

    def _add_targets(
        self, kind: str, row: dict[str, Any], spans: Sequence[targets.Span], most: int
    ) -> int:
        chosen = targets.choose(
            spans,
            most=most,
            present_share=self._config.targets.present_share,
            key=f"{kind}:{row['blob']}",
        )
        for span in chosen:
            shards.append(
                self._tables["targets"],
                kind=kind,
                **row,
                start=span.start,
                end=span.end,
                absent=span.absent,
            )
        return len(chosen)
