"""Wait where a test has closed a gate, then leave a trace of each run."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute(
        """DO $$ BEGIN
        IF to_regclass('gate') IS NOT NULL THEN
            WHILE EXISTS (SELECT FROM gate WHERE closed) LOOP PERFORM pg_sleep(0.1); END LOOP;
        END IF;
        END $$"""
    )
    op.execute("CREATE TABLE IF NOT EXISTS runs (id serial)")
    op.execute("INSERT INTO runs DEFAULT VALUES")
