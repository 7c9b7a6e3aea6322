"""Lines that hooks append come out as pokes, each at least once, whatever else is in the file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from code2lora.daemon.inbox import Poke, drain, poke


def test_pokes_come_out_once_and_in_order(tmp_path: Path) -> None:
    poke(tmp_path, "post-commit", Path("/a"))
    poke(tmp_path, "post-merge", Path("/b c/ü"))
    poke(tmp_path, "post-commit", Path("/a"))

    assert drain(tmp_path) == [
        Poke("post-commit", Path("/a")),
        Poke("post-merge", Path("/b c/ü")),
    ]
    assert drain(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_git_dir_is_made_absolute(tmp_path: Path) -> None:
    (tmp_path / "pokes").write_text("post-commit\t/tree\t.git\npost-commit\t/wt\t/main/.git/wt\n")

    assert [p.git_dir for p in drain(tmp_path)] == [Path("/tree/.git"), Path("/main/.git/wt")]


def test_torn_and_foreign_lines_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "pokes").write_bytes(
        b"post-commit\t/goo\npost-commit\trelative\t\n\xff\xfe\0\t/x\t\n\npost-merge\t/kept\t\n"
    )

    assert drain(tmp_path) == [Poke("post-merge", Path("/kept"))]


def test_what_a_killed_reader_left_is_read(tmp_path: Path) -> None:
    (tmp_path / "drained-1").write_text("post-commit\t/left\t\n")
    poke(tmp_path, "post-merge", Path("/new"))

    assert drain(tmp_path) == [Poke("post-commit", Path("/left")), Poke("post-merge", Path("/new"))]


def test_nothing_is_lost_while_many_append(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from code2lora.daemon.inbox import poke\n"
        "for i in range(200): poke(Path(sys.argv[1]), 'e', Path(f'/{sys.argv[2]}/{i}'))"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(n)]) for n in range(3)
    ]
    seen: set[Path] = set()
    while any(writer.poll() is None for writer in writers):
        seen.update(p.directory for p in drain(tmp_path))
    seen.update(p.directory for p in drain(tmp_path))

    assert seen == {Path(f"/{n}/{i}") for n in range(3) for i in range(200)}
