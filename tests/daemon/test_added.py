"""What a commit added, from real commits: which stretches, where they stand, what is left out."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from code2lora.daemon.added import MAX_ROWS, AddedRow, added_rows, rows_digest
from code2lora.errors import UserError
from code2lora.history import open_history
from code2lora.history.rules import FileRules
from tests.gitrepo import GitRepo

RULES = FileRules.named("source")

FIRST = "import os\n\n\ndef first(path):\n    return os.path.join(path, 'first')\n"
MORE = "\n\ndef second(path):\n    return os.path.join(path, 'second')\n"


def rows_of(repo: GitRepo, commit: str) -> list[AddedRow]:
    with closing(open_history(repo.path)) as history:
        return added_rows(history, commit, RULES)


def test_a_stretch_stands_below_what_the_file_has_above_it(repo: GitRepo) -> None:
    repo.commit({"a.py": FIRST + "\n\nx = 1\n"})
    commit = repo.commit({"a.py": FIRST + MORE + "\n\nx = 1\n"})

    [row] = rows_of(repo, commit)

    # git may begin the run at any of the blank lines around it
    whole = FIRST + MORE + "\n\nx = 1\n"
    assert row.path == "a.py" and "def second" in row.text and "first" not in row.text
    assert row.above + row.text == whole[: len(row.above) + len(row.text)]
    assert row.line == row.above.count("\n")


def test_a_rename_with_an_edit_asks_for_the_edit_alone(repo: GitRepo) -> None:
    body = "".join(f"def function_{i}(x):\n    return x * {i}\n\n\n" for i in range(20))
    repo.commit({"old.py": body})
    commit = repo.commit({"old.py": None, "new.py": body + MORE})

    [row] = rows_of(repo, commit)

    assert (row.path, row.text.strip()) == ("new.py", MORE.strip())
    assert row.above.endswith("return x * 19\n\n\n")


def test_a_new_file_has_nothing_above_and_no_newline_at_its_end(repo: GitRepo) -> None:
    repo.commit({"a.py": FIRST})
    commit = repo.commit({"b.py": FIRST.rstrip("\n")})

    [row] = rows_of(repo, commit)

    assert (row.above, row.text) == ("", FIRST)


def test_what_does_not_count_or_says_little_is_not_asked(repo: GitRepo) -> None:
    repo.commit({"a.py": FIRST})
    commit = repo.commit(
        {
            "a.py": FIRST + "x = 1\n",
            "package-lock.json": '{"a long enough line": "for a stretch"}\n' * 3,
            "vendor/b.py": FIRST,
            "image.png": b"\x89PNG\0" * 40,
        }
    )
    assert rows_of(repo, commit) == []
    gone = repo.commit({"a.py": None})
    assert rows_of(repo, gone) == []


def test_a_large_commit_is_asked_in_part_and_always_the_same_part(repo: GitRepo) -> None:
    repo.commit({"a.py": FIRST})
    lines = "".join(f"value_{i} = compute_the_value_of({i})\n" for i in range(1000))
    commit = repo.commit({"b.py": lines, "c.py": lines + FIRST})

    rows = rows_of(repo, commit)

    assert len(rows) == MAX_ROWS and len({row.path for row in rows}) == 2
    assert rows == rows_of(repo, commit)
    for row in rows:
        assert row.text.count("\n") == 24
        whole = lines if row.path == "b.py" else lines + FIRST
        start = whole.index(row.text)
        assert whole[:start].endswith(row.above) and len(row.above) <= 2400


def test_line_ends_and_invalid_bytes_are_what_the_file_has(repo: GitRepo) -> None:
    repo.commit({"a.py": "x = 1\r\n"})
    added = b"name_of_it = '\xff\xfe'\r\nanother_name = 'of it'\r\n"
    commit = repo.commit({"a.py": b"x = 1\r\n" + added})

    [row] = rows_of(repo, commit)

    assert row.above == "x = 1\r\n"
    assert row.text == added.decode("utf-8", "replace")


def test_a_lost_blob_is_said(repo: GitRepo) -> None:
    repo.commit({"a.py": FIRST})
    commit = repo.commit({"a.py": FIRST + MORE})
    tree = repo.git("rev-parse", f"{commit}^{{tree}}")
    (repo.path / ".git" / "objects" / tree[:2] / tree[2:]).unlink()

    with pytest.raises(UserError):
        rows_of(repo, commit)


def test_a_rebased_patch_is_known_by_its_lines(repo: GitRepo, tmp_path: Path) -> None:
    repo.commit({"a.py": FIRST})
    one = rows_of(repo, repo.commit({"a.py": FIRST + MORE}))
    repo.reset("HEAD~1")
    repo.commit({"a.py": '"""A heading."""\n\n' + FIRST})
    two = rows_of(repo, repo.commit({"a.py": '"""A heading."""\n\n' + FIRST + MORE}))

    assert one != two
    assert rows_digest(one) == rows_digest(two) != rows_digest(one[:0])
