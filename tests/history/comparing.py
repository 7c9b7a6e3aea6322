"""What git itself prints for a commit, to hold our diffs against."""

from __future__ import annotations

import re

from code2lora.history.model import Diff
from code2lora.history.rules import FileRules
from tests.gitrepo import GitRepo

EVERYTHING = FileRules(
    name="everything", suffixes=frozenset({"", ".py", ".txt", ".md", ".c", ".bin"})
)
"""Reads any text file that the tests here make."""


def git_patches(repo: GitRepo, commit: str) -> list[str]:
    """Return the patch of each file against the first parent, in git's order."""
    parents = repo.git("rev-list", "--parents", "-1", commit).split()[1:]
    return git_patches_between(repo, parents[0] if parents else None, commit)


def git_patches_between(repo: GitRepo, base: str | None, commit: str) -> list[str]:
    """Return the patch of each file against another commit, or the empty tree."""
    empty = repo.git("hash-object", "-t", "tree", "/dev/null")
    done = repo.run(
        *("-c", "core.quotePath=false", "diff-tree", "-p", "-r", "--find-renames=50%"),
        *("--abbrev=7", "--no-color", "--no-ext-diff", "--no-textconv", "--text"),
        *(base or empty, commit),
    )
    text = done.stdout.decode("utf-8", "replace")
    return re.split(r"(?m)^(?=diff --git )", text)[1:]


def patches(diff: Diff) -> list[str]:
    """Return the patch of each file of ours."""
    return [change.patch for change in diff.changes]
