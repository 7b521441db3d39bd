#!/bin/sh
# The image runs this once, in a new primary. It creates the role with which a standby copies and follows it.
set -eu
psql -v ON_ERROR_STOP=1 --no-psqlrc -q -U "$POSTGRES_USER" -d "$POSTGRES_DB" <<'END'
\set replication_password `cat /run/secrets/postgres-replication-password`
SET log_statement TO none;
SET log_min_duration_statement TO -1;
SET log_min_error_statement TO panic;
CREATE ROLE bifrost_replication LOGIN REPLICATION PASSWORD :'replication_password';
END
echo 'host replication bifrost_replication all scram-sha-256' >>"$PGDATA/pg_hba.conf"
