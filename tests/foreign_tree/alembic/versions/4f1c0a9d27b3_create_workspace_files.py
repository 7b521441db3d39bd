"""create workspace files

Revision ID: 4f1c0a9d27b3
Revises:
Create Date: 2025-03-04 09:12:41.318402
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "4f1c0a9d27b3"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "workspace_files",
        sa.Column("id", postgresql.UUID(as_uuid=True), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("path", sa.String(1000), nullable=False),
        sa.Column("content", sa.Text(), nullable=True),
        sa.Column("content_hash", sa.String(64), nullable=True),
        sa.Column("size_bytes", sa.Integer(), server_default="0", nullable=False),
        sa.Column("entity_type", sa.String(20), nullable=True),
        sa.Column("is_deleted", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("path", name="uq_workspace_files_path"),
    )
    # How often each revision ran: the tests count these rows.
    op.create_table(
        "applied_revisions",
        sa.Column("revision", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.func.clock_timestamp(), nullable=False),
    )
    op.execute(f"INSERT INTO applied_revisions (revision) VALUES ('{revision}')")


def downgrade() -> None:
    op.drop_table("applied_revisions")
    op.drop_table("workspace_files")
