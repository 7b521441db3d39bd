"""What env.py imports by bare name, from the folder of alembic.ini."""

import os

#: As the operator wrote it, with the driver that this tree wants.
DATABASE_URL = "postgresql+asyncpg://" + os.environ["DATABASE_URL"].partition("://")[2]
