"""Migrations: from nothing, from the first schema with rows, interrupted, and from the future."""

from __future__ import annotations

import shutil
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from code2lora.errors import UserError
from code2lora.state_store import Store, migrate, schema
from tests.state_store.samples import CHECKPOINT, REPOSITORY, anchored, commit_id, new_adapter

FIRST_SCHEMA = Path(__file__).parent / "schema_0001.sql"
"""A dump of a database with rows, made by the first release's schema; never to be changed."""

NEXT_REVISION = '''
import sqlalchemy as sa
from alembic import op

revision = "9001"
down_revision = "{head}"


def upgrade() -> None:
    """Recreate the table that all others hang on, as SQLite must to drop a column's default."""
    with op.batch_alter_table("repositories", recreate="always") as table:
        table.add_column(sa.Column("note", sa.Text()))
    op.execute("UPDATE repositories SET note = 'migrated'")
    {then}
'''


def add_revision(monkeypatch: pytest.MonkeyPatch, folder: Path, then: str = "") -> None:
    """Give the code one more migration than it has."""
    migrations = folder / "migrations"
    shutil.copytree(migrate.MIGRATIONS, migrations)
    text = NEXT_REVISION.format(head=schema.SCHEMA_REVISION, then=then)
    (migrations / "versions" / "r9001_next.py").write_text(text)
    monkeypatch.setattr(migrate, "MIGRATIONS", migrations)
    monkeypatch.setattr(schema, "SCHEMA_REVISION", "9001")


def fill(url: str) -> None:
    """Put a row into every table that hangs on a repository."""
    with Store.open(url) as store:
        anchor = anchored(store, 3)
        worktree = store.upsert_worktree(REPOSITORY, git_dir="/src/.git", path="/src")
        state = store.latest_state(anchor.id)
        assert state is not None
        store.publish(worktree.id, new_adapter(state.info.id, "/adapters/1"))
        store.record_failure(REPOSITORY, "embed", "no")


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as db:
        return list(db.iterdump())


def revision_of(path: Path) -> str:
    with closing(sqlite3.connect(path)) as db:
        revision: str = db.execute("SELECT version_num FROM alembic_version").fetchone()[0]
        return revision


def test_the_migrations_build_the_tables_that_the_code_declares(store: Store) -> None:
    with store._reading() as db:
        context = MigrationContext.configure(db, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
        assert migrate.stored_revision(db) == schema.SCHEMA_REVISION


def test_revisions_are_growing_numbers_in_one_line() -> None:
    config = Config()
    config.set_main_option("script_location", str(migrate.MIGRATIONS))
    scripts = list(ScriptDirectory.from_config(config).walk_revisions())

    numbers = [int(script.revision) for script in reversed(scripts)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert scripts[0].revision == schema.SCHEMA_REVISION


def test_the_first_schema_is_upgraded_with_its_rows(url: str, path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.executescript(FIRST_SCHEMA.read_text())

    with Store.open(url) as store:
        store.check()
        (repository,) = store.repositories()
        assert (repository.id, repository.name) == (REPOSITORY, "project")
        (anchor,) = store.active_anchors(REPOSITORY, CHECKPOINT)
        found = store.find_state(REPOSITORY, CHECKPOINT, commit_id(2))
        assert found is not None and len(found.state) == 64
        assert (found.info.anchor_id, found.info.step) == (anchor.id, 2)
        assert not found.info.provisional
        (worktree,) = store.worktrees(REPOSITORY)
        live = store.live_adapter(worktree.id)
        assert live is not None and (live.state_id, live.generation) == (found.info.id, 1)
        assert live.use == "own"
        assert store.recent_scores(REPOSITORY, CHECKPOINT, limit=1) == []
        assert [e.kind for e in store.events(REPOSITORY)] == ["published"]
        assert [f.message for f in store.failures(REPOSITORY)] == ["no"]
        assert store.checkpoint(CHECKPOINT) is not None
    assert revision_of(path) == schema.SCHEMA_REVISION


def test_an_upgrade_keeps_every_row_and_a_copy_of_the_old_file(
    url: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(url)
    reader = sqlite3.connect(path)  # keeps what is in the write-ahead log out of the main file
    old = dump(path)
    before = schema.SCHEMA_REVISION
    add_revision(monkeypatch, tmp_path)

    with Store.open(url) as store:
        store.check()
        assert store.sizes(REPOSITORY).n_states == 3
        (worktree,) = store.worktrees(REPOSITORY)
        assert worktree.live_adapter_id is not None
        assert len(store.failures(REPOSITORY)) == 1
        assert store.forget_repository(REPOSITORY)  # the new table still has its children
        assert store.sizes(REPOSITORY).n_states == 0
    reader.close()

    assert revision_of(path) == "9001"
    copy = path.with_name(f"state.db.schema-{before}")
    assert dump(copy) == old
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


@pytest.mark.parametrize(
    ("then", "error"),
    [
        ("raise RuntimeError('killed')", RuntimeError),
        ("op.execute('DELETE FROM anchors')", UserError),
    ],
    ids=["stops half way", "breaks a reference"],
)
def test_an_upgrade_that_fails_leaves_the_old_database(
    then: str,
    error: type[Exception],
    url: str,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(url)
    old = dump(path)
    with monkeypatch.context() as patch:
        add_revision(patch, tmp_path, then)
        with pytest.raises(error):
            Store.open(url)

    assert dump(path) == old
    with Store.open(url) as store:
        assert store.sizes(REPOSITORY).n_states == 3


def test_an_old_schema_is_not_upgraded_unasked(
    url: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(url)
    before = schema.SCHEMA_REVISION
    add_revision(monkeypatch, tmp_path)

    with pytest.raises(UserError) as caught:
        Store.open(url, migrate=False)

    assert caught.value.message == f"the database has the old schema {before}"
    assert revision_of(path) == before


@pytest.mark.parametrize("may_migrate", [True, False])
def test_a_newer_schema_is_refused(url: str, path: Path, may_migrate: bool) -> None:
    fill(url)
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE alembic_version SET version_num = '0417'")
        db.commit()
    old = dump(path)

    with pytest.raises(UserError) as caught:
        Store.open(url, migrate=may_migrate)

    assert caught.value.message == (
        "the database has schema 0417, but this version of Code2LoRA knows only up to "
        f"{schema.SCHEMA_REVISION}"
    )
    assert caught.value.hint == "upgrade Code2LoRA (`pip install --upgrade code2lora-daemon`)"
    assert dump(path) == old


def test_the_database_of_another_program_is_refused(url: str, path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE alembic_version (version_num TEXT)")
        db.execute("INSERT INTO alembic_version VALUES ('ae1027a6acf')")
        db.commit()
    old = dump(path)

    with pytest.raises(UserError) as caught:
        Store.open(url)

    assert caught.value.message == (
        "the database is not Code2LoRA's: its schema revision is 'ae1027a6acf'"
    )
    assert dump(path) == old


def test_a_migration_that_another_process_does_not_end_is_reported(
    url: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filelock import FileLock

    monkeypatch.setattr(migrate, "LOCK_TIMEOUT_S", 0.1)
    with FileLock(f"{path}.lock"), pytest.raises(UserError) as caught:
        Store.open(url)

    assert caught.value.message == f"another process has been migrating {path} for 0 s"
