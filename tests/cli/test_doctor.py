"""`doctor`: a line for each thing that must be right, with advice where it is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from code2lora import __version__
from code2lora.cli.checks import Check, examine
from code2lora.settings import Settings
from tests.cli.conftest import Known, Run
from tests.cli.models import make_model
from tests.gitrepo import GitRepo


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
    assert list(marks)[:3] == ["code2lora", "python", "git"]
    assert lines[0].startswith(f"ok    code2lora: {__version__}, Python 3.")
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
    assert [check.name for check in checks] == ["code2lora", "python", "git", "settings"]
    assert checks[-1].status == "fail"


def test_a_fresh_home_stays_as_it_is(home: Settings, model: Path, repo: GitRepo) -> None:
    checks = by_name(examine(repo.path))
    assert list(home.state_dir.parent.iterdir()) == []
    assert checks["database"] == Check(
        "database", "ok", f"would be made at {home.state_dir / 'state.db'}"
    )
    assert checks["directories"].status == "ok"
    assert checks["directories"].detail.startswith(f"would be made: {home.state_dir}, ")
    assert checks["repository"].hint == f"`code2lora init {repo.path}`"


def test_a_linked_worktree_is_not_taken_up(known: Known, model: Path, tmp_path: Path) -> None:
    known.repo.worktree(tmp_path / "beside", "topic")
    assert by_name(examine(tmp_path / "beside"))["registered"].status == "ok"
    assert len(known.store.worktrees()) == 1


@pytest.mark.parametrize(
    ("device", "status"),
    [("auto", "ok"), ("cpu", "ok"), ("cuda:1", "ok"), ("gpu", "fail"), ("cuda:x", "fail")],
)
def test_the_device_has_a_known_form(
    home: Settings,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    status: str,
) -> None:
    monkeypatch.setenv("CODE2LORA_DEVICE", device)
    check = by_name(examine(tmp_path))["device"]
    assert (check.status, bool(check.hint)) == (status, status == "fail")


def test_the_adapters_must_be_writable(known: Known, model: Path, here: Path) -> None:
    folder = known.settings.adapters_dir / known.repository_id
    shutil.rmtree(folder)
    folder.touch()
    assert by_name(examine(here))["adapters"] == Check(
        "adapters", "fail", f"cannot write {folder}: Not a directory", "give yourself access to it"
    )
    folder.unlink()
    known.settings.adapters_dir.rmdir()
    known.settings.adapters_dir.touch()
    check = by_name(examine(here))["directories"]
    assert (check.status, str(known.settings.adapters_dir) in check.detail) == ("fail", True)


def test_the_last_failure_until_it_is_resolved(known: Known, model: Path, here: Path) -> None:
    known.store.record_failure(known.repository_id, "refresh", "the disk is full", hint="`df`")
    assert by_name(examine(here))["last failure"] == Check(
        "last failure", "warn", "3 min ago: the disk is full", "`df`"
    )
    known.store.resolve_failures(known.repository_id)
    assert "last failure" not in by_name(examine(here))
