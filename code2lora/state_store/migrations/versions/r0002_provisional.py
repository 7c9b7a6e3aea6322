"""States that serve for commits which are no steps of their checkpoint's stream."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Mark provisional states; those that are there are none."""
    column: sa.Column[bool] = sa.Column(
        "provisional", sa.Boolean(), nullable=False, server_default=sa.false()
    )
    if op.get_bind().dialect.name != "sqlite":
        op.add_column("states", column)
        return
    # SQLite adds a column last, after `state`, through whose bytes it would then have to read.
    with op.batch_alter_table("states", recreate="always") as table:
        table.add_column(column, insert_before="state_sha256")
