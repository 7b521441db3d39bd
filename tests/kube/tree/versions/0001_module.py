"""Create the table of modules, and one module in it."""

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.execute(
        "CREATE TABLE workspace_files (path varchar(1000) UNIQUE, content text, content_hash varchar(64),"
        " entity_type varchar(20), is_deleted boolean NOT NULL DEFAULT false)"
    )
    op.execute(
        "INSERT INTO workspace_files (path, content, entity_type) VALUES ('compose_probe.py', 'GREETING = 1', 'module')"
    )
