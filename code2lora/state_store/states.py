"""States and the cached features that they are computed from.

A state that was thinned has a row and no bytes. Whoever wants them starts from `nearest_kept` and
puts what is computed; it goes back into the rows.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, fields
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    case,
    delete,
    func,
    insert,
    literal,
    select,
    update,
)

from code2lora.state_store.anchors import ANSWERING, lock_anchor
from code2lora.state_store.database import (
    Database,
    columns_of,
    first,
    in_batches,
    insert_missing,
    to_record,
)
from code2lora.state_store.engine import damaged, sqlite_path
from code2lora.state_store.records import Anchor, Features, NewState, StateInfo, StoredState
from code2lora.state_store.schema import anchors, checkpoints, features, states

log = logging.getLogger(__name__)

_INFO = select(*columns_of(StateInfo, states, anchors)).join_from(states, anchors)
_STATE = _INFO.add_columns(states.c.state)


class States(Database):
    """The hidden state after each absorbed commit, and what the encoder made of the commit."""

    def put_state(self, anchor_id: int, new: NewState) -> StateInfo:
        """Store a state with its features, in one transaction, and return it as stored.

        A commit that the anchor already has a state for keeps the one it has, unless that was
        thinned. Raises LookupError when the anchor is gone or retired.
        """
        with self._writing() as db:
            self._put(db, anchor_id, [new])
            this = (states.c.anchor_id == anchor_id, states.c.commit == new.commit)
            info = first(db, StateInfo, _INFO.where(*this))
            assert info is not None
            return info

    def put_states(self, anchor_id: int, new: Sequence[NewState]) -> int:
        """Store a run of states, parents before children, in one transaction; for backfills.

        Returns how many were not there yet. Raises LookupError when the anchor is gone or retired.
        """
        with self._writing() as db:
            return self._put(db, anchor_id, new)

    def _put(self, db: Connection, anchor_id: int, new: Sequence[NewState]) -> int:
        now = self._now()
        anchor = lock_anchor(db, anchor_id)
        stored = _links(db, anchor_id, {c for s in new for c in (s.commit, s.parent) if c})
        rows: list[dict[str, Any]] = []
        for state in new:
            if state.commit not in stored:
                _check_link(anchor, state, stored)
                stored[state.commit] = _Link(state.step, state.provisional, None)
                rows.append(_state_row(anchor_id, state, now))
            elif (known := stored[state.commit]).thinned_sha256 is not None:
                _put_back(db, anchor_id, state, known.thinned_sha256)
        if rows:
            db.execute(insert(states), rows)
        cached = [
            Features(key=s.diff_key, blob=s.features, n_tokens=s.n_tokens)
            for s in new
            if s.diff_key is not None and s.features is not None
        ]
        if cached:
            of_checkpoint = checkpoints.c.fingerprint == anchor.checkpoint
            encoder = db.scalars(select(checkpoints.c.encoder_fingerprint).where(of_checkpoint))
            _put_features(db, encoder.one(), cached, now)
        return len(rows)

    def find_state(self, repository_id: str, checkpoint: str, commit: str) -> StoredState | None:
        """Return the state of a commit, from whichever anchor answers for it; None if thinned.

        Raises UserError when the stored bytes are damaged.
        """
        query = _STATE.where(*_answering(repository_id, checkpoint), states.c.commit == commit)
        return self._stored(query.order_by(*_PREFERRED))

    def state_at(self, anchor_id: int, commit: str) -> StoredState | None:
        """Return the state of a commit under one anchor of any role; None if it was thinned."""
        this = (states.c.anchor_id == anchor_id, states.c.commit == commit)
        return self._stored(_STATE.where(*this))

    def nearest_kept(self, anchor_id: int, commit: str) -> StoredState | None:
        """Return the state of a commit or, if it was thinned, its nearest ancestor's that was not.

        None when the anchor has no row of the commit.
        """
        columns = (states.c.id, states.c.anchor_id, states.c.parent)
        thinned = states.c.state.is_(None).label("thinned")
        this = (states.c.anchor_id == anchor_id, states.c.commit == commit)
        chain = select(*columns, thinned).where(*this).cte("chain", recursive=True)
        chain = chain.union_all(
            select(*columns, thinned).where(
                chain.c.thinned,
                states.c.anchor_id == chain.c.anchor_id,
                states.c.commit == chain.c.parent,
            )
        )
        return self._stored(_STATE.join(chain, chain.c.id == states.c.id).where(~chain.c.thinned))

    def latest_state(self, anchor_id: int) -> StoredState | None:
        """Return the newest step under one anchor: where an interrupted backfill goes on."""
        steps = (
            states.c.anchor_id == anchor_id,
            ~states.c.provisional,
            states.c.state.is_not(None),
        )
        newest = select(func.max(states.c.id)).where(*steps)
        return self._stored(_STATE.where(states.c.id == newest.scalar_subquery()))

    def _stored(self, query: Select[Any]) -> StoredState | None:
        with self._reading() as db:
            row = db.execute(query.limit(1)).first()
        if row is None or row.state is None:
            return None
        info, state = _info(row), bytes(row.state)
        if hashlib.sha256(state).hexdigest() != info.state_sha256:
            what = f"the state of commit {info.commit} has changed since it was stored"
            raise damaged(sqlite_path(self._engine.url), what)
        return StoredState(info=info, state=state)

    def known_commits(
        self, repository_id: str, checkpoint: str, commits: Iterable[str]
    ) -> set[str]:
        """Return those of the commits that have a state, thinned or not."""
        return self._known(_answering(repository_id, checkpoint), commits)

    def _known(self, where: Sequence[ColumnElement[bool]], commits: Iterable[str]) -> set[str]:
        query = select(states.c.commit).join_from(states, anchors).where(*where)
        known: set[str] = set()
        with self._reading() as db:
            for batch in in_batches(commits):
                known.update(db.scalars(query.where(states.c.commit.in_(batch))))
        return known

    def state_infos(
        self, repository_id: str, checkpoint: str, commits: Iterable[str]
    ) -> dict[str, StateInfo]:
        """Return what is known of the commits' states, for those that have one."""
        query = _INFO.where(*_answering(repository_id, checkpoint))
        best_last = [column.desc() for column in _PREFERRED]
        infos: dict[str, StateInfo] = {}
        with self._reading() as db:
            for batch in in_batches(commits):
                rows = db.execute(query.where(states.c.commit.in_(batch)).order_by(*best_last))
                infos.update((row.commit, to_record(StateInfo, row)) for row in rows)
        return infos

    def lineage(
        self, repository_id: str, checkpoint: str, commit: str, *, limit: int
    ) -> list[StateInfo]:
        """Return the states from a commit back towards its anchor, newest first.

        Empty when the commit has no state.
        """
        start = select(states.c.id).join_from(states, anchors)
        start = start.where(*_answering(repository_id, checkpoint), states.c.commit == commit)
        with self._reading() as db:
            found = db.scalars(start.order_by(*_PREFERRED).limit(1)).first()
            if found is None:
                return []
            chain = (
                select(states.c.id, states.c.anchor_id, states.c.parent, literal(1).label("depth"))
                .where(states.c.id == found)
                .cte("chain", recursive=True)
            )
            chain = chain.union_all(
                select(states.c.id, states.c.anchor_id, states.c.parent, chain.c.depth + 1).where(
                    states.c.anchor_id == chain.c.anchor_id,
                    states.c.commit == chain.c.parent,
                    chain.c.depth < limit,
                )
            )
            query = _INFO.join(chain, chain.c.id == states.c.id).order_by(chain.c.depth)
            return [to_record(StateInfo, row) for row in db.execute(query)]

    def recent_states(self, repository_id: str, *, limit: int) -> list[StateInfo]:
        """Return the states that were stored last, under any checkpoint, newest first."""
        chosen = select(anchors.c.id).where(
            anchors.c.repository_id == repository_id, anchors.c.role.in_(ANSWERING)
        )
        newest = select(states.c.id).where(states.c.anchor_id.in_(chosen))
        newest = newest.order_by(states.c.id.desc()).limit(limit)  # from the index alone
        query = _INFO.where(states.c.id.in_(newest)).order_by(states.c.id.desc())
        return self._all(StateInfo, query)

    def get_features(self, encoder_fingerprint: str, keys: Iterable[str]) -> dict[str, Features]:
        """Return the cached features by key, for those that are there."""
        query = select(*columns_of(Features, features)).where(
            features.c.encoder_fingerprint == encoder_fingerprint
        )
        found: dict[str, Features] = {}
        with self._reading() as db:
            for batch in in_batches(keys):
                for row in db.execute(query.where(features.c.key.in_(batch))):
                    found[row.key] = to_record(Features, row)
        return found

    def put_features(self, encoder_fingerprint: str, new: Collection[Features]) -> None:
        """Cache features; a key that is there keeps what it has."""
        with self._writing() as db:
            _put_features(db, encoder_fingerprint, new, self._now())

    def delete_unused_features(self, *, created_before: datetime) -> int:
        """Delete the features that no state was advanced with, and return how many.

        created_before: younger ones may belong to a commit that is being absorbed.
        """
        used = (
            select(checkpoints.c.encoder_fingerprint, states.c.diff_key)
            .join_from(states, anchors)
            .join(checkpoints)
            .where(states.c.diff_key.is_not(None))
            .subquery()
        )
        unused = (
            features.c.created_at < created_before,
            ~select(used)
            .where(
                used.c.encoder_fingerprint == features.c.encoder_fingerprint,
                used.c.diff_key == features.c.key,
            )
            .exists(),
        )
        with self._writing() as db:
            return db.execute(delete(features).where(*unused)).rowcount


