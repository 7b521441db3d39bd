"""Kinds of statements and what each does to the table {t}, by PostgreSQL's manual (ALTER TABLE, Explicit Locking)."""

from __future__ import annotations

from dataclasses import dataclass

#: Each table has rows, so that what the statement does to them happens.
TABLE = """
    CREATE TABLE {t} (id int PRIMARY KEY, a int NOT NULL, b varchar(20), c text, d int, e int);
    INSERT INTO {t} SELECT n, n, n, n, n, n FROM generate_series(1, 100) AS n;
    CREATE TABLE {t}_other (id int PRIMARY KEY);
    INSERT INTO {t}_other SELECT generate_series(1, 100);
"""

ROW_EXCLUSIVE = "ROW EXCLUSIVE"
SHARE_UPDATE_EXCLUSIVE = "SHARE UPDATE EXCLUSIVE"
SHARE = "SHARE"
SHARE_ROW_EXCLUSIVE = "SHARE ROW EXCLUSIVE"
EXCLUSIVE = "EXCLUSIVE"
ACCESS_EXCLUSIVE = "ACCESS EXCLUSIVE"

TRIGGER = """
    CREATE FUNCTION {t}_function() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
    CREATE TRIGGER {t}_trigger BEFORE INSERT ON {t} FOR EACH ROW EXECUTE FUNCTION {t}_function();
"""
PARTITIONS = """
    DROP TABLE {t};
    CREATE TABLE {t} (id int) PARTITION BY RANGE (id);
    CREATE TABLE {t}_first PARTITION OF {t} FOR VALUES FROM (1) TO (100);
    CREATE TABLE {t}_next (id int);
"""
VIEW = """
    DROP TABLE {t};
    CREATE MATERIALIZED VIEW {t} AS SELECT id FROM {t}_other;
    CREATE UNIQUE INDEX ON {t} (id);
"""


@dataclass(frozen=True)
class Kind:
    """
    One statement. lock: on {t}; "" for ACCESS SHARE or none. index: it builds one while it blocks writes.

    before: SQL that makes what the statement needs. others: locks on other tables, by the end of their names. alone: it
    runs outside a transaction.
    """

    name: str
    statement: str
    lock: str
    rewritten: bool = False
    scanned: bool = False
    index: bool = False
    before: str = ""
    others: tuple[tuple[str, str], ...] = ()
    alone: bool = False


