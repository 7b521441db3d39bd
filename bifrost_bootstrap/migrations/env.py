"""Runs the builtin tree on BIFROST_DATABASE_URL, each revision in a transaction of its own."""

import os

from alembic import context
from psycopg import pq
from sqlalchemy import NullPool, create_engine, make_url


def run_offline() -> None:
    context.configure(dialect_name="postgresql", literal_binds=True, transaction_per_migration=True)
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    # Operators write the URL for other drivers too; what libpq has no word for is dropped.
    url = make_url(os.environ["BIFROST_DATABASE_URL"]).set(drivername="postgresql+psycopg")
    if "ssl" in url.query:
        url = url.update_query_dict({"sslmode": url.query["ssl"]})
    known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    url = url.difference_update_query(url.query.keys() - known)

    # Behind a transaction pooler the next statement may reach a server session that knows no prepared one. In a
    # database of the encoding SQL_ASCII SQLAlchemy would be given bytes.
    options = {"prepare_threshold": None, "client_encoding": "UTF8"}
    engine = create_engine(url, poolclass=NullPool, connect_args=options)
    with engine.connect() as connection:
        context.configure(connection=connection, transaction_per_migration=True)
        with context.begin_transaction():
            context.run_migrations()


if context.is_offline_mode():
    run_offline()
else:
    run_online()
