"""One repository's history into the rows of its shard: steps, changes, snapshots, targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from code2lora.errors import UserError
from code2lora.history.assertions import (
    NO_FILE,
    Assertion,
    AssertionFinder,
    ParsedFile,
    is_test_path,
    new_in_commit,
)
from code2lora.history.model import Commit, Diff, History, SourceFile
from code2lora.history.rules import FileRules
from code2lora.history.stream import TEST_RULES, stream_named
from code2lora.training.data import leakage, shards, targets
from code2lora.training.data.mine_config import MineConfig
from code2lora.training.split import in_repo_splits


@dataclass(frozen=True, slots=True)
class Collected:
    """What is written of one repository."""

    tables: dict[str, shards.Rows]
    opens: bool
    """Whether the first step is the first of its history, with its whole tree for a diff."""


def collect(history: History, head: str, config: MineConfig) -> Collected:
    """Return the tables of a history up to `head`.

    Raises UserError when objects are missing, or when no commit is a step.
    """
    if config.stream == "assertions":
        steps = _assertion_steps(history, head, config)
    else:
        steps = _every_commit(history, head, config)
    opens = stream_named(config.stream).opens(history, steps[0].commit)
    writer = _Writer(history, steps, config, opens=opens)
    anchors = {*range(0, len(steps), config.anchor_every), len(steps) - 1}
    if config.stream == "assertions":
        anchors.add(writer.splits.count("train") - 1)  # what the paper's static head is told
    for index in range(len(steps)):
        writer.add_step(index)
        if index in anchors:
            writer.add_snapshot(index)
    return Collected(writer.finish(), opens)


_MAX_PARSED_FILES = 4096


@dataclass(frozen=True, slots=True)
class _Written:
    """What a commit newly asserts in one file."""

    file: SourceFile
    new: list[tuple[Assertion, str]]
    parsed: ParsedFile


@dataclass(frozen=True, slots=True)
class _Step:
    commit: Commit
    written: tuple[_Written, ...]


class _TestFiles:
    """Reads what commits newly assert, and takes no version of a file apart twice in a row."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._finder = AssertionFinder()
        self._parsed: dict[str, ParsedFile] = {}

    def written(self, commit: str) -> tuple[_Written, ...]:
        """Return the files in which a commit adds or modifies assertions."""
        changed = self._history.changed_files(commit, TEST_RULES, is_test_path)
        versions = [(self._parse(file.before), self._parse(file.after)) for file in changed.files]
        return tuple(
            _Written(file.after, new, after)
            for file, (_, after), new in zip(
                changed.files, versions, new_in_commit(versions), strict=True
            )
            if new and file.after is not None
        )

    def _parse(self, file: SourceFile | None) -> ParsedFile:
        if file is None or not is_test_path(file.path):
            return NO_FILE
        if file.blob not in self._parsed:
            if len(self._parsed) >= _MAX_PARSED_FILES:
                self._parsed.clear()
            self._parsed[file.blob] = self._finder.parse(file.text)
        return self._parsed[file.blob]


def _every_commit(history: History, head: str, config: MineConfig) -> list[_Step]:
    limit = config.commits or None
    commits = list(history.first_parents(head, limit=limit))[::-1]
    tests = _TestFiles(history)
    wanted = "assertion" in config.kinds
    return [
        _Step(commit, tests.written(commit.id) if wanted and index > 0 else ())
        for index, commit in enumerate(commits)
    ]


def _assertion_steps(history: History, head: str, config: MineConfig) -> list[_Step]:
    tests = _TestFiles(history)
    steps = []
    for commit in list(history.first_parents(head))[::-1]:
        written = tests.written(commit.id)
        if written:
            steps.append(_Step(commit, written))
    if not steps:
        raise UserError(
            "no commit adds or modifies an assertion of a Python test",
            hint='mine it with stream = "commits"',
        )
    return steps[-config.commits :]