KINDS = [
    Kind("add_column", "ALTER TABLE {t} ADD COLUMN x int", ACCESS_EXCLUSIVE),
    Kind("add_column_default", "ALTER TABLE {t} ADD COLUMN x int NOT NULL DEFAULT 7", ACCESS_EXCLUSIVE),
    Kind(
        "add_column_volatile",
        "ALTER TABLE {t} ADD COLUMN x uuid DEFAULT gen_random_uuid()",
        ACCESS_EXCLUSIVE,
        rewritten=True,
    ),
    Kind("add_column_serial", "ALTER TABLE {t} ADD COLUMN x serial", ACCESS_EXCLUSIVE, rewritten=True),
    Kind(
        "add_column_identity",
        "ALTER TABLE {t} ADD COLUMN x int GENERATED ALWAYS AS IDENTITY",
        ACCESS_EXCLUSIVE,
        rewritten=True,
    ),
    Kind(
        "add_column_generated",
        "ALTER TABLE {t} ADD COLUMN x int GENERATED ALWAYS AS (a + 1) STORED",
        ACCESS_EXCLUSIVE,
        rewritten=True,
    ),
    Kind("drop_column", "ALTER TABLE {t} DROP COLUMN e", ACCESS_EXCLUSIVE),
    Kind("rename_column", "ALTER TABLE {t} RENAME COLUMN e TO x", ACCESS_EXCLUSIVE),
    Kind("rename_table", "ALTER TABLE {t} RENAME TO {t}_renamed", ACCESS_EXCLUSIVE),
    Kind("int_to_bigint", "ALTER TABLE {t} ALTER COLUMN d TYPE bigint", ACCESS_EXCLUSIVE, rewritten=True),
    Kind("varchar_longer", "ALTER TABLE {t} ALTER COLUMN b TYPE varchar(40)", ACCESS_EXCLUSIVE),
    Kind("varchar_to_text", "ALTER TABLE {t} ALTER COLUMN b TYPE text", ACCESS_EXCLUSIVE),
    Kind("varchar_shorter", "ALTER TABLE {t} ALTER COLUMN b TYPE varchar(10)", ACCESS_EXCLUSIVE, rewritten=True),
    Kind("text_to_varchar", "ALTER TABLE {t} ALTER COLUMN c TYPE varchar(10)", ACCESS_EXCLUSIVE, rewritten=True),
    Kind("set_default", "ALTER TABLE {t} ALTER COLUMN d SET DEFAULT 1", ACCESS_EXCLUSIVE),
    Kind("drop_default", "ALTER TABLE {t} ALTER COLUMN d DROP DEFAULT", ACCESS_EXCLUSIVE),
    Kind("set_not_null", "ALTER TABLE {t} ALTER COLUMN d SET NOT NULL", ACCESS_EXCLUSIVE, scanned=True),
    Kind(
        "set_not_null_with_check",
        "ALTER TABLE {t} ALTER COLUMN d SET NOT NULL",
        ACCESS_EXCLUSIVE,
        before="ALTER TABLE {t} ADD CONSTRAINT {t}_d CHECK (d IS NOT NULL)",
    ),
    Kind("drop_not_null", "ALTER TABLE {t} ALTER COLUMN a DROP NOT NULL", ACCESS_EXCLUSIVE),
    Kind("add_check", "ALTER TABLE {t} ADD CHECK (d > 0)", ACCESS_EXCLUSIVE, scanned=True),
    Kind("add_check_not_valid", "ALTER TABLE {t} ADD CHECK (d > 0) NOT VALID", ACCESS_EXCLUSIVE),
    Kind(
        "validate_check",
        "ALTER TABLE {t} VALIDATE CONSTRAINT {t}_d",
        SHARE_UPDATE_EXCLUSIVE,
        scanned=True,
        before="ALTER TABLE {t} ADD CONSTRAINT {t}_d CHECK (d > 0) NOT VALID",
    ),
    Kind(
        "add_foreign_key",
        "ALTER TABLE {t} ADD FOREIGN KEY (d) REFERENCES {t}_other (id)",
        SHARE_ROW_EXCLUSIVE,
        scanned=True,
        others=(("_other", SHARE_ROW_EXCLUSIVE),),
    ),
    Kind(
        "add_foreign_key_not_valid",
        "ALTER TABLE {t} ADD FOREIGN KEY (d) REFERENCES {t}_other (id) NOT VALID",
        SHARE_ROW_EXCLUSIVE,
        others=(("_other", SHARE_ROW_EXCLUSIVE),),
    ),
    Kind(
        "validate_foreign_key",
        "ALTER TABLE {t} VALIDATE CONSTRAINT {t}_d",
        SHARE_UPDATE_EXCLUSIVE,
        scanned=True,
        before="ALTER TABLE {t} ADD CONSTRAINT {t}_d FOREIGN KEY (d) REFERENCES {t}_other (id) NOT VALID",
        others=(("_other", "ROW SHARE"),),
    ),
    Kind("drop_constraint", "ALTER TABLE {t} DROP CONSTRAINT {t}_pkey", ACCESS_EXCLUSIVE),
    Kind("add_unique", "ALTER TABLE {t} ADD UNIQUE (d)", ACCESS_EXCLUSIVE, index=True),
    Kind(
        "add_unique_using_index",
        "ALTER TABLE {t} ADD CONSTRAINT {t}_d UNIQUE USING INDEX {t}_d",
        ACCESS_EXCLUSIVE,
        before="CREATE UNIQUE INDEX {t}_d ON {t} (d)",
    ),
    Kind(
        "add_primary_key",
        "ALTER TABLE {t} ADD PRIMARY KEY (a)",
        ACCESS_EXCLUSIVE,
        index=True,
        before="ALTER TABLE {t} DROP CONSTRAINT {t}_pkey",
    ),
    Kind("add_exclude", "ALTER TABLE {t} ADD EXCLUDE USING btree (d WITH =)", ACCESS_EXCLUSIVE, index=True),
    Kind("create_index", "CREATE INDEX ON {t} (d)", SHARE, index=True),
    Kind("create_index_expression", "CREATE INDEX ON {t} (lower(c)) WHERE d > 1", SHARE, index=True),
    Kind("create_index_concurrently", "CREATE INDEX CONCURRENTLY ON {t} (d)", SHARE_UPDATE_EXCLUSIVE, alone=True),
    Kind("drop_index", "DROP INDEX {t}_d", ACCESS_EXCLUSIVE, before="CREATE INDEX {t}_d ON {t} (d)"),
    Kind(
        "drop_index_concurrently",
        "DROP INDEX CONCURRENTLY {t}_d",
        SHARE_UPDATE_EXCLUSIVE,
        before="CREATE INDEX {t}_d ON {t} (d)",
        alone=True,
    ),
    Kind("reindex_table", "REINDEX TABLE {t}", SHARE, index=True),
    Kind("reindex_concurrently", "REINDEX TABLE CONCURRENTLY {t}", SHARE_UPDATE_EXCLUSIVE, alone=True),
    Kind(
        "create_trigger",
        "CREATE TRIGGER {t}_second BEFORE INSERT ON {t} FOR EACH ROW EXECUTE FUNCTION {t}_function()",
        SHARE_ROW_EXCLUSIVE,
        before=TRIGGER,
    ),
    Kind("drop_trigger", "DROP TRIGGER {t}_trigger ON {t}", ACCESS_EXCLUSIVE, before=TRIGGER),
    Kind("disable_trigger", "ALTER TABLE {t} DISABLE TRIGGER {t}_trigger", SHARE_ROW_EXCLUSIVE, before=TRIGGER),
    Kind("enable_row_security", "ALTER TABLE {t} ENABLE ROW LEVEL SECURITY", ACCESS_EXCLUSIVE),
    Kind("create_policy", "CREATE POLICY {t}_all ON {t} USING (true)", ACCESS_EXCLUSIVE),
    Kind("create_rule", "CREATE RULE {t}_rule AS ON DELETE TO {t} DO INSTEAD NOTHING", ACCESS_EXCLUSIVE),
    Kind("set_statistics", "ALTER TABLE {t} ALTER COLUMN d SET STATISTICS 50", SHARE_UPDATE_EXCLUSIVE),
    Kind("set_fillfactor", "ALTER TABLE {t} SET (fillfactor = 70)", SHARE_UPDATE_EXCLUSIVE),
    Kind("set_storage", "ALTER TABLE {t} ALTER COLUMN c SET STORAGE EXTERNAL", ACCESS_EXCLUSIVE),
    Kind("set_unlogged", "ALTER TABLE {t} SET UNLOGGED", ACCESS_EXCLUSIVE, rewritten=True),
    Kind("cluster_on", "ALTER TABLE {t} CLUSTER ON {t}_pkey", SHARE_UPDATE_EXCLUSIVE),
    Kind("replica_identity", "ALTER TABLE {t} REPLICA IDENTITY FULL", ACCESS_EXCLUSIVE),
    Kind("comment", "COMMENT ON TABLE {t} IS 'a table'", SHARE_UPDATE_EXCLUSIVE),
    Kind("create_statistics", "CREATE STATISTICS {t}_statistics ON a, d FROM {t}", SHARE_UPDATE_EXCLUSIVE),
    Kind("analyze", "ANALYZE {t}", SHARE_UPDATE_EXCLUSIVE),
    Kind("cluster", "CLUSTER {t} USING {t}_pkey", ACCESS_EXCLUSIVE, rewritten=True),
    Kind("vacuum_full", "VACUUM FULL {t}", ACCESS_EXCLUSIVE, rewritten=True, alone=True),
    Kind("vacuum", "VACUUM {t}", SHARE_UPDATE_EXCLUSIVE, alone=True),
    Kind(
        "attach_partition",
        "ALTER TABLE {t} ATTACH PARTITION {t}_next FOR VALUES FROM (100) TO (200)",
        SHARE_UPDATE_EXCLUSIVE,
        before=PARTITIONS,
        others=(("_next", ACCESS_EXCLUSIVE),),
    ),
    Kind(
        "detach_partition",
        "ALTER TABLE {t} DETACH PARTITION {t}_first",
        ACCESS_EXCLUSIVE,
        before=PARTITIONS,
        others=(("_first", ACCESS_EXCLUSIVE),),
    ),
    Kind("refresh_view", "REFRESH MATERIALIZED VIEW {t}", ACCESS_EXCLUSIVE, rewritten=True, before=VIEW),
    Kind(
        "refresh_view_concurrently",
        "REFRESH MATERIALIZED VIEW CONCURRENTLY {t}",
        EXCLUSIVE,
        scanned=True,
        before=VIEW,
        alone=True,
    ),
    Kind("drop_table", "DROP TABLE {t}", ACCESS_EXCLUSIVE),
    Kind("truncate", "TRUNCATE {t}", ACCESS_EXCLUSIVE),
    Kind("lock_table", "LOCK TABLE {t} IN SHARE MODE", SHARE),
    Kind("insert", "INSERT INTO {t} (id, a) VALUES (1000, 1)", ROW_EXCLUSIVE),
    Kind("update", "UPDATE {t} SET d = 1", ROW_EXCLUSIVE),
    Kind("delete", "DELETE FROM {t}", ROW_EXCLUSIVE),
    Kind("select", "SELECT count(*) FROM {t}", ""),
    Kind("create_view", "CREATE VIEW {t}_view AS SELECT id FROM {t}", ""),
]
