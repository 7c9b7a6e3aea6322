"""What adapters gain: a score for each commit, and whose weights an adapter has."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table of scores; the adapters that are there are all the repositories' own."""
    use: sa.Column[str] = sa.Column(
        "use", sa.String(length=8), nullable=False, server_default="own"
    )
    op.add_column("adapters", use)
    op.create_table(
        "scores",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("repository_id", sa.String(length=32), nullable=False),
        sa.Column("checkpoint", sa.String(length=128), nullable=False),
        sa.Column("commit", sa.String(length=128), nullable=False),
        sa.Column("told", sa.String(length=128), nullable=False),
        sa.Column("state_sha256", sa.String(length=64), nullable=False),
        sa.Column("rows_sha256", sa.String(length=64), nullable=False),
        sa.Column("n_rows", sa.Integer(), nullable=False),
        sa.Column("n_tokens", sa.Integer(), nullable=False),
        sa.Column("base_nats", sa.Float(), nullable=False),
        sa.Column("generic_nats", sa.Float(), nullable=False),
        sa.Column("own_nats", sa.Float(), nullable=False),
        sa.Column("use", sa.String(length=8), nullable=False),
        sa.Column("took_ms", sa.Float(), nullable=False),
        sa.Column("scored_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["repository_id"],
            ["repositories.id"],
            name="fk_scores_repository_id",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["checkpoint"], ["checkpoints.fingerprint"], name="fk_scores_checkpoint"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_scores"),
        sa.UniqueConstraint(
            "repository_id",
            "checkpoint",
            "commit",
            name="uq_scores_repository_id_checkpoint_commit",
        ),
    )