class _Writer:
    """Collects the rows of one repository, every blob's text once."""

    def __init__(
        self, history: History, steps: Sequence[_Step], config: MineConfig, *, opens: bool
    ) -> None:
        self.splits = in_repo_splits(len(steps))
        self._opens = opens
        self._history = history
        self._steps = steps
        self._config = config
        self._rules = FileRules.named(config.rules)
        self._snapshot_rules = FileRules.named(config.snapshot_rules or config.rules)
        self._tables = shards.empty_tables()
        self._texts: dict[str, str] = {}
        self._names: dict[str, frozenset[str]] = {}
        self._known = targets.KnownNames()
        self._asked: set[tuple[str, str, str, str, int]] = set()

    def add_step(self, index: int) -> None:
        """Add a step's commit, its changes and, if it is its turn, its targets."""
        step = self._steps[index]
        events = Counter(event for written in step.written for _, event in written.new)
        shards.append(
            self._tables["commits"],
            index=index,
            commit=step.commit.id,
            committed_at_s=step.commit.committed_at_s,
            split=self.splits[index],
            n_added=events["added"],
            n_modified=events["modified"],
        )
        diff = self._diff(index)
        if diff is None:
            self._learn_snapshot(index)
            return
        # What the repository knew before a commit decides what its author had to know. A step over
        # several commits is told first and asked about then.
        if self._config.stream == "commits":
            self._add_assertions(index, step)
        for change in diff.changes:
            self._known.add(change.path, change.added)
            if len(change.added) + len(change.removed) > self._config.max_change_chars:
                continue
            shards.append(
                self._tables["changes"],
                index=index,
                path=change.path,
                old_path=change.old_path,
                status=change.status,
                patch=change.patch,
            )
        if self._config.stream == "assertions":
            self._add_assertions(index, step)
        is_due = index > 0 and index % self._config.target_every == 0
        if is_due and "commit" in self._config.kinds and any(c.added for c in diff.changes):
            self._add_commit_targets(index, diff)

    def add_snapshot(self, index: int) -> None:
        """Add the files at a step and the spans of them that may be asked for."""
        files = self._chosen_files(index)
        wanted = "file" in self._config.kinds
        counts = self._count_names(files) if wanted else Counter()
        limits = self._config.targets
        for file in files:
            text = self._texts.setdefault(file.blob, file.text)
            row: dict[str, Any] = {"index": index, "path": file.path, "blob": file.blob}
            shards.append(self._tables["snapshots"], **row)
            if wanted:
                blocks = targets.blocks(text, max_lines=limits.max_lines)
                names = self._names_in(file)
                spans = targets.spans_of_lines(text, blocks, counts, names, limits)
                self._add_spans("file", row, spans, limits.per_file)

    def finish(self) -> dict[str, shards.Rows]:
        """Return all tables."""
        for blob in sorted(self._texts):
            shards.append(self._tables["files"], blob=blob, text=self._texts[blob])
        leakage.mark_seen(self._tables["checks"], self._tables["targets"], self.splits)
        return self._tables

    def _diff(self, index: int) -> Diff | None:
        """Return what a step changed; None for an anchor that the steps begin with."""
        commit = self._steps[index].commit.id
        if index > 0:
            return self._history.diff_between(self._steps[index - 1].commit.id, commit, self._rules)
        return self._history.diff_between(None, commit, self._rules) if self._opens else None

    def _add_assertions(self, index: int, step: _Step) -> None:
        if "assertion" not in self._config.kinds:
            return
        limits = self._config.targets
        chosen = _chosen_assertions(step.written, limits.assertions_per_step, self._asked)
        for written, assertion, event in chosen:
            file = written.file
            text = self._texts.setdefault(file.blob, file.text)
            if text != file.text:
                continue  # other rules read its invalid bytes otherwise, so positions do not hold
            own = text[assertion.start : assertion.end]
            above = text[max(0, assertion.start - limits.prefix_chars) : assertion.start]
            self._add_target(
                kind="assertion",
                index=index,
                path=file.path,
                blob=file.blob,
                start=assertion.start,
                end=assertion.end,
                target=None if assertion.target == own else assertion.target,
                absent=self._known.n_absent(assertion.target, above, file.path),
                function=assertion.function,
                assertion_type=assertion.type,
                event=event,
                same=assertion.text,
            )

    def _add_commit_targets(self, index: int, diff: Diff) -> None:
        before, after = self._snapshot(index - 1), self._snapshot(index)
        counts = self._count_names(before)
        old_files = {file.path: file for file in before}
        new_files = {file.path: file for file in after}
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
            if spans and self._texts.setdefault(new.blob, new.text) == new.text:
                left -= self._add_spans("commit", row, spans, min(limits.per_change, left))

    def _snapshot(self, index: int) -> tuple[SourceFile, ...]:
        """Return the files at a step by the rules of the changes, which targets go by."""
        return self._history.snapshot(self._steps[index].commit.id, self._rules).files

    def _chosen_files(self, index: int) -> list[SourceFile]:
        commit = self._steps[index].commit.id
        snapshot = self._history.snapshot(commit, self._snapshot_rules)
        files = sorted(snapshot.files, key=lambda file: (file.blob, file.path))
        return sorted(files[: self._config.max_files], key=lambda file: file.path)

    def _learn_snapshot(self, index: int) -> None:
        if "assertion" in self._config.kinds:
            for file in self._snapshot(index):
                self._known.add(file.path, file.text)

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

    def _add_spans(
        self, kind: str, row: dict[str, Any], spans: Sequence[targets.Span], most: int
    ) -> int:
        chosen = targets.choose(
            spans,
            most=most,
            present_share=self._config.targets.present_share,
            key=f"{kind}:{row['blob']}",
        )
        for span in chosen:
            self._add_target(
                kind=kind,
                **row,
                start=span.start,
                end=span.end,
                target=None,
                absent=span.absent,
                function=None,
                assertion_type=None,
                event=None,
            )
        return len(chosen)

    def _add_target(self, *, same: str | None = None, **row: Any) -> None:
        shards.append(self._tables["targets"], **row)
        text = self._texts[row["blob"]]
        target = text[row["start"] : row["end"]] if row["target"] is None else row["target"]
        pair, same_digest = leakage.digests(text[: row["start"]], target, same or target)
        shards.append(self._tables["checks"], pair=pair, same=same_digest, leaked=False)


