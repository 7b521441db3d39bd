"""The platform's own settings: what its env.py imports by bare name, from the folder of alembic.ini."""

import os


def database_url() -> str:
    """DATABASE_URL with the driver that the platform uses."""
    url = os.environ["DATABASE_URL"]
    scheme, separator, rest = url.partition("://")
    return f"{scheme.partition('+')[0]}+asyncpg{separator}{rest}"
