"""Index the modules by path."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Not concurrently: the table is new with this tree, and a failure in a transaction leaves nothing behind.
    op.create_index(
        "ix_workspace_files_modules",
        "workspace_files",
        ["path"],
        postgresql_where=sa.text("entity_type = 'module' AND NOT is_deleted AND content IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_workspace_files_modules", "workspace_files")