def _chosen_assertions(
    files: Sequence[_Written], most: int, asked: set[tuple[str, str, str, str, int]]
) -> list[tuple[_Written, Assertion, str]]:
    """Return what a step newly asserts and no step before it did, in the order of the files.

    asked: what was asked before, by path, identity and occurrence; an assertion that went and came
    back is not new
    most: where there are more, those whose digests come first are taken
    """
    found = []
    for written in files:
        numbers = _occurrences(written.parsed)
        for assertion, event in written.new:
            key = (written.file.path, *assertion.identity, numbers[assertion.start])
            if key not in asked:
                asked.add(key)
                found.append((written, assertion, event))
    if len(found) <= most:
        return found
    order = sorted(range(len(found)), key=lambda i: _order(found[i][0], found[i][1]))
    return [found[i] for i in sorted(order[:most])]


def _order(written: _Written, assertion: Assertion) -> bytes:
    return targets.digest(f"{written.file.blob}:{assertion.start}")


def _occurrences(parsed: ParsedFile) -> dict[int, int]:
    """Return for each assertion's start how many of the same identity stand above it."""
    seen: Counter[tuple[str, str, str]] = Counter()
    numbers = {}
    for assertion in parsed.assertions():
        numbers[assertion.start] = seen[assertion.identity]
        seen[assertion.identity] += 1
    return numbers
