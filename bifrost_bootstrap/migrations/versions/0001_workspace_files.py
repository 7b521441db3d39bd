"""Create workspace_files."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "workspace_files",
        sa.Column("id", sa.Uuid, server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("path", sa.String(1000), nullable=False),
        sa.Column("content", sa.Text),
        sa.Column("content_hash", sa.String(64)),
        sa.Column("entity_type", sa.String(50)),
        sa.Column("is_deleted", sa.Boolean, server_default=sa.false(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, server_default=sa.text("0"), nullable=False),
        sa.Column("content_type", sa.String(255), server_default="text/plain", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_workspace_files"),
        sa.UniqueConstraint("path", name="uq_workspace_files_path"),
    )


def downgrade() -> None:
    op.drop_table("workspace_files")
