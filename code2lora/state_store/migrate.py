"""Bring a database to the schema of this version, once, however many processes open it.

The stored revision is compared with plain SQL first: alembic costs a third of a second to import
and is needed only when there is something to do. Look, lock, look again, work. All migrations
run in one transaction together with the new revision number, so a kill leaves the old schema.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.engine import URL

from code2lora.errors import UserError
from code2lora.state_store import schema
from code2lora.state_store.engine import WRITES, damaged, make_engine, sqlite_path

MIGRATIONS = Path(__file__).parent / "migrations"

LOCK_TIMEOUT_S = 60.0
"""Longest wait for another process's migration."""

ADVISORY_LOCK = 0x63326C6F7261
"""PostgreSQL's lock number for migrations: "c2lora" in ASCII."""


def stored_revision(connection: Connection) -> str | None:
    """Return the revision of the database; None when it holds no schema yet.

    Raises UserError when the database belongs to something else.
    """
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision = connection.scalar(text("SELECT version_num FROM alembic_version"))
    if revision is None:
        return None
    if not str(revision).isdecimal():
        raise UserError(
            f"the database is not Code2LoRA's: its schema revision is {revision!r}",
            hint="give Code2LoRA a database of its own",
        )
    return str(revision)


def is_current(connection: Connection) -> bool:
    """Tell whether the schema is this version's.

    Raises UserError when it is newer than the code.
    """
    revision = stored_revision(connection)
    if revision is not None and int(revision) > int(schema.SCHEMA_REVISION):
        raise UserError(
            f"the database has schema {revision}, but this version of Code2LoRA knows only up to "
            f"{schema.SCHEMA_REVISION}",
            hint="upgrade Code2LoRA (`pip install --upgrade code2lora-daemon`)",
        )
    return revision == schema.SCHEMA_REVISION


def migrate(url: URL) -> None:
    """Create or upgrade the schema, unless another process has just done so.

    An SQLite file that holds an older schema is first copied beside itself. Raises UserError
    when another process holds the migration lock for too long.
    """
    path = sqlite_path(url)
    engine = make_engine(url, for_migration=True)
    with _file_lock(path):
        if path is not None:
            _turn_wal_on(engine)
        connection = engine.connect().execution_options(**{WRITES: True})
        with connection, connection.begin():
            if connection.dialect.name == "postgresql":
                connection.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))
            if is_current(connection):
                return
            revision = stored_revision(connection)
            if path is not None and revision is not None:
                _copy(path, path.with_name(f"{path.name}.schema-{revision}"))
            _upgrade(connection)
            _check_references(connection, path)


def _turn_wal_on(engine: Engine) -> None:
    """Set the journal mode, which SQLite keeps in the file.

    The change wants the file for itself, so it is made once and not by every connection.
    """
    connection = engine.raw_connection()
    try:
        connection.cursor().execute("PRAGMA journal_mode = WAL")
    finally:
        connection.close()


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, schema.SCHEMA_REVISION)


def _check_references(connection: Connection, path: Path | None) -> None:
    """Make up for the foreign keys that were not enforced during the migration."""
    if connection.dialect.name == "sqlite":
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
        if broken is not None:
            raise damaged(path, f"rows of table {broken[0]} refer to missing rows of {broken[2]}")


def _copy(source: Path, target: Path) -> None:
    """Copy a database that is in use, write-ahead log included."""
    draft = target.with_name(target.name + ".tmp")
    draft.unlink(missing_ok=True)
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(draft)) as new:
        old.backup(new)
    os.replace(draft, target)


@contextmanager
def _file_lock(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    from filelock import FileLock, Timeout

    lock = FileLock(f"{path}.lock", timeout=LOCK_TIMEOUT_S, mode=0o600)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"another process has been migrating {path} for {LOCK_TIMEOUT_S:.0f} s",
            hint="wait for it, or end it, and try again",
        ) from error
    try:
        yield
    finally:
        lock.release()
