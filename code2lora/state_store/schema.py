"""The tables, and the number of the migration that makes them.

A change here needs a new file in migrations/versions and the next SCHEMA_REVISION; a test
compares the tables with what the migrations build.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)
from sqlalchemy.types import TypeDecorator

SCHEMA_REVISION = "0004"
"""The newest file in migrations/versions. Revisions are decimal numbers that only grow."""

HASH_LENGTH = 128
"""Longest commit, fingerprint or content key: two sha256 in hexadecimal."""


class UtcDateTime(TypeDecorator[datetime]):
    """An instant: aware datetimes in and out, kept in UTC by databases without a zoned type."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the instant in UTC. A naive datetime is a bug of the caller."""
        if value is None:
            return None
        assert value.tzinfo is not None, f"naive datetime {value!r}"
        return value.astimezone(UTC)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Return the instant in UTC, whatever zone the database session has."""
        if value is None:
            return None
        moment: datetime = value
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


class FilePath(TypeDecorator[str]):
    """An absolute path, exactly; one that is not UTF-8 is kept percent-encoded behind a mark."""

    impl = Text
    cache_ok = True
    mark = "percent:"

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Return what a database can keep."""
        if value is None or value.isascii():
            return value
        try:
            value.encode()
        except UnicodeEncodeError:
            return self.mark + quote_from_bytes(os.fsencode(value))
        return value

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        """Return the path as Python spells it."""
        if value is not None and value.startswith(self.mark):
            return os.fsdecode(unquote_to_bytes(value.removeprefix(self.mark)))
        text: str | None = value
        return text


class DisplayText(TypeDecorator[str]):
    """Text for people: what a database cannot keep becomes a question mark."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Return the text without lone surrogates (from undecodable bytes) and without NUL."""
        return value and value.encode("utf-8", "replace").decode().replace("\0", "?")


