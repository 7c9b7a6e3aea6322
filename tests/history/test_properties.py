"""Random histories: both backends agree, and git can apply what we print."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from code2lora.history.open import open_history
from code2lora.history.rules import FileRules
from tests.gitrepo import GitRepo
from tests.history.comparing import EVERYTHING, patches

NAMES = st.sampled_from(["a.py", "b.txt", "d/a.py", "d/e/c.md", "f g.py", "é.py", "d/LICENSE"])
LINE = st.sampled_from(["", "x", "def f():", "  y = 1", "\tz", "-- a", "++ b", "\\ no", "é\r"])
TEXT = st.builds(
    lambda lines, end: "\n".join(lines) + end,
    st.lists(LINE, max_size=25),
    st.sampled_from(["", "\n", "\n\n"]),
)
STEP = st.one_of(
    st.dictionaries(NAMES, TEXT, min_size=1, max_size=3),
    st.tuples(st.just("move"), NAMES, NAMES),
    st.tuples(st.just("delete"), NAMES),
    st.tuples(st.just("mode"), NAMES),
)


def play(repo: GitRepo, steps: list[object]) -> list[str]:
    """Commit each step that can be done and return the commits."""
    commits = [repo.commit({"base.txt": "base\n"})]
    for step in steps:
        if isinstance(step, dict):
            files = step
        else:
            kind, name, *rest = step  # type: ignore[misc]
            path: Path = repo.path / name
            if not path.is_file():
                continue
            if kind == "mode":
                path.chmod(0o644 if path.stat().st_mode & 0o100 else 0o755)
                files = {}
            else:
                files = {name: None}
                if kind == "move" and rest[0] != name:
                    files[rest[0]] = path.read_bytes() + b"moved\n"
        commits.append(repo.commit(files, allow_empty=True))
    return commits


@settings(max_examples=15, deadline=None)
@given(steps=st.lists(STEP, min_size=1, max_size=6))
def test_backends_agree_and_git_applies_our_patches(
    tmp_path_factory: pytest.TempPathFactory, steps: list[object]
) -> None:
    repo = GitRepo(tmp_path_factory.mktemp("random"))
    commits = play(repo, steps)
    fast, slow = (open_history(repo.path, backend=name) for name in ("pygit2", "git"))
    assert list(fast.first_parents(commits[-1])) == list(slow.first_parents(commits[-1]))
    for commit in commits:
        for rules in (EVERYTHING, FileRules.named("source"), FileRules.named("paper")):
            assert fast.diff(commit, rules) == slow.diff(commit, rules)
        assert fast.snapshot(commit, EVERYTHING) == slow.snapshot(commit, EVERYTHING)
        check_applies(repo, commit, patches(fast.diff(commit, EVERYTHING)))
    fast.close()
    slow.close()


def check_applies(repo: GitRepo, commit: str, texts: list[str]) -> None:
    """Apply the patches to the parent's tree and expect the commit's."""
    known = repo.run("rev-parse", "--verify", "--quiet", f"{commit}^", check=False)
    parent = known.stdout.decode().strip()
    repo.git("read-tree", parent or "--empty")
    if texts:
        repo.git("apply", "--cached", "--whitespace=nowarn", "-", data="".join(texts).encode())
    assert repo.git("write-tree") == repo.git("rev-parse", f"{commit}^{{tree}}")
