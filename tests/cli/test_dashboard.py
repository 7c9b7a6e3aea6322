"""`code2lora dashboard` where there is nothing to look at; a browser test has the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Known, Run
from tests.gitrepo import GitRepo


def test_without_any_repository_it_says_what_to_do(code2lora: Run, here: Path) -> None:
    done = code2lora("dashboard", "--no-open")
    assert done.status == 1 and done.out == ""
    assert "is not registered" in done.err and "code2lora init" in done.err


def test_a_place_that_is_named_must_be_registered(
    code2lora: Run, known: Known, tmp_path: Path
) -> None:
    other = GitRepo(tmp_path / "other")
    done = code2lora("dashboard", other.path, "--no-open")
    assert done.status == 1 and f"{other.path} is not registered" in done.err


@pytest.mark.parametrize("flag", ["--json", "--no-open"])
def test_a_place_must_be_a_directory(code2lora: Run, repo: GitRepo, flag: str) -> None:
    repo.commit({"a.py": "x\n"}, "a")
    assert code2lora("dashboard", repo.path / "a.py", flag).status == 2
