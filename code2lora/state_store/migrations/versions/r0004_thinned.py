"""States whose bytes are let go: their rows stay."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Let a state have no bytes, and let its features be found; those that are there keep all."""
    with op.batch_alter_table("states") as table:
        table.alter_column("state", existing_type=sa.LargeBinary(), nullable=True)
    op.create_index("ix_states_diff_key", "states", ["diff_key"])
