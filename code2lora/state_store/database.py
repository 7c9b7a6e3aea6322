"""An open database: its connections, its transactions, and its rows as records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from itertools import islice
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import Column, ColumnElement, Connection, Engine, Row, Select, Table, select
from sqlalchemy.engine import URL
from sqlalchemy.exc import IntegrityError

from code2lora.errors import UserError
from code2lora.state_store.engine import (
    WRITES,
    create_file,
    damaged,
    make_engine,
    parse_url,
    sqlite_path,
)
from code2lora.state_store.migrate import is_current, migrate, stored_revision

T = TypeVar("T")

MAX_VALUES = 500
"""Values in one IN list; databases limit the parameters of a statement."""


def utc_now() -> datetime:
    """Return the time, aware, in UTC."""
    return datetime.now(UTC)


class Database:
    """One process's access to the database; safe to share between threads."""

    def __init__(self, engine: Engine, clock: Callable[[], datetime]) -> None:
        self._engine = engine
        self._now = clock

    @classmethod
    def open(
        cls, url: str, *, migrate: bool = True, clock: Callable[[], datetime] = utc_now
    ) -> Self:
        """Return the database at a SQLAlchemy URL, created or upgraded if need be.

        migrate: False refuses a database that does not exist or has an older schema.

        Raises UserError when it is damaged, out of reach, not ours or newer than this code.
        """
        parsed = parse_url(url)
        path = sqlite_path(parsed)
        if path is not None and (migrate or path.exists()):
            create_file(path)
        elif path is not None:
            raise UserError(
                f"there is no database at {path} yet", hint="`code2lora init` in a repository"
            )
        engine = make_engine(parsed)
        try:
            _ensure_schema(engine, parsed, may_migrate=migrate)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine, clock)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def check(self) -> None:
        """Read the whole database. Raises UserError when any of it is damaged (SQLite only)."""
        if self._engine.dialect.name != "sqlite":
            return
        path = sqlite_path(self._engine.url)
        with self._reading() as db:
            answer = db.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
            if answer != "ok":
                raise damaged(path, str(answer).splitlines()[-1])
            broken = db.exec_driver_sql("PRAGMA foreign_key_check").first()
            if broken is not None:
                raise damaged(path, f"a row of {broken[0]} refers to a missing row of {broken[2]}")

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        """Yield a connection that sees one moment of the database."""
        with self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """Yield a connection in a write transaction: all of it happens, or nothing."""
        with self._engine.connect() as connection:
            connection = connection.execution_options(**{WRITES: True})
            with connection.begin():
                yield connection

    def _all(self, record: type[T], query: Select[Any]) -> list[T]:
        with self._reading() as db:
            return [to_record(record, row) for row in db.execute(query)]

    def _first(self, record: type[T], query: Select[Any]) -> T | None:
        with self._reading() as db:
            return first(db, record, query)


def _ensure_schema(engine: Engine, url: URL, *, may_migrate: bool) -> None:
    with engine.connect() as connection:
        if is_current(connection) and _is_shareable(connection):
            return
        revision = stored_revision(connection)
    if not may_migrate:
        raise UserError(
            f"the database has {f'the old schema {revision}' if revision else 'no schema yet'}",
            hint="`code2lora status` upgrades it",
        )
    engine.dispose()  # an idle connection would keep SQLite from turning WAL on
    migrate(url)


def _is_shareable(connection: Connection) -> bool:
    """Tell whether readers and a writer can be at work together."""
    if connection.dialect.name != "sqlite":
        return True
    return bool(connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal")


def columns_of(record: type[Any], *tables: Table) -> list[Column[Any]]:
    """Return one column for each field of a record, from the first table that has it."""
    return [next(t.c[f.name] for t in tables if f.name in t.c) for f in fields(record)]


def to_record(record: type[T], row: Row[Any]) -> T:
    """Return a row as a record with the same names."""
    return record(**row._mapping)


def first(db: Connection, record: type[T], query: Select[Any]) -> T | None:
    """Return the first row as a record; None when there is none."""
    row = db.execute(query).first()
    return None if row is None else to_record(record, row)


def in_batches(values: Iterable[T], size: int = MAX_VALUES) -> Iterator[list[T]]:
    """Yield lists of at most `size` values."""
    rest = iter(values)
    while batch := list(islice(rest, size)):
        yield batch


def insert_missing(
    db: Connection,
    table: Table,
    key: Column[Any],
    rows: list[dict[str, Any]],
    *within: ColumnElement[bool],
) -> None:
    """Insert the rows whose `key` (in the part of the table that `within` selects) is new.

    On a server another writer may insert the same key between the look and the insert. Then look
    again, because that writer has committed.
    """
    rows = sorted(rows, key=lambda row: str(row[key.name]))  # one order, so that none deadlock
    for batch in in_batches(rows):
        look = select(key).where(key.in_([row[key.name] for row in batch]), *within)
        known = set(db.scalars(look))
        while missing := [row for row in batch if row[key.name] not in known]:
            try:
                with db.begin_nested():
                    db.execute(table.insert(), missing)
                break
            except IntegrityError:
                seen = set(db.scalars(look))
                if seen == known:  # not a matter of who was faster
                    raise
                known = seen
