"""Let the bytes of old, large states go.

A state can be computed again from an ancestor's. So its row stays and says all that it said, and
its bytes go, with the features that led to it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, delete, func, or_, select, update

from code2lora.state_store.database import Database
from code2lora.state_store.schema import adapters, anchors, features, states, worktrees


class Thinning(Database):
    """What is not kept of states."""

    def anchors_to_thin(self, repository_id: str, *, over_bytes: int) -> list[int]:
        """Return a repository's anchors whose own states are large; those after it are as large."""
        own = (states.c.anchor_id == anchors.c.id) & (states.c.commit == anchors.c.commit)
        query = select(anchors.c.id).join(states, own).order_by(anchors.c.id)
        large = func.length(states.c.state) > over_bytes
        with self._reading() as db:
            return list(db.scalars(query.where(anchors.c.repository_id == repository_id, large)))

    def thin_states(
        self, anchor_id: int, *, keep: int, every: int, over_bytes: int, limit: int
    ) -> int:
        """Let the bytes of some old states go, in one transaction, and return how many states'.

        keep: so many of the newest stay, and what these were advanced from
        every: of the older ones, the first in each stretch of so many commits stays, so that none
            is ever further from one that has its bytes; so do the anchor's own, and those that a
            worktree stands on or is served from
        over_bytes: smaller states, and smaller features, stay for ever
        limit: of states in one transaction; what is left over is for the next call

        The features that led to a thinned state go with it, unless a kept one shares them.
        """
        large = func.length(states.c.state) > over_bytes
        old = _thinnable(anchor_id, keep, every).where(large).order_by(states.c.id)
        with self._reading() as db:  # which takes longer, and keeps no writer waiting
            rows = db.execute(old.limit(limit)).all()
        if not rows:
            return 0
        with self._writing() as db:
            these = states.c.id.in_([row.id for row in rows])
            db.execute(update(states).where(these).values(state=None))
            keys = {row.diff_key for row in rows}
            shared = (states.c.diff_key.in_(keys), states.c.state.is_not(None))
            keys -= set(db.scalars(select(states.c.diff_key).where(*shared)))
            large = func.length(features.c.blob) > over_bytes
            db.execute(delete(features).where(features.c.key.in_(keys), large))
            return len(rows)


def _thinnable(anchor_id: int, keep: int, every: int) -> Select[Any]:
    """Return the query of the states, large or small, that `thin_states` need not keep."""
    newest = select(states.c.id, states.c.parent).where(states.c.anchor_id == anchor_id)
    newest = newest.order_by(states.c.id.desc()).limit(keep)
    recent = newest.subquery()
    served = (
        select(adapters.c.state_id)
        .join(worktrees, worktrees.c.live_adapter_id == adapters.c.id)
        .where(adapters.c.state_id.is_not(None))
    )
    heads = select(worktrees.c.head_commit).where(worktrees.c.head_commit.is_not(None))
    before = states.alias("before")
    # An anchor has no parent, and so is none of these.
    parent = (before.c.anchor_id == states.c.anchor_id) & (before.c.commit == states.c.parent)
    return (
        select(states.c.id, states.c.diff_key)
        .join(before, parent)
        .where(
            states.c.anchor_id == anchor_id,
            states.c.id < select(func.min(recent.c.id)).scalar_subquery(),
            states.c.commit.not_in(select(recent.c.parent).where(recent.c.parent.is_not(None))),
            states.c.commit.not_in(heads),
            states.c.id.not_in(served),
            or_(states.c.provisional, states.c.step // every == before.c.step // every),
        )
    )
