"""Which commits of a first-parent line advance a state, and what each of them is compared with.

A checkpoint's states are steps along such a line, and which commits are steps is part of what the
checkpoint was trained on; so streams are named, like file rules, and this is the one place that
knows what a step is.

commits     Every commit is a step, compared with its first parent.
assertions  That of the released checkpoints: a commit is a step if it adds or modifies an assertion
            in a Python test file. It is compared with the step before it, so that what the commits
            in between changed comes with it.

An anchor stands in for a step wherever it is: what follows is compared with it. The first step of
a whole history under `assertions` starts afresh, as it did in training: from its own snapshot, and
with the whole of its tree as one diff. So a history that is replayed from its beginning is walked
as the released checkpoints were trained, but for one thing: there, a commit was a step too if it
only edited a test file above an assertion, which changes none. From a later anchor, the states
differ by what they start from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from code2lora.errors import UserError
from code2lora.history.assertions import NO_FILE, AssertionFinder, is_test_path, new_in_commit
from code2lora.history.model import Commit, History
from code2lora.history.rules import FileRules

StreamName = Literal["commits", "assertions"]

TEST_RULES = FileRules(name="tests", suffixes=frozenset({".py"}), max_file_bytes=2_000_000)
"""How much is read of test files; which files those are, `assertions` knows."""


@dataclass(frozen=True, slots=True)
class Step:
    """A commit that advances the state."""

    commit: Commit
    base: str | None
    """The commit that it is compared with, and whose state is advanced. None for the first step of
    a history: it starts from its own snapshot and is compared with the empty tree."""
    is_provisional: bool = False
    """Whether the commit is no step by the stream, and its state only stands in for the next."""


class Stream(Protocol):
    """One way to choose the steps."""

    def steps(
        self, history: History, after: str | None, commits: Iterable[Commit], *, begun: bool = True
    ) -> Iterator[Step]:
        """Yield the steps among the commits that follow `after` on its line, oldest first.

        after: an anchor or a step, which the next step is compared with; None where the line begins
        begun: whether a step is known to be at or before `after`; if not, git is asked

        Raises UserError when trees are missing.
        """

    def opens(self, history: History, commit: Commit) -> bool:
        """Tell whether a commit is the first step of its history.

        Raises UserError when trees are missing.
        """


def stream_named(name: str) -> Stream:
    """Return a stream by its name. Raises UserError if there is none."""
    try:
        return STREAMS[name]
    except KeyError:
        raise UserError(
            f"there is no stream {name!r}; known are {', '.join(sorted(STREAMS))}",
            hint="the stream is named in the checkpoint's config.json",
        ) from None


class EveryCommit:
    """The stream `commits`."""

    def steps(
        self, history: History, after: str | None, commits: Iterable[Commit], *, begun: bool = True
    ) -> Iterator[Step]:
        """See `Stream`."""
        for commit in commits:
            yield Step(commit, after)
            after = commit.id

    def opens(self, history: History, commit: Commit) -> bool:
        """Return False: these checkpoints start at any snapshot, and read no tree as a diff."""
        return False


class AssertionCommits:
    """The stream `assertions`."""

    def steps(
        self, history: History, after: str | None, commits: Iterable[Commit], *, begun: bool = True
    ) -> Iterator[Step]:
        """See `Stream`."""
        finder = AssertionFinder()
        for commit in commits:
            if changes_assertions(history, commit.id, finder):
                is_first = not begun and not _may_follow_a_step(history, commit, finder)
                yield Step(commit, None if is_first else after)
                after, begun = commit.id, True

    def opens(self, history: History, commit: Commit) -> bool:
        """See `Stream`."""
        finder = AssertionFinder()
        changes = changes_assertions(history, commit.id, finder)
        return bool(changes) and not _may_follow_a_step(history, commit, finder)


STREAMS: dict[str, Stream] = {"commits": EveryCommit(), "assertions": AssertionCommits()}
"""Every stream by its name."""


def changes_assertions(history: History, commit: str, finder: AssertionFinder) -> bool | None:
    """Tell whether a commit adds or modifies an assertion, against its first parent.

    finder: remembers what it has parsed, which the next commit mostly repeats

    None if that cannot be told, because a file is missing from this clone. Raises UserError when a
    tree is missing.
    """
    changed = history.changed_files(commit, TEST_RULES, is_test_path)
    files = [
        tuple(finder.parse(side.text) if side else NO_FILE for side in (file.before, file.after))
        for file in changed.files
    ]
    if any(new_in_commit([(before, after) for before, after in files])):
        return True
    return None if any(skip.reason == "missing object" for skip in changed.skipped) else False


def _may_follow_a_step(history: History, commit: Commit, finder: AssertionFinder) -> bool:
    """Tell whether there may be a step before a commit, as far as this clone's history goes."""
    last = commit
    try:
        for last in history.first_parents(commit.id):
            if last.id != commit.id and changes_assertions(history, last.id, finder) is not False:
                return True
    except UserError:
        return True  # what is damaged and older than the anchor is not to stop the daemon
    return history.is_shallow_boundary(last.id)
