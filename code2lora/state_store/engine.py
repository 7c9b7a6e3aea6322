"""Turn a database URL into a SQLAlchemy engine that many processes can use at once.

Every transaction begins explicitly. A writer takes SQLite's write lock when it begins: one that
first reads and then asks for the lock would be refused at once whenever another had written in
between, however long the busy timeout. Readers see one snapshot and wait for nobody (WAL).

What a person can do something about (a damaged file, a full disk, a server that is down) leaves
here as UserError; every other database error is a bug and propagates.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, ExceptionContext, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.pool import NullPool

from code2lora.errors import UserError

BUSY_TIMEOUT_S = 30.0
"""Longest wait for another process's write transaction; ours last milliseconds."""

SERVER_STATES = ("42501", "53")
"""SQLSTATEs that only the server's keeper can mend: no privilege, no resources left."""

WRITES = "code2lora_writes"
"""Execution option of a connection whose next transaction writes."""


def parse_url(url: str) -> URL:
    """Return the parsed URL.

    Raises UserError when it is malformed, or one that two processes would not read alike: SQLite
    in memory, or at a path relative to the current directory.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise UserError(
            "the database URL is not one that SQLAlchemy can read",
            hint="write it as sqlite:////absolute/path or postgresql://user@host/name",
        ) from error
    path = sqlite_path(parsed)
    if path is None and parsed.get_backend_name() == "sqlite":
        raise UserError(
            "a database in memory cannot be shared with the daemon",
            hint="write it as sqlite:////absolute/path",
        )
    if path is not None and not path.is_absolute():
        raise UserError(
            f"the database path {path} is relative",
            hint=f"write four slashes and the whole path: sqlite:///{path.absolute()}",
        )
    return parsed


def sqlite_path(url: URL) -> Path | None:
    """Return the database file; None for a server and for a database in memory."""
    name = url.database
    if url.get_backend_name() != "sqlite" or not name or name == ":memory:":
        return None
    return Path(name)


def create_file(path: Path) -> None:
    """Create an empty database file that only the user can read, and keep an existing one so.

    SQLite gives the files that it puts beside it the same mode. Raises UserError when the folder
    cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(descriptor).st_mode & 0o077:
                os.chmod(path, 0o600)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(
            f"cannot open the database {path}: {error.strerror}",
            hint="give yourself access to it, or choose another place with CODE2LORA_STATE_DIR",
        ) from error


def make_engine(url: URL, *, for_migration: bool = False) -> Engine:
    """Return an engine with the project's transaction rules.

    for_migration: one connection that is not pooled and does not enforce foreign keys, because
    SQLite alters a table by dropping it, and that would cascade to its children.

    Raises UserError when the URL's driver is not installed.
    """
    is_sqlite = url.get_backend_name() == "sqlite"
    options: dict[str, Any] = {}
    if is_sqlite:
        options["connect_args"] = {"timeout": BUSY_TIMEOUT_S}
    else:
        options["pool_pre_ping"] = True  # a daemon outlives its server's restarts
    if for_migration:
        options["poolclass"] = NullPool
    try:
        engine = create_engine(url, **options)
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        raise UserError(
            f"no driver is installed for {url.drivername} databases",
            hint="`pip install 'code2lora-daemon[postgres]'`"
            if url.get_backend_name() == "postgresql"
            else "install the driver's package, or use sqlite or postgresql",
        ) from error
    if is_sqlite:
        _set_up_sqlite(engine, foreign_keys=not for_migration)
    event.listen(engine, "handle_error", _translate)
    return engine


def _set_up_sqlite(engine: Engine, *, foreign_keys: bool) -> None:
    def on_connect(dbapi_connection: Any, record: object) -> None:
        # The driver begins no transaction of its own; `on_begin` does.
        dbapi_connection.isolation_level = None
        # A power failure may cost the newest commits, never the database. They are recomputed.
        dbapi_connection.execute("PRAGMA synchronous = NORMAL")
        dbapi_connection.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")
        dbapi_connection.execute("PRAGMA temp_store = MEMORY")

    def on_begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", on_begin)


def _translate(context: ExceptionContext) -> UserError | None:
    """Return what SQLAlchemy is to raise in place of an error that a person can mend."""
    if context.is_pre_ping:  # SQLAlchemy is about to reconnect by itself
        return None
    error = context.original_exception
    url = context.engine.url if context.engine is not None else None
    name = getattr(error, "sqlite_errorname", None)
    if name is not None:
        return sqlite_error(name, str(error), sqlite_path(url) if url else None)
    where = url.render_as_string(hide_password=True) if url else "the database"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if context.connection is None or context.is_disconnect:
        return UserError(
            f"cannot reach {where}: {reason}",
            hint="start the database server, or mend database_url in config.toml",
        )
    sqlstate = getattr(error, "sqlstate", None) or ""
    if sqlstate.startswith(SERVER_STATES):
        return UserError(f"{where}: {reason}", hint="ask whoever runs the database server")
    return None


def sqlite_error(name: str, message: str, path: Path | None) -> UserError | None:
    """Return what to tell the user about an SQLite error code; None when it is our own bug."""
    place = f"the database {path}" if path else "the database"
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return damaged(path, message)
    if name.startswith("SQLITE_FULL"):
        return UserError(f"no room left to write {place}", hint="free some disk space")
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return UserError(
            f"cannot write {place}: {message}",
            hint="give yourself access to the file and its folder",
        )
    if name.startswith("SQLITE_IOERR"):
        return UserError(f"cannot read or write {place}: {message}", hint="check the disk")
    if name.startswith("SQLITE_BUSY"):
        return UserError(
            f"{place} has been locked by another program for {BUSY_TIMEOUT_S:.0f} s",
            hint="close what has it open (`code2lora daemon stop`, an SQL shell), and try again",
        )
    return None


def damaged(path: Path | None, what: str) -> UserError:
    """Return the error for a database that cannot be trusted any more."""
    files = f"`rm '{path}' '{path}-wal' '{path}-shm'`" if path else "delete it"
    return UserError(
        f"the database{f' {path}' if path else ''} is damaged: {what}",
        hint=f"`code2lora daemon stop`, {files}, then `code2lora init` in each repository; "
        "everything in it is rebuilt from git",
    )
