"""
The usual init script, as a program. It prints its seconds as JSON.

`alembic upgrade head` as a subprocess, then all rows through the asynchronous ORM, then SETEX and SADD for each
module, one await after the other. Arguments: `all`, or `warm` for the second part only.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import uuid

from redis.asyncio import Redis
from sqlalchemy import String, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

#: Time to live of an entry in seconds: that of the platform's own writers.
ENTRY_TTL = 24 * 3600


class Base(DeclarativeBase):
    pass


class WorkspaceFile(Base):
    __tablename__ = "workspace_files"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    path: Mapped[str] = mapped_column(String(1000))
    content: Mapped[str | None]
    content_hash: Mapped[str | None] = mapped_column(String(64))
    entity_type: Mapped[str | None] = mapped_column(String(50))
    is_deleted: Mapped[bool]


async def warm() -> int:
    engine = create_async_engine(os.environ["NAIVE_DATABASE_URL"])
    redis = Redis.from_url(os.environ["BIFROST_REDIS_URL"])
    async with AsyncSession(engine) as session:
        wanted = select(WorkspaceFile).where(
            WorkspaceFile.entity_type == "module",
            WorkspaceFile.is_deleted.is_(False),
            WorkspaceFile.content.is_not(None),
        )
        files = (await session.execute(wanted)).scalars().all()
        for file in files:
            entry = {"content": file.content, "path": file.path, "hash": file.content_hash}
            await redis.setex(f"bifrost:module:{file.path}", ENTRY_TTL, json.dumps(entry))
            await redis.sadd("bifrost:module:index", file.path)
    await redis.aclose()
    await engine.dispose()
    return len(files)


def main() -> None:
    if sys.argv[1] == "all":
        subprocess.run([os.environ["ALEMBIC"], "-c", os.environ["ALEMBIC_INI"], "upgrade", "head"], check=True)
    started = time.perf_counter()
    count = asyncio.run(warm())
    print(json.dumps({"seconds": time.perf_counter() - started, "modules": count}))


if __name__ == "__main__":
    main()
