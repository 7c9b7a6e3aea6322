"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create every table."""
    _create_checkpoints_and_features()
    _create_repositories()
    _create_states()
    _create_adapters_and_worktrees()
    _create_journal()


def _create_checkpoints_and_features() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("fingerprint", sa.String(length=128), nullable=False),
        sa.Column("encoder_fingerprint", sa.String(length=128), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("first_used_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("fingerprint", name="pk_checkpoints"),
    )
    op.create_table(
        "features",
        sa.Column("encoder_fingerprint", sa.String(length=128), nullable=False),
        sa.Column("key", sa.String(length=128), nullable=False),
        sa.Column("n_tokens", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("blob", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("encoder_fingerprint", "key", name="pk_features"),
    )


def _create_repositories() -> None:
    op.create_table(
        "repositories",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_repositories"),
    )


def _create_states() -> None:
    op.create_table(
        "anchors",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("repository_id", sa.String(length=32), nullable=False),
        sa.Column("checkpoint", sa.String(length=128), nullable=False),
        sa.Column("commit", sa.String(length=128), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("target_commit", sa.String(length=128), nullable=True),
        sa.Column("total_commits", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "role IN ('provisional', 'backfill', 'active', 'retired')", name=op.f("ck_anchors_role")
        ),
        sa.ForeignKeyConstraint(
            ["checkpoint"], ["checkpoints.fingerprint"], name="fk_anchors_checkpoint"
        ),
        sa.ForeignKeyConstraint(
            ["repository_id"],
            ["repositories.id"],
            name="fk_anchors_repository_id",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_anchors"),
        sa.UniqueConstraint(
            "repository_id",
            "checkpoint",
            "commit",
            name="uq_anchors_repository_id_checkpoint_commit",
        ),
    )
    op.create_table(
        "states",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("anchor_id", sa.Integer(), nullable=False),
        sa.Column("commit", sa.String(length=128), nullable=False),
        sa.Column("parent", sa.String(length=128), nullable=True),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("state_sha256", sa.String(length=64), nullable=False),
        sa.Column("diff_key", sa.String(length=128), nullable=True),
        sa.Column("n_tokens", sa.Integer(), nullable=False),
        sa.Column("n_changed_files", sa.Integer(), nullable=False),
        sa.Column("embed_ms", sa.Float(), nullable=False),
        sa.Column("advance_ms", sa.Float(), nullable=False),
        sa.Column("drift", sa.Float(), nullable=True),
        sa.Column("committed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("summary", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("state", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["anchor_id"], ["anchors.id"], name="fk_states_anchor_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_states"),
        sa.UniqueConstraint("anchor_id", "commit", name="uq_states_anchor_id_commit"),
    )


def _create_adapters_and_worktrees() -> None:
    op.create_table(
        "adapters",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("repository_id", sa.String(length=32), nullable=False),
        sa.Column("state_id", sa.Integer(), nullable=True),
        sa.Column("checkpoint", sa.String(length=128), nullable=False),
        sa.Column("commit", sa.String(length=128), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("n_bytes", sa.BigInteger(), nullable=False),
        sa.Column("generate_ms", sa.Float(), nullable=False),
        sa.Column("write_ms", sa.Float(), nullable=False),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("pruned_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["checkpoint"], ["checkpoints.fingerprint"], name="fk_adapters_checkpoint"
        ),
        sa.ForeignKeyConstraint(
            ["repository_id"],
            ["repositories.id"],
            name="fk_adapters_repository_id",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["state_id"], ["states.id"], name="fk_adapters_state_id", ondelete="SET NULL"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_adapters"),
        sa.UniqueConstraint(
            "repository_id", "generation", name="uq_adapters_repository_id_generation"
        ),
    )
    op.create_index("ix_adapters_state_id", "adapters", ["state_id"])
    op.create_table(
        "worktrees",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("repository_id", sa.String(length=32), nullable=False),
        sa.Column("git_dir", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=True),
        sa.Column("head_commit", sa.String(length=128), nullable=True),
        sa.Column("head_branch", sa.Text(), nullable=True),
        sa.Column("live_adapter_id", sa.Integer(), nullable=True),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["live_adapter_id"],
            ["adapters.id"],
            name="fk_worktrees_live_adapter_id",
            ondelete="SET NULL",
        ),
        sa.ForeignKeyConstraint(
            ["repository_id"],
            ["repositories.id"],
            name="fk_worktrees_repository_id",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_worktrees"),
        sa.UniqueConstraint("git_dir", name="uq_worktrees_git_dir"),
    )
    op.create_index("ix_worktrees_repository_id", "worktrees", ["repository_id"])


def _create_journal() -> None:
    op.create_table(
        "events",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("repository_id", sa.String(length=32), nullable=True),
        sa.Column("worktree_id", sa.Integer(), nullable=True),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["repository_id"],
            ["repositories.id"],
            name="fk_events_repository_id",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["worktree_id"], ["worktrees.id"], name="fk_events_worktree_id", ondelete="SET NULL"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
    )
    op.create_index("ix_events_repository_id_kind", "events", ["repository_id", "kind"])
    op.create_table(
        "failures",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("first_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("n_times", sa.Integer(), nullable=False),
        sa.Column("repository_id", sa.String(length=32), nullable=False),
        sa.Column("worktree_id", sa.Integer(), nullable=True),
        sa.Column("commit", sa.String(length=128), nullable=True),
        sa.Column("stage", sa.String(length=32), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("hint", sa.Text(), nullable=True),
        sa.Column("resolved_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["repository_id"],
            ["repositories.id"],
            name="fk_failures_repository_id",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["worktree_id"], ["worktrees.id"], name="fk_failures_worktree_id", ondelete="SET NULL"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_failures"),
    )
    op.create_index("ix_failures_repository_id", "failures", ["repository_id"])
