"""Opening: creation, privacy, and what is refused, with the words that the user reads."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import code2lora
from code2lora.errors import UserError
from code2lora.state_store import Store, engine
from tests.state_store.samples import CHECKPOINT, REPOSITORY, anchored, commit_id, register

ROOT = Path(code2lora.__file__).parents[1]


def refusal(url: str, *, migrate: bool = True) -> tuple[str, str | None]:
    """Return the message and the hint with which a database is refused."""
    with pytest.raises(UserError) as caught:
        Store.open(url, migrate=migrate)
    return caught.value.message, caught.value.hint


def damage_hint(path: Path) -> str:
    return (
        f"`code2lora daemon stop`, `rm '{path}' '{path}-wal' '{path}-shm'`, then "
        "`code2lora init` in each repository; everything in it is rebuilt from git"
    )


def test_the_files_are_private_even_where_the_umask_is_open(tmp_path: Path) -> None:
    path = tmp_path / "made" / "for it" / "state.db"
    old = os.umask(0)
    try:
        with Store.open(f"sqlite:///{path}") as store:
            store.record_event("started")
            modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()}
    finally:
        os.umask(old)

    assert {"state.db", "state.db-wal", "state.db-shm"} <= modes.keys()
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_an_existing_file_that_others_can_read_is_made_private(url: str, path: Path) -> None:
    Store.open(url).close()
    path.chmod(0o644)

    Store.open(url).close()

    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_connections_have_the_settings_that_the_rules_rest_on(url: str) -> None:
    with Store.open(url) as store, store._reading() as db:
        settings = {
            name: db.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }

    assert settings == {
        "journal_mode": "wal",
        "synchronous": 1,
        "foreign_keys": 1,
        "busy_timeout": 30_000,
    }


def test_a_file_that_lost_its_journal_mode_gets_it_back(url: str, path: Path) -> None:
    Store.open(url).close()
    raw = sqlite3.connect(path)
    assert raw.execute("PRAGMA journal_mode = DELETE").fetchone() == ("delete",)
    raw.close()

    with Store.open(url) as store, store._reading() as db:
        assert db.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_a_file_that_is_no_database_is_refused(url: str, path: Path) -> None:
    path.write_bytes(b"certainly no database, but long enough to have had a header" * 100)

    message, hint = refusal(url)

    assert message == f"the database {path} is damaged: file is not a database"
    assert hint == damage_hint(path)
    assert path.read_bytes().startswith(b"certainly")  # deleting it is the user's decision


def test_a_database_torn_in_the_middle_is_noticed(url: str, path: Path) -> None:
    with Store.open(url) as store:
        anchored(store, 200)
    content = bytearray(path.read_bytes())
    content[8192 : len(content) // 2] = b"\xaa" * (len(content) // 2 - 8192)
    path.write_bytes(content)

    with pytest.raises(UserError) as caught, Store.open(url) as store:
        store.check()

    assert caught.value.message.startswith(f"the database {path} is damaged: ")
    assert caught.value.hint == damage_hint(path)


def test_a_query_that_meets_damage_says_so(url: str, path: Path) -> None:
    with Store.open(url) as store:
        anchored(store, 200)
    content = bytearray(path.read_bytes())
    page = content.find(b"change 150") // 4096 * 4096
    content[page : page + 4096] = b"\xaa" * 4096
    path.write_bytes(content)

    with Store.open(url) as store, pytest.raises(UserError) as caught:
        for n in range(200):
            store.find_state(REPOSITORY, CHECKPOINT, commit_id(n))

    assert caught.value.message == (
        f"the database {path} is damaged: database disk image is malformed"
    )


def test_a_whole_database_passes_the_check(url: str) -> None:
    with Store.open(url) as store:
        anchored(store, 20)
        store.check()


def test_a_row_that_refers_to_nothing_fails_the_check(url: str, path: Path) -> None:
    with Store.open(url) as store:
        anchored(store, 2)
        raw = sqlite3.connect(path)
        raw.execute("DELETE FROM anchors")
        raw.commit()
        raw.close()

        with pytest.raises(UserError, match="a row of states refers to a missing row of anchors"):
            store.check()


def test_what_is_not_there_is_not_made_unasked(url: str, path: Path) -> None:
    message, hint = refusal(url, migrate=False)

    assert message == f"there is no database at {path} yet"
    assert hint == "`code2lora init` in a repository"
    assert not path.exists()

    path.touch()
    assert refusal(url, migrate=False)[0] == "the database has no schema yet"


@pytest.mark.parametrize(
    ("bad_url", "message"),
    [
        ("no url", "the database URL is not one that SQLAlchemy can read"),
        ("sqlite:///state.db", "the database path state.db is relative"),
        ("sqlite://", "a database in memory cannot be shared with the daemon"),
        ("sqlite:///:memory:", "a database in memory cannot be shared with the daemon"),
        ("nosuchbase://host/name", "no driver is installed for nosuchbase databases"),
    ],
)
def test_urls_that_cannot_work_are_refused(bad_url: str, message: str) -> None:
    assert refusal(bad_url)[0] == message


def test_a_missing_driver_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)  # as if it were not installed

    message, hint = refusal("postgresql://me@host/team")

    assert message.startswith("no driver is installed for postgresql")
    assert hint == "`pip install 'code2lora-daemon[postgres]'`"


def test_a_server_that_is_down_is_named_without_its_password() -> None:
    pytest.importorskip("psycopg")

    message, hint = refusal("postgresql://me:secret@127.0.0.1:1/team?connect_timeout=2")

    where = "postgresql://me:***@127.0.0.1:1/team?connect_timeout=2"
    assert message.startswith(f"cannot reach {where}: ") and "refused" in message
    assert "secret" not in message
    assert hint == "start the database server, or mend database_url in config.toml"


@pytest.mark.slow
def test_a_server_that_does_not_let_us_create_tables_is_named(postgresql_url: str) -> None:
    import psycopg

    with psycopg.connect(postgresql_url, autocommit=True) as admin:
        admin.execute("CREATE ROLE guest LOGIN")
        guest_url = postgresql_url.replace("//postgres@", "//guest@")

        message, hint = refusal(guest_url)
        admin.execute("DROP ROLE guest")

    assert message.startswith("postgresql://guest@/state_store_test?host=")
    assert message.endswith(": permission denied for schema public")
    assert hint == "ask whoever runs the database server"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    path = tmp_path / "state.db"

    assert refusal(f"sqlite:///{path}")[0] == f"cannot open the database {path}: Permission denied"


def test_a_folder_in_place_of_the_file_is_named(url: str, path: Path) -> None:
    path.mkdir()

    assert refusal(url)[0] == f"cannot open the database {path}: Is a directory"


def test_a_full_disk_loses_nothing_that_was_stored(url: str, path: Path) -> None:
    with Store.open(url) as store:
        anchored(store, 3)
        with store._reading() as db:
            n_pages = db.exec_driver_sql("PRAGMA page_count").scalar_one()
            db.exec_driver_sql(f"PRAGMA max_page_count = {n_pages}")

        with pytest.raises(UserError) as caught:
            for _ in range(100):
                store.record_event("noise", detail={"text": "x" * 5000})

        assert caught.value.message == f"no room left to write the database {path}"
        assert store.find_state(REPOSITORY, CHECKPOINT, commit_id(2)) is not None
        store.check()


def test_a_writer_that_waited_too_long_says_who_can_help(
    url: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store.open(url).close()
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_S", 0.1)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with Store.open(url) as store, pytest.raises(UserError) as caught:
        register(store)

    other.close()
    assert caught.value.message == (
        f"the database {path} has been locked by another program for 0 s"
    )


def test_importing_and_opening_load_neither_torch_nor_alembic(url: str) -> None:
    Store.open(url).close()
    script = (
        "import sys\n"
        "from code2lora.state_store import Store\n"
        f"Store.open({url!r}).close()\n"
        "heavy = {'torch', 'numpy', 'alembic', 'filelock', 'pygit2', 'sqlalchemy.orm'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert done.stdout == "[]\n"
