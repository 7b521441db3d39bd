"""Create the modules."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade():
    op.create_table("applied", sa.Column("revision", sa.Text))
    op.create_table(
        "workspace_files",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("path", sa.String(1000), unique=True, nullable=False),
        sa.Column("content", sa.Text),
        sa.Column("content_hash", sa.String(64)),
        sa.Column("entity_type", sa.String(50), server_default="module"),
        sa.Column("is_deleted", sa.Boolean, server_default=sa.false(), nullable=False),
    )
    op.execute("INSERT INTO workspace_files (path, content) VALUES ('kept', 'one'), ('gone', 'one')")
    op.execute("INSERT INTO applied VALUES ('0001')")