_PREFERRED = (
    # Where two anchors have a state for one commit: the settled anchor, then the nearest.
    case({role: rank for rank, role in enumerate(ANSWERING)}, value=anchors.c.role),
    states.c.step,
    anchors.c.id,
)


def _answering(repository_id: str, checkpoint: str) -> list[ColumnElement[bool]]:
    return [
        anchors.c.repository_id == repository_id,
        anchors.c.checkpoint == checkpoint,
        anchors.c.role.in_(ANSWERING),
    ]


def _info(row: Row[Any]) -> StateInfo:
    return StateInfo(**{field.name: row._mapping[field.name] for field in fields(StateInfo)})


class _Link(NamedTuple):
    """What the states after one must know of it."""

    step: int
    provisional: bool
    thinned_sha256: str | None
    """What its bytes were; None where they are there."""


def _links(db: Connection, anchor_id: int, commits: set[str]) -> dict[str, _Link]:
    """Return the link of each commit that has a state under the anchor."""
    thinned = case((states.c.state.is_(None), states.c.state_sha256)).label("thinned")
    columns = (states.c.commit, states.c.step, states.c.provisional, thinned)
    query = select(*columns).where(states.c.anchor_id == anchor_id)
    links: dict[str, _Link] = {}
    for batch in in_batches(commits):
        rows = db.execute(query.where(states.c.commit.in_(batch)))
        links.update((row.commit, _Link(row.step, row.provisional, row.thinned)) for row in rows)
    return links


