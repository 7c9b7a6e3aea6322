"""`doctor`: a line for each thing that must be right, with advice where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from code2lora.cli.checks import Check, examine
from code2lora.settings import Settings
from tests.cli.conftest import Known, Run
from tests.cli.models import make_model


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = make_model(tmp_path / "tiny")
    monkeypatch.setenv("CODE2LORA_MODEL", str(path))
    return path


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_all_is_well_but_the_daemon(code2lora: Run, known: Known, model: Path, here: Path) -> None:
    done = code2lora("doctor")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    marks = {line.split()[1].rstrip(":"): line.split()[0] for line in lines if "hint:" not in line}
    marks.pop("disk")
    assert marks.pop("daemon") == "warn"
    assert set(marks.values()) == {"ok"}
    assert list(marks)[:2] == ["python", "git"]
    assert list(marks)[-3:] == ["repository", "registered", "hooks"]
    assert "ok    database: whole, 1 worktree registered" in lines
    assert "ok    hooks: 5 hooks installed (file)" in lines or "(config)" in done.out
    at = lines.index("warn  daemon: not running")
    assert lines[at + 1] == "      hint: `code2lora daemon start`; the next commit starts it too"


def test_a_failed_check_is_status_1(
    code2lora: Run, known: Known, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODE2LORA_MODEL", "no-such-model")
    done = code2lora("doctor", "--json")
    assert done.status == 1
    checks = {check["name"]: check for check in json.loads(done.out)}
    assert checks["model"]["status"] == "fail"
    assert checks["model"]["detail"].startswith("there is no model named 'no-such-model'")
    assert checks["database"]["status"] == "ok"


def test_a_damaged_database_is_found(known: Known, model: Path, here: Path) -> None:
    known.store.close()
    file = known.settings.state_dir / "state.db"
    for extra in ("-wal", "-shm"):
        file.with_name(file.name + extra).unlink(missing_ok=True)
    content = bytearray(file.read_bytes())
    content[4096 * 2 :] = b"\xa5" * (len(content) - 4096 * 2)
    file.write_bytes(content)
    check = by_name(examine(here))["database"]
    assert check.status == "fail"
    assert check.detail.startswith(f"the database {file} is damaged: ")
    assert check.hint is not None and "code2lora init" in check.hint


def test_missing_hooks_are_a_warning(known: Known, model: Path, here: Path) -> None:
    (here / ".git/hooks/post-merge").unlink()
    assert by_name(examine(here))["hooks"] == Check(
        "hooks", "warn", "post-merge missing", f"`code2lora init {here}`"
    )


def test_no_repository_is_a_warning(home: Settings, model: Path, tmp_path: Path) -> None:
    checks = by_name(examine(tmp_path))
    assert checks["repository"].status == "warn"
    assert "hooks" not in checks


def test_a_registered_repository_is_asked_for(known: Known, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    known.repo.clone(other)
    check = by_name(examine(other))["repository"]
    found = [c for c in examine(other) if c.status == "fail"]
    assert check.status == "fail"
    assert [c.hint for c in found] == [f"`code2lora init {other}`"]


def test_a_socket_path_that_is_too_long(
    home: Settings, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODE2LORA_RUNTIME_DIR", str(tmp_path / ("r" * 100)))
    check = by_name(examine(tmp_path))["socket"]
    assert check.status == "fail"
    assert check.hint == "set CODE2LORA_RUNTIME_DIR to a shorter directory"


def test_open_directories_are_a_warning(home: Settings, model: Path, tmp_path: Path) -> None:
    home.prepare()
    home.state_dir.chmod(0o755)
    assert by_name(examine(tmp_path))["directories"] == Check(
        "directories",
        "warn",
        f"others can look into {home.state_dir}",
        f"`chmod 700 {home.state_dir}`",
    )


def test_settings_that_are_wrong_end_the_examination(
    home: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODE2LORA_SWEEP_S", "soon")
    checks = examine(tmp_path)
    assert [check.name for check in checks] == ["python", "git", "settings"]
    assert checks[-1].status == "fail"
