"""Runs the tree on DATABASE_URL with psycopg."""

import os

from alembic import context
from sqlalchemy import NullPool, create_engine, make_url

engine = create_engine(make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+psycopg"), poolclass=NullPool)
with engine.connect() as connection:
    context.configure(connection=connection, transaction_per_migration=True)
    with context.begin_transaction():
        context.run_migrations()
