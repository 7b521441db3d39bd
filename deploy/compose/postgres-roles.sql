-- The image runs this once, in the new database. It creates the roles of docs/security.md and the platform's role, with
-- the passwords of PgBouncer's list. Nobody logs in as the superuser.
\set migrate_password `sed -n 's/^"bifrost_migrate" "\(.*\)"$/\1/p' /run/secrets/pgbouncer-userlist`
\set read_password `sed -n 's/^"bifrost_read" "\(.*\)"$/\1/p' /run/secrets/pgbouncer-userlist`
\set platform_password `sed -n 's/^"bifrost" "\(.*\)"$/\1/p' /run/secrets/pgbouncer-userlist`
-- The server's log must not contain the passwords, not even for a statement that fails.
SET log_statement TO none;
SET log_min_duration_statement TO -1;
SET log_min_error_statement TO panic;
CREATE ROLE bifrost_migrate LOGIN PASSWORD :'migrate_password';
CREATE ROLE bifrost_read LOGIN PASSWORD :'read_password';
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO bifrost_migrate;
GRANT USAGE ON SCHEMA public TO bifrost_read;
ALTER DEFAULT PRIVILEGES FOR ROLE bifrost_migrate IN SCHEMA public GRANT SELECT ON TABLES TO bifrost_read;

-- The platform's tree may create a schema, or an extension that PostgreSQL trusts. It needs pgvector if that is
-- installed.
GRANT CREATE ON DATABASE bifrost TO bifrost_migrate;
SELECT 'CREATE EXTENSION vector' FROM pg_available_extensions WHERE name = 'vector' \gexec

-- API and worker read and write rows in everything that the tree creates, and alter nothing.
CREATE ROLE bifrost LOGIN PASSWORD :'platform_password';
GRANT USAGE ON SCHEMA public TO bifrost;
ALTER DEFAULT PRIVILEGES FOR ROLE bifrost_migrate GRANT USAGE ON SCHEMAS TO bifrost;
ALTER DEFAULT PRIVILEGES FOR ROLE bifrost_migrate GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON TABLES TO bifrost;
ALTER DEFAULT PRIVILEGES FOR ROLE bifrost_migrate GRANT USAGE, SELECT, UPDATE ON SEQUENCES TO bifrost;
