"""record when a file changed

Revision ID: c93d71ae6f58
Revises: 8b26e5f3d014
Create Date: 2025-09-30 08:01:57.046228
"""

import sqlalchemy as sa
from alembic import op

revision = "c93d71ae6f58"
down_revision = "8b26e5f3d014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "workspace_files",
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
    )
    op.execute(f"INSERT INTO applied_revisions (revision) VALUES ('{revision}')")


def downgrade() -> None:
    op.execute(f"DELETE FROM applied_revisions WHERE revision = '{revision}'")
    op.drop_column("workspace_files", "updated_at")
