"""What is asked for: FILE:LINE, standard input, or a prompt."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from code2lora.cli.cursor import MAX_CHARACTERS, Cursor, read_cursor
from code2lora.errors import UserError

TEXT = "def f():\r\n    pass\n\nlast"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a:b.py"
    path.write_bytes(TEXT.encode())
    return path


@pytest.mark.parametrize(
    ("place", "before"),
    [
        ("1", "def f():"),
        ("1:1", ""),
        ("1:9", "def f():"),
        ("2", "def f():\r\n    pass"),
        ("2:5", "def f():\r\n    "),
        ("3", "def f():\r\n    pass\n"),
        ("4", TEXT),
        ("4:5", TEXT),
    ],
)
def test_a_place_in_a_file(file: Path, place: str, before: str) -> None:
    found = read_cursor(f"{file}:{place}", None, None)
    assert found == Cursor(before, TEXT[len(before) :], file)


@pytest.mark.parametrize(
    ("place", "message", "hint"),
    [
        ("0", "{file} has 4 lines, not a line 0", "lines 1 to 4"),
        ("5", "{file} has 4 lines, not a line 5", "lines 1 to 4"),
        ("1:0", "line 1 of {file} has 8 characters, not a column 0", "columns 1 to 9"),
        ("1:10", "line 1 of {file} has 8 characters, not a column 10", "columns 1 to 9"),
        ("3:2", "line 3 of {file} has 0 characters, not a column 2", "column 1"),
    ],
)
def test_a_place_that_is_not_there(file: Path, place: str, message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        read_cursor(f"{file}:{place}", None, None)
    assert (caught.value.message, caught.value.hint) == (message.format(file=file), hint)


def test_a_form_feed_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text("a\x0c\u2028b\nc\n")
    assert read_cursor(f"{tmp_path / 'old.py'}:1", None, None).prompt == "a\x0c\u2028b"


def test_an_empty_file_has_a_first_line(tmp_path: Path) -> None:
    (tmp_path / "empty.py").touch()
    found = read_cursor(f"{tmp_path / 'empty.py'}:1", None, None)
    assert (found.prompt, found.suffix) == ("", "")
    with pytest.raises(UserError) as caught:
        read_cursor(f"{tmp_path / 'empty.py'}:2", None, None)
    told = f"{tmp_path / 'empty.py'} is empty, not a line 2"
    assert (caught.value.message, caught.value.hint) == (told, "line 1 is all it has")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_cursor(f"{tmp_path}/none.py:3", None, None)
    assert caught.value.message == f"cannot read {tmp_path}/none.py: No such file or directory"
    assert caught.value.hint is not None


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes(b"a = '\xe9'\nb")
    found = read_cursor(f"{tmp_path / 'latin.py'}:1", None, None)
    assert (found.prompt, found.suffix) == ("a = '\ufffd'", "\nb")


def test_only_what_is_near_is_kept(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("a" * MAX_CHARACTERS + "b\n" + "c" * MAX_CHARACTERS + "d")
    found = read_cursor(f"{tmp_path / 'long.py'}:1", None, None)
    assert (len(found.prompt), found.prompt[-2:]) == (MAX_CHARACTERS, "ab")
    assert found.suffix is not None
    assert (len(found.suffix), found.suffix[:2]) == (MAX_CHARACTERS, "\nc")


def test_a_prompt_with_and_without_a_suffix() -> None:
    assert read_cursor(None, "def ", None) == Cursor("def ", None, None)
    assert read_cursor(None, "def ", "): pass") == Cursor("def ", "): pass", None)


@pytest.mark.parametrize(
    ("target", "prompt", "suffix", "message"),
    [
        ("a.py:1", "def", None, "a.py:1 and --prompt exclude each other"),
        ("a.py:1", None, "x", "--suffix goes with --prompt or standard input"),
        ("a.py", None, None, "'a.py' is not FILE:LINE or FILE:LINE:COLUMN"),
        (":1", None, None, "':1' is not FILE:LINE or FILE:LINE:COLUMN"),
    ],
)
def test_what_cannot_be_meant(
    target: str | None, prompt: str | None, suffix: str | None, message: str
) -> None:
    with pytest.raises(click.UsageError) as caught:
        read_cursor(target, prompt, suffix)
    assert caught.value.message == message


@given(st.text(max_size=60), st.data())
def test_before_and_after_are_the_file(
    tmp_path_factory: pytest.TempPathFactory, text: str, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("any") / "file"
    content = text.encode("utf-8", "replace")
    file.write_bytes(content)
    n_lines = max(1, content.count(b"\n") + (not content.endswith(b"\n")))
    number = data.draw(st.integers(1, n_lines))
    found = read_cursor(f"{file}:{number}", None, None)
    assert found.suffix is not None
    assert found.prompt + found.suffix == content.decode()
    assert found.prompt.count("\n") == number - 1
