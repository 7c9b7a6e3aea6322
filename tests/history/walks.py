"""Histories with Python tests in them, and their steps as a walk over whole trees finds them."""

from __future__ import annotations

import random
from collections import Counter

from code2lora.history.assertions import find_assertions, is_test_path
from tests.gitrepo import GitRepo


def make_test(*values: int, name: str = "adds", head: str = "") -> str:
    """Return a test file with one assertion for each value."""
    body = "".join(f"    assert total({value}) == {value + 1}\n" for value in values)
    return f"{head}def test_{name}():\n{body or '    pass'}\n"


def play(repo: GitRepo, draw: random.Random, n_commits: int) -> None:
    """Make commits that write, move, rename and delete tests and other files, and merges."""
    repo.commit({"start.py": "x = 1\n"})
    names = ["tests/test_a.py", "tests/deep/test_b.py", "lib/a.py", "lib/testing.py", "dist/t.py"]
    for serial in range(n_commits):
        name = draw.choice(names)
        path = repo.path / name
        action = draw.choice(["write", "write", "write", "delete", "move", "rename", "merge"])
        if action == "merge":
            repo.switch(f"side-{serial}", create=True)
            repo.commit({name: make_test(*draw.choices(range(9), k=3))}, allow_empty=True)
            repo.switch("main")
            repo.merge(f"side-{serial}")
        elif action == "write" or not path.exists():
            values = draw.choices(range(9), k=draw.randrange(4))
            head = draw.choice(["", "import os\n\n\n"])
            repo.commit({name: make_test(*values, head=head)}, allow_empty=True)
        elif action == "delete":
            repo.commit({name: None})
        else:
            other = draw.choice([n for n in names if n != name])
            text = path.read_text() + ("# moved\n" if action == "move" else "")
            repo.commit({name: None, other: text})


def brute_force(repo: GitRepo, head: str) -> list[tuple[str, str | None]]:
    """Return the steps up to `head`, (commit, base), from the whole tree of every commit."""
    commits = repo.git("rev-list", "--first-parent", "--reverse", head).split()
    blobs = {commit: _test_blobs(repo, commit) for commit in commits}
    texts = {blob: _texts(repo, blob) for blob in {b for found in blobs.values() for b in found}}
    steps: list[tuple[str, str | None]] = []
    before: Counter[str] = Counter()
    for commit in commits:
        after = sum((texts[blob] for blob in blobs[commit]), Counter[str]())
        if after - before:
            steps.append((commit, steps[-1][0] if steps else None))
        before = after
    return steps


def _test_blobs(repo: GitRepo, commit: str) -> list[str]:
    """Return the blobs of all test files at a commit."""
    listed = repo.git("ls-tree", "-r", "-z", commit).split("\0")[:-1]
    entries = (line.split("\t", 1) for line in listed)
    return [meta.split()[2] for meta, name in entries if is_test_path(name)]


def _texts(repo: GitRepo, blob: str) -> Counter[str]:
    """Return every assertion of a blob."""
    return Counter(found.text for found in find_assertions(repo.git("cat-file", "blob", blob)))
