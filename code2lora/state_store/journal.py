"""What happened and what went wrong."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from code2lora.state_store.database import Database, columns_of, first
from code2lora.state_store.records import Event, Failure
from code2lora.state_store.repositories import lock_repository
from code2lora.state_store.schema import events, failures

SUCCESSES = ("published", "switched")
"""Kinds of the events that leave a worktree with the adapter of its HEAD."""

_EVENT = select(*columns_of(Event, events))
_FAILURE = select(*columns_of(Failure, failures))


class Journal(Database):
    """Events, and failures until they are resolved."""

    def record_event(
        self,
        kind: str,
        *,
        repository_id: str | None = None,
        worktree_id: int | None = None,
        detail: dict[str, Any] | None = None,
    ) -> None:
        """Record that something happened."""
        with self._writing() as db:
            insert_event(db, self._now(), kind, repository_id, worktree_id, detail or {})

    def events(
        self,
        repository_id: str | None = None,
        *,
        kinds: Collection[str] | None = None,
        limit: int = 50,
    ) -> list[Event]:
        """Return the latest events of one repository or of all, newest first."""
        query = _EVENT.order_by(events.c.id.desc()).limit(limit)
        if repository_id is not None:
            query = query.where(events.c.repository_id == repository_id)
        if kinds is not None:
            query = query.where(events.c.kind.in_(kinds))
        return self._all(Event, query)

    def last_success(self, repository_id: str) -> Event | None:
        """Return when an adapter last became live in one of the repository's worktrees."""
        found = self.events(repository_id, kinds=SUCCESSES, limit=1)
        return found[0] if found else None

    def record_failure(
        self,
        repository_id: str,
        stage: str,
        message: str,
        *,
        hint: str | None = None,
        commit: str | None = None,
        worktree_id: int | None = None,
    ) -> Failure:
        """Return the failure as recorded; the same one again, unresolved, is counted.

        Raises LookupError when there is no such repository.
        """
        key = {
            "repository_id": repository_id,
            "worktree_id": worktree_id,
            "commit": commit,
            "stage": stage,
            "message": message,
        }
        this = [failures.c[name].is_not_distinct_from(value) for name, value in key.items()]
        this.append(failures.c.resolved_at.is_(None))
        now = self._now()
        with self._writing() as db:
            lock_repository(db, repository_id)
            again = {"at": now, "hint": hint, "n_times": failures.c.n_times + 1}
            if db.execute(update(failures).where(*this).values(again)).rowcount == 0:
                row = {**key, "hint": hint, "at": now, "first_at": now, "n_times": 1}
                db.execute(insert(failures).values(row))
            failure = first(db, Failure, _FAILURE.where(*this))
            assert failure is not None
            return failure

    def resolve_failures(
        self, repository_id: str, *, worktree_id: int | None = None, stage: str | None = None
    ) -> int:
        """Mark a repository's open failures resolved, or those of a worktree or a stage alone.

        Returns how many there were.
        """
        this = [failures.c.repository_id == repository_id, failures.c.resolved_at.is_(None)]
        if worktree_id is not None:
            this.append(failures.c.worktree_id == worktree_id)
        if stage is not None:
            this.append(failures.c.stage == stage)
        with self._writing() as db:
            return db.execute(
                update(failures).where(*this).values(resolved_at=self._now())
            ).rowcount

    def failures(
        self, repository_id: str, *, include_resolved: bool = False, limit: int = 50
    ) -> list[Failure]:
        """Return the latest failures of a repository, newest first."""
        query = _FAILURE.where(failures.c.repository_id == repository_id)
        if not include_resolved:
            query = query.where(failures.c.resolved_at.is_(None))
        newest = (failures.c.at.desc(), failures.c.id.desc())
        return self._all(Failure, query.order_by(*newest).limit(limit))

    def last_failure(self, repository_id: str) -> Failure | None:
        """Return the latest failure of a repository, resolved or not."""
        found = self.failures(repository_id, include_resolved=True, limit=1)
        return found[0] if found else None

    def prune_journal(self, *, before: datetime) -> int:
        """Delete events and resolved failures older than this, and return how many.

        The latest success of a repository is kept, however old.
        """
        latest = select(func.max(events.c.id)).where(events.c.kind.in_(SUCCESSES))
        kept = latest.group_by(events.c.repository_id)
        old_events = delete(events).where(events.c.at < before, events.c.id.not_in(kept))
        old_failures = delete(failures).where(failures.c.resolved_at < before)
        with self._writing() as db:
            return db.execute(old_events).rowcount + db.execute(old_failures).rowcount


def insert_event(
    db: Connection,
    at: datetime,
    kind: str,
    repository_id: str | None,
    worktree_id: int | None,
    detail: dict[str, Any],
) -> None:
    """Record an event in the transaction of what it tells of."""
    row = {
        "at": at,
        "kind": kind,
        "repository_id": repository_id,
        "worktree_id": worktree_id,
        "detail": detail,
    }
    db.execute(insert(events).values(row))
