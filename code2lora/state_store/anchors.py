"""Checkpoints, and the anchors that chains of states start from."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from code2lora.state_store.database import Database, columns_of, first, insert_missing
from code2lora.state_store.records import Anchor, AnchorRole, BackfillProgress, Checkpoint
from code2lora.state_store.repositories import lock_repository
from code2lora.state_store.schema import anchors, checkpoints, states

ANSWERING: tuple[AnchorRole, ...] = ("active", "provisional")
"""Roles of the anchors whose states answer look-ups, the preferred first."""

_CHECKPOINT = select(*columns_of(Checkpoint, checkpoints))
_ANCHOR = select(*columns_of(Anchor, anchors))


class Anchors(Database):
    """Where the states of a repository start, one set of anchors for each checkpoint."""

    def register_checkpoint(
        self,
        fingerprint: str,
        *,
        encoder_fingerprint: str,
        name: str,
        base_model: str,
        config: dict[str, Any],
    ) -> Checkpoint:
        """Return the checkpoint with this fingerprint, stored at its first use."""
        row = {
            "fingerprint": fingerprint,
            "encoder_fingerprint": encoder_fingerprint,
            "name": name,
            "base_model": base_model,
            "config": config,
            "first_used_at": self._now(),
        }
        this = checkpoints.c.fingerprint == fingerprint
        with self._writing() as db:
            insert_missing(db, checkpoints, checkpoints.c.fingerprint, [row])
            checkpoint = first(db, Checkpoint, _CHECKPOINT.where(this))
            assert checkpoint is not None
            return checkpoint

    def checkpoint(self, fingerprint: str) -> Checkpoint | None:
        """Return one checkpoint."""
        return self._first(Checkpoint, _CHECKPOINT.where(checkpoints.c.fingerprint == fingerprint))

    def checkpoints(self) -> list[Checkpoint]:
        """Return every checkpoint ever used, oldest first."""
        return self._all(Checkpoint, _CHECKPOINT.order_by(checkpoints.c.first_used_at))

    def add_anchor(
        self,
        repository_id: str,
        checkpoint: str,
        commit: str,
        role: AnchorRole,
        *,
        target_commit: str | None = None,
        total_commits: int | None = None,
    ) -> Anchor:
        """Return the anchor at a commit.

        An anchor that is there already keeps its role and its states, since another one would
        have the same; a retired one is taken back with the role given.
        Raises LookupError when there is no such repository.
        """
        now = self._now()
        values = {
            "role": role,
            "target_commit": target_commit,
            "total_commits": total_commits,
            "updated_at": now,
        }
        key = {"repository_id": repository_id, "checkpoint": checkpoint, "commit": commit}
        this = [anchors.c[name] == value for name, value in key.items()]
        with self._writing() as db:
            lock_repository(db, repository_id)
            known = first(db, Anchor, _ANCHOR.where(*this))
            if known is None:
                db.execute(insert(anchors).values(**key, **values, created_at=now))
            elif known.role == "retired":
                db.execute(update(anchors).where(*this).values(values))
            anchor = first(db, Anchor, _ANCHOR.where(*this))
            assert anchor is not None
            return anchor

    def anchor(self, anchor_id: int) -> Anchor | None:
        """Return one anchor."""
        return self._first(Anchor, _ANCHOR.where(anchors.c.id == anchor_id))

    def anchors(
        self, repository_id: str, checkpoint: str, *, roles: tuple[AnchorRole, ...] | None = None
    ) -> list[Anchor]:
        """Return a repository's anchors under a checkpoint, all or those in some roles."""
        query = _ANCHOR.where(
            anchors.c.repository_id == repository_id, anchors.c.checkpoint == checkpoint
        )
        if roles is not None:
            query = query.where(anchors.c.role.in_(roles))
        return self._all(Anchor, query.order_by(anchors.c.id))

    def active_anchors(self, repository_id: str, checkpoint: str) -> list[Anchor]:
        """Return the anchors whose states answer look-ups: the active and the provisional ones."""
        return self.anchors(repository_id, checkpoint, roles=ANSWERING)

    def activate_anchor(self, anchor_id: int) -> Anchor:
        """Let an anchor's states answer look-ups, in place of the provisional anchors'.

        Raises LookupError when the anchor is gone or retired.
        """
        with self._writing() as db:
            anchor = lock_anchor(db, anchor_id)
            _set_role(db, [anchor_id], "active", self._now())
            others = (
                anchors.c.repository_id == anchor.repository_id,
                anchors.c.checkpoint == anchor.checkpoint,
                anchors.c.role == "provisional",
            )
            replaced = list(db.scalars(select(anchors.c.id).where(*others)))
            _retire(db, replaced, self._now())
            activated = first(db, Anchor, _ANCHOR.where(anchors.c.id == anchor_id))
            assert activated is not None
            return activated

    def retire_anchor(self, anchor_id: int) -> None:
        """Take an anchor out of use and delete its states."""
        with self._writing() as db:
            _retire(db, [anchor_id], self._now())

    def backfill_progress(self, repository_id: str, checkpoint: str) -> BackfillProgress | None:
        """Return how far the backfill under way has come; None when there is none."""
        backfill = (
            _ANCHOR.where(
                anchors.c.repository_id == repository_id,
                anchors.c.checkpoint == checkpoint,
                anchors.c.role == "backfill",
            )
            .order_by(anchors.c.id.desc())
            .limit(1)
        )
        with self._reading() as db:
            anchor = first(db, Anchor, backfill)
            if anchor is None:
                return None
            columns = (states.c.step, states.c.created_at)
            newest = select(*columns).where(states.c.anchor_id == anchor.id)
            latest = db.execute(newest.order_by(states.c.id.desc()).limit(1)).first()
            return BackfillProgress(
                anchor=anchor,
                done_commits=latest.step if latest else 0,
                latest_at=latest.created_at if latest else None,
            )


def lock_anchor(db: Connection, anchor_id: int) -> Anchor:
    """Return an anchor that no other writer can change until the transaction ends.

    Raises LookupError when it is gone or retired: states under it would never be found.
    """
    lock = _ANCHOR.where(anchors.c.id == anchor_id, anchors.c.role != "retired")
    anchor = first(db, Anchor, lock.with_for_update())
    if anchor is None:
        raise LookupError(f"anchor {anchor_id} is gone or retired")
    return anchor


def _retire(db: Connection, anchor_ids: list[int], now: Any) -> None:
    _set_role(db, anchor_ids, "retired", now)
    db.execute(delete(states).where(states.c.anchor_id.in_(anchor_ids)))


def _set_role(db: Connection, anchor_ids: list[int], role: AnchorRole, now: Any) -> None:
    chosen = anchors.c.id.in_(anchor_ids)
    db.execute(update(anchors).where(chosen).values(role=role, updated_at=now))
