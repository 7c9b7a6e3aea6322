"""Published adapters, and which of them is live in which worktree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from code2lora.state_store.database import Database, columns_of, first, in_batches, to_record
from code2lora.state_store.journal import insert_event
from code2lora.state_store.records import Adapter, NewAdapter, Sizes, Use
from code2lora.state_store.repositories import lock_repository
from code2lora.state_store.schema import adapters, anchors, states, worktrees

_ADAPTER = select(*columns_of(Adapter, adapters))


class Adapters(Database):
    """Adapter directories that were published, by generation."""

    def add_adapter(self, new: NewAdapter) -> Adapter:
        """Record an adapter directory and return it, with the next generation.

        A directory that is already recorded, and not pruned, keeps its record.
        Raises LookupError when the state that it was made from is gone.
        """
        with self._writing() as db:
            return _add(db, new, self._now())

    def publish(self, worktree_id: int, new: NewAdapter) -> Adapter:
        """Record an adapter directory and make it live in a worktree, in one transaction.

        Raises LookupError when the state or the worktree is gone.
        """
        with self._writing() as db:
            adapter = _add(db, new, self._now())
            _make_live(db, worktree_id, adapter, "published", self._now())
            return adapter

    def set_live(self, worktree_id: int, adapter_id: int | None) -> None:
        """Make a published adapter live in a worktree; None for none.

        Raises LookupError when the worktree or the adapter is gone, or the adapter is pruned.
        """
        with self._writing() as db:
            adapter = None
            if adapter_id is not None:
                usable = (adapters.c.id == adapter_id, adapters.c.pruned_at.is_(None))
                adapter = first(db, Adapter, _ADAPTER.where(*usable).with_for_update())
                if adapter is None:
                    raise LookupError(f"adapter {adapter_id} is gone or pruned")
            _make_live(db, worktree_id, adapter, "switched", self._now())

    def adapter(self, adapter_id: int) -> Adapter | None:
        """Return one adapter, pruned or not."""
        return self._first(Adapter, _ADAPTER.where(adapters.c.id == adapter_id))

    def live_adapter(self, worktree_id: int) -> Adapter | None:
        """Return the adapter that serves a worktree."""
        query = _ADAPTER.join(worktrees, worktrees.c.live_adapter_id == adapters.c.id)
        return self._first(Adapter, query.where(worktrees.c.id == worktree_id))

    def find_adapter(self, state_id: int, use: Use = "own") -> Adapter | None:
        """Return the newest adapter that serves for a state whose directory is still kept.

        use: whose weights it is to have
        """
        this = (adapters.c.state_id == state_id, adapters.c.use == use)
        kept = (*this, adapters.c.pruned_at.is_(None))
        query = _ADAPTER.where(*kept).order_by(adapters.c.generation.desc()).limit(1)
        return self._first(Adapter, query)

    def adapters(
        self, repository_id: str, *, include_pruned: bool = False, limit: int | None = None
    ) -> list[Adapter]:
        """Return a repository's adapters, newest first; all, or the newest `limit`."""
        query = _ADAPTER.where(adapters.c.repository_id == repository_id)
        if not include_pruned:
            query = query.where(adapters.c.pruned_at.is_(None))
        return self._all(Adapter, query.order_by(adapters.c.generation.desc()).limit(limit))

    def newest_adapters(
        self, repository_id: str, checkpoint: str, commits: Iterable[str]
    ) -> dict[str, Adapter]:
        """Return the newest adapter of each commit, pruned or not, for those that had one."""
        these = (adapters.c.repository_id == repository_id, adapters.c.checkpoint == checkpoint)
        query = _ADAPTER.where(*these).order_by(adapters.c.generation)
        found: dict[str, Adapter] = {}
        with self._reading() as db:
            for batch in in_batches(commits):
                rows = db.execute(query.where(adapters.c.commit.in_(batch)))
                found.update((row.commit, to_record(Adapter, row)) for row in rows)
        return found

    def adapters_to_prune(self, repository_id: str, *, keep: int) -> list[Adapter]:
        """Return the adapters beyond the newest `keep` that are live in no worktree."""
        live = select(worktrees.c.live_adapter_id).where(worktrees.c.live_adapter_id.is_not(None))
        kept = (adapters.c.repository_id == repository_id, adapters.c.pruned_at.is_(None))
        newest_first = _ADAPTER.where(*kept).order_by(adapters.c.generation.desc())
        with self._reading() as db:
            in_use = set(db.scalars(live))
            old = [to_record(Adapter, row) for row in db.execute(newest_first.offset(keep))]
        return [adapter for adapter in old if adapter.id not in in_use]

    def mark_pruned(self, adapter_id: int) -> bool:
        """Give an adapter's directory up for deletion; False when it is live, and must stay.

        Mark first and delete then, so that nobody is handed a path that is being deleted.
        """
        with self._writing() as db:
            this = adapters.c.id == adapter_id
            db.execute(select(adapters.c.id).where(this).with_for_update())
            live = select(worktrees.c.id).where(worktrees.c.live_adapter_id == adapter_id)
            if db.execute(live.limit(1)).first() is not None:
                return False
            kept = (this, adapters.c.pruned_at.is_(None))
            db.execute(update(adapters).where(*kept).values(pruned_at=self._now()))
            return True

    def sizes(self, repository_id: str) -> Sizes:
        """Return what a repository's states and kept adapters occupy."""
        of_states = (
            select(
                func.count(),
                func.count(states.c.state),
                func.coalesce(func.sum(func.length(states.c.state)), 0),
            )
            .select_from(states)
            .join(anchors)
            .where(anchors.c.repository_id == repository_id)
        )
        of_adapters = select(func.count(), func.coalesce(func.sum(adapters.c.n_bytes), 0)).where(
            adapters.c.repository_id == repository_id, adapters.c.pruned_at.is_(None)
        )
        with self._reading() as db:
            n_states, n_kept_states, state_bytes = db.execute(of_states).one()
            n_adapters, adapter_bytes = db.execute(of_adapters).one()
        return Sizes(
            n_states=n_states,
            n_kept_states=n_kept_states,
            state_bytes=int(state_bytes),
            n_adapters=n_adapters,
            adapter_bytes=int(adapter_bytes),
        )