metadata = MetaData(
    # Named constraints, because SQLite can only alter a constraint that has a name.
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _repository(*, nullable: bool = False) -> Column[Any]:
    key = ForeignKey("repositories.id", ondelete="CASCADE")
    return Column("repository_id", String(32), key, nullable=nullable)


repositories = Table(
    "repositories",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("path", FilePath, nullable=False),
    Column("name", DisplayText, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("removed_at", UtcDateTime),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("fingerprint", String(HASH_LENGTH), primary_key=True),
    Column("encoder_fingerprint", String(HASH_LENGTH), nullable=False),
    Column("name", DisplayText, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("config", JSON, nullable=False),
    Column("first_used_at", UtcDateTime, nullable=False),
)

anchors = Table(
    "anchors",
    metadata,
    Column("id", Integer, primary_key=True),
    _repository(),
    Column(
        "checkpoint", String(HASH_LENGTH), ForeignKey("checkpoints.fingerprint"), nullable=False
    ),
    Column("commit", String(HASH_LENGTH), nullable=False),
    Column("role", String(16), nullable=False),
    Column("target_commit", String(HASH_LENGTH)),
    Column("total_commits", Integer),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    # The state at an anchor is a function of the snapshot alone: a second one would be the same.
    UniqueConstraint("repository_id", "checkpoint", "commit"),
    CheckConstraint("role IN ('provisional', 'backfill', 'active', 'retired')", name="role"),
)

states = Table(
    "states",
    metadata,
    Column("id", Integer, primary_key=True),
    # Repository and checkpoint are the anchor's; said once, they cannot disagree.
    Column("anchor_id", Integer, ForeignKey("anchors.id", ondelete="CASCADE"), nullable=False),
    Column("commit", String(HASH_LENGTH), nullable=False),
    Column("parent", String(HASH_LENGTH)),
    Column("step", Integer, nullable=False),
    Column("provisional", Boolean, nullable=False, server_default=false()),
    Column("state_sha256", String(64), nullable=False),
    Column("diff_key", String(HASH_LENGTH)),
    Column("n_tokens", Integer, nullable=False),
    Column("n_changed_files", Integer, nullable=False),
    Column("embed_ms", Float, nullable=False),
    Column("advance_ms", Float, nullable=False),
    Column("drift", Float),
    Column("committed_at", UtcDateTime, nullable=False),
    Column("summary", DisplayText, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    # Last, so that SQLite need not read through the overflow pages to get at the columns above.
    # None once it has been thinned: it is computed again from an ancestor's when it is wanted.
    Column("state", LargeBinary),
    UniqueConstraint("anchor_id", "commit"),
    Index(None, "diff_key"),
)

features = Table(
    "features",
    metadata,
    Column("encoder_fingerprint", String(HASH_LENGTH), primary_key=True),
    Column("key", String(HASH_LENGTH), primary_key=True),
    Column("n_tokens", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("blob", LargeBinary, nullable=False),
)

adapters = Table(
    "adapters",
    metadata,
    Column("id", Integer, primary_key=True),
    _repository(),
    # A state that is replaced leaves the adapters made from it, which may still be serving.
    Column("state_id", Integer, ForeignKey("states.id", ondelete="SET NULL"), index=True),
    Column(
        "checkpoint", String(HASH_LENGTH), ForeignKey("checkpoints.fingerprint"), nullable=False
    ),
    Column("commit", String(HASH_LENGTH), nullable=False),
    Column("generation", Integer, nullable=False),
    Column("path", FilePath, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("n_bytes", BigInteger, nullable=False),
    Column("generate_ms", Float, nullable=False),
    Column("write_ms", Float, nullable=False),
    Column("published_at", UtcDateTime, nullable=False),
    Column("pruned_at", UtcDateTime),
    Column("use", String(8), nullable=False, server_default="own"),
    UniqueConstraint("repository_id", "generation"),
)

scores = Table(
    "scores",
    metadata,
    Column("id", Integer, primary_key=True),
    _repository(),
    Column(
        "checkpoint", String(HASH_LENGTH), ForeignKey("checkpoints.fingerprint"), nullable=False
    ),
    Column("commit", String(HASH_LENGTH), nullable=False),
    # No reference to the state, which a replay may replace: the score stays what it was.
    Column("told", String(HASH_LENGTH), nullable=False),
    Column("state_sha256", String(64), nullable=False),
    Column("rows_sha256", String(64), nullable=False),
    Column("n_rows", Integer, nullable=False),
    Column("n_tokens", Integer, nullable=False),
    Column("base_nats", Float, nullable=False),
    Column("generic_nats", Float, nullable=False),
    Column("own_nats", Float, nullable=False),
    Column("use", String(8), nullable=False),
    Column("took_ms", Float, nullable=False),
    Column("scored_at", UtcDateTime, nullable=False),
    UniqueConstraint("repository_id", "checkpoint", "commit"),
)

worktrees = Table(
    "worktrees",
    metadata,
    Column("id", Integer, primary_key=True),
    _repository(),
    Column("git_dir", FilePath, nullable=False, unique=True),
    Column("path", FilePath),
    Column("head_commit", String(HASH_LENGTH)),
    Column("head_branch", DisplayText),
    Column("live_adapter_id", Integer, ForeignKey("adapters.id", ondelete="SET NULL")),
    Column("updated_at", UtcDateTime, nullable=False),
    Index(None, "repository_id"),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    _repository(nullable=True),
    Column("worktree_id", Integer, ForeignKey("worktrees.id", ondelete="SET NULL")),
    Column("kind", String(32), nullable=False),
    Column("detail", JSON, nullable=False),
    Index(None, "repository_id", "kind"),
)

failures = Table(
    "failures",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Column("first_at", UtcDateTime, nullable=False),
    Column("n_times", Integer, nullable=False),
    _repository(),
    Column("worktree_id", Integer, ForeignKey("worktrees.id", ondelete="SET NULL")),
    Column("commit", String(HASH_LENGTH)),
    Column("stage", String(32), nullable=False),
    Column("message", DisplayText, nullable=False),
    Column("hint", DisplayText),
    Column("resolved_at", UtcDateTime),
    Index(None, "repository_id"),
)
