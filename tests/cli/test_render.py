"""Rendering of single values, and what a terminal must not be sent."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from code2lora.cli import render
from code2lora.cli.processes import DaemonView


def test_what_a_terminal_obeys_is_replaced() -> None:
    hostile = "\x1b[2J\x1b]0;title\x07 a\rb\u202ec\x9b31m\udc80"
    assert render.clean(hostile) == "�[2J�]0;title� a�b�c�31m�"
    assert render.clean("tab\tand\nline, ünïcode 漢字") == "tab\tand\nline, ünïcode 漢字"


@given(st.text())
def test_nothing_unsafe_is_left(text: str) -> None:
    kept = render.clean(text)
    assert len(kept) == len(text)
    assert all(char in "\n\t" or (ord(char) >= 32 and char != "\x7f") for char in kept)
    kept.encode()


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_949, "99.9 kB"),
        (99_951, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (12_000_000_000, "12.0 GB"),
        (5e15, "5000000 GB"),
    ],
)
def test_sizes(n_bytes: float, text: str) -> None:
    assert render.size(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 ms"),
        (0.0124, "12 ms"),
        (0.9996, "1.0 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.5, "1 min"),
        (5399, "90 min"),
        (5400, "2 h"),
        (129_600, "2 d"),
    ],
)
def test_spans(seconds: float, text: str) -> None:
    assert render.span(seconds) == text


def test_ages() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert render.age(now - timedelta(minutes=3), now) == "3 min ago"
    assert render.age(now + timedelta(minutes=3), now) == "just now"


def test_counts() -> None:
    assert [render.count(n, "commit") for n in (0, 1, 2, 12345)] == [
        "0 commits",
        "1 commit",
        "2 commits",
        "12,345 commits",
    ]


def test_a_sparkline_has_a_block_for_each_value() -> None:
    assert render.sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert render.sparkline([0.0, 0.0]) == "▁▁"
    assert render.sparkline([]) == ""


@given(st.lists(st.floats(min_value=-1, max_value=2)))
def test_any_values_make_a_sparkline(values: list[float]) -> None:
    assert len(render.sparkline(values)) == len(values)


def test_bars() -> None:
    assert render.bar(1, 4, width=4) == "█░░░ 1/4"
    assert render.bar(9, 4, width=4) == "████ 9/4"
    assert render.bar(0, 0, width=2) == "██ 0/0"


def test_fields_stand_below_each_other() -> None:
    assert render.fields([("a", "1\n2"), ("long", "3")]) == (
        f"  {render.styled('a   ', 'dim')}  1\n"
        f"  {render.styled('    ', 'dim')}  2\n"
        f"  {render.styled('long', 'dim')}  3"
    )


def test_a_table_is_aligned_by_what_a_terminal_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    rows = [["漢字", "7"], ["abc", "1234"]]
    assert render.table(["NAME", "N"], rows, right=["N"]) == ("NAME     N\n漢字     7\nabc   1234")


def test_colour_is_left_out_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    assert render.styled("x", "red") == "\x1b[31mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert render.styled("x", "red") == "x"


def test_json_holds_times_paths_and_records(capsys: pytest.CaptureFixture[str]) -> None:
    render.emit_json(
        {
            "at": datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
            "path": Path("/a/b"),
            "view": DaemonView(running=False, supervisor=None, worker=None),
        }
    )
    assert json.loads(capsys.readouterr().out) == {
        "at": "2026-01-02T03:04:05.678+00:00",
        "path": "/a/b",
        "view": {"running": False, "supervisor": None, "worker": None},
    }
