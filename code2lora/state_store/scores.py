"""What each commit's added lines cost the base model and the adapters, before it was told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from sqlalchemy import Connection, insert, select

from code2lora.state_store.database import Database, columns_of, first, in_batches, to_record
from code2lora.state_store.records import NewScore, Score, Use
from code2lora.state_store.repositories import lock_repository
from code2lora.state_store.schema import scores

_SCORE = select(*columns_of(Score, scores))

_REWRITES = 8
"""How often one patch may be rewritten before fewer scores are found than asked for."""


class Scores(Database):
    """Scores of commits, one for each commit and checkpoint. Losing them loses no state."""

    def add_score(self, new: NewScore) -> Score:
        """Store a commit's score and return it; a commit that has one keeps it.

        Raises LookupError when there is no such repository.
        """
        with self._writing() as db:
            lock_repository(db, new.repository_id)
            known = _score_of(db, new)
            if known is None:
                db.execute(insert(scores).values(asdict(new) | {"scored_at": self._now()}))
                known = _score_of(db, new)
            assert known is not None
            return known

    def scores(
        self, repository_id: str, checkpoint: str, commits: Iterable[str]
    ) -> dict[str, Score]:
        """Return the scores of the commits, for those that have one."""
        of_them = (scores.c.repository_id == repository_id, scores.c.checkpoint == checkpoint)
        query = _SCORE.where(*of_them)
        found: dict[str, Score] = {}
        with self._reading() as db:
            for batch in in_batches(commits):
                rows = db.execute(query.where(scores.c.commit.in_(batch)))
                found.update((row.commit, to_record(Score, row)) for row in rows)
        return found

    def recent_scores(self, repository_id: str, checkpoint: str, *, limit: int) -> list[Score]:
        """Return the scores that were stored last and asked for anything, newest first.

        What was asked twice, because its commit was rewritten, counts once: the last time.
        """
        of_them = (scores.c.repository_id == repository_id, scores.c.checkpoint == checkpoint)
        query = _SCORE.where(*of_them, scores.c.n_tokens > 0).order_by(scores.c.id.desc())
        query = query.limit(limit * _REWRITES)
        found: dict[str, Score] = {}
        with self._reading() as db:
            for row in db.execute(query):
                if len(found) == limit:
                    break
                found.setdefault(row.rows_sha256, to_record(Score, row))
        return list(found.values())

    def gate_use(self, repository_id: str, checkpoint: str) -> Use:
        """Return what the gate serves since the last score; before the first, the own adapter."""
        of_them = (scores.c.repository_id == repository_id, scores.c.checkpoint == checkpoint)
        newest = select(scores.c.use).where(*of_them).order_by(scores.c.id.desc()).limit(1)
        with self._reading() as db:
            use: Use | None = db.execute(newest).scalar()
        return use or "own"


def _score_of(db: Connection, new: NewScore) -> Score | None:
    this = (
        scores.c.repository_id == new.repository_id,
        scores.c.checkpoint == new.checkpoint,
        scores.c.commit == new.commit,
    )
    return first(db, Score, _SCORE.where(*this))
