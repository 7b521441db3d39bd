"""index modules

Revision ID: 8b26e5f3d014
Revises: 4f1c0a9d27b3
Create Date: 2025-05-19 14:30:05.770913
"""

import sqlalchemy as sa
from alembic import op

revision = "8b26e5f3d014"
down_revision = "4f1c0a9d27b3"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_workspace_files_modules",
        "workspace_files",
        ["path"],
        postgresql_where=sa.text("entity_type = 'module' AND NOT is_deleted"),
    )
    op.execute(f"INSERT INTO applied_revisions (revision) VALUES ('{revision}')")


def downgrade() -> None:
    op.execute(f"DELETE FROM applied_revisions WHERE revision = '{revision}'")
    op.drop_index("ix_workspace_files_modules", table_name="workspace_files")