def _add(db: Connection, new: NewAdapter, now: datetime) -> Adapter:
    source = (
        select(anchors.c.repository_id, anchors.c.checkpoint, states.c.commit)
        .join_from(states, anchors)
        .where(states.c.id == new.state_id)
        # On a server: nobody deletes the state before the adapter refers to it.
        .with_for_update(read=True, of=states)
    )
    made_from = db.execute(source).first()
    if made_from is None:
        raise LookupError(f"state {new.state_id} is gone")
    lock_repository(db, made_from.repository_id)
    of_repository = adapters.c.repository_id == made_from.repository_id
    same = (of_repository, adapters.c.path == new.path, adapters.c.pruned_at.is_(None))
    again = update(adapters).where(*same).values(state_id=new.state_id, use=new.use)
    if db.execute(again).rowcount == 0:
        newest = select(func.coalesce(func.max(adapters.c.generation), 0)).where(of_repository)
        row = asdict(new) | made_from._asdict()
        row |= {"generation": db.execute(newest).scalar_one() + 1, "published_at": now}
        db.execute(insert(adapters).values(row))
    adapter = first(db, Adapter, _ADAPTER.where(*same))
    assert adapter is not None
    return adapter


def _make_live(
    db: Connection, worktree_id: int, adapter: Adapter | None, kind: str, now: datetime
) -> None:
    this = worktrees.c.id == worktree_id
    columns = (worktrees.c.repository_id, worktrees.c.live_adapter_id)
    worktree = db.execute(select(*columns).where(this).with_for_update()).first()
    if worktree is None:
        raise LookupError(f"worktree {worktree_id} is gone")
    detail: dict[str, Any] = {}
    if adapter is None:
        kind = "withdrawn"
    else:
        assert adapter.repository_id == worktree.repository_id, "an adapter of another repository"
        detail = {"commit": adapter.commit, "generation": adapter.generation}
    live = None if adapter is None else adapter.id
    if live != worktree.live_adapter_id:
        db.execute(update(worktrees).where(this).values(live_adapter_id=live, updated_at=now))
        insert_event(db, now, kind, worktree.repository_id, worktree_id, detail)