def _check_link(anchor: Anchor, state: NewState, stored: dict[str, _Link]) -> None:
    """Assert that a state continues a chain that reaches its anchor."""
    if state.parent is None:
        assert state.commit == anchor.commit and state.step == 0 and not state.provisional, (
            f"{state.commit} has no parent, but the anchor is {anchor.commit}"
        )
    else:
        parent = stored.get(state.parent)
        assert parent is not None and parent.step < state.step and not parent.provisional, (
            f"{state.commit} is step {state.step}, but its parent {state.parent} is {parent}"
        )


def _state_row(anchor_id: int, state: NewState, now: datetime) -> dict[str, Any]:
    row = asdict(state)
    del row["features"]
    row["state_sha256"] = hashlib.sha256(state.state).hexdigest()
    return row | {"anchor_id": anchor_id, "created_at": now}


def _put_back(db: Connection, anchor_id: int, state: NewState, before: str) -> None:
    """Give a thinned state its bytes again.

    They are those that it had, as long as the same code on the same machine computes them. What
    another version of torch or another device rounds differently is as good a state as it was; so
    it is taken, and the digest with it, which always tells the bytes that are there. The states
    after it stay: they are no worse for what they came from. Nor are adapters made again.
    """
    digest = hashlib.sha256(state.state).hexdigest()
    if digest != before:
        log.warning(
            "the state of commit %s is now %s, but was %s: computed by other versions or on "
            "another device",
            *(state.commit, digest[:12], before[:12]),
        )
    this = (states.c.anchor_id == anchor_id, states.c.commit == state.commit)
    db.execute(update(states).where(*this).values(state=state.state, state_sha256=digest))


def _put_features(
    db: Connection, encoder_fingerprint: str, new: Iterable[Features], now: datetime
) -> None:
    rows = {
        f.key: asdict(f) | {"encoder_fingerprint": encoder_fingerprint, "created_at": now}
        for f in new
    }
    of_encoder = features.c.encoder_fingerprint == encoder_fingerprint
    insert_missing(db, features, features.c.key, list(rows.values()), of_encoder)
