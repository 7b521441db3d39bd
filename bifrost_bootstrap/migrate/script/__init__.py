"""
The runner: runs a foreign Alembic tree, unmodified, in a process of its own.

The tree's interpreter runs `__main__.py` by its path. All files here import only the standard library, Alembic
(>= 1.13) and SQLAlchemy (>= 2.0), and run on every Python that those support (>= 3.8).

`program` reads one JSON request from the pipe that its argument names, and writes JSON events, one a line, to what was
its stdout. Whatever the tree prints goes to stderr. When the pipe closes, the parent is gone and the runner ends.

SQLAlchemy's engine events tie the tree to the migration lock without touching its code (`lock_guard`). Each transaction
of the tree

* takes the shared runner lock when it begins: by this lock the next holder of the migration lock finds and ends it,
* checks then, and again before it commits, that the parent still holds the migration lock, so that a runner that has
  lost the lock begins and records nothing,
* waits for table locks no longer than `lock_timeout`, and makes the server notice when the runner is gone.

A statement outside a transaction (`autocommit_block`) cannot hold a lock. The same check precedes it, and it begins
with a comment (`tag`) by which the next holder finds it. With asyncpg most of these statements get a transaction of
their own (`asyncpg_autocommit`), which is tied to the lock like the others, but waits for tables without a limit.

A revision may end its transaction itself (`op.execute("COMMIT")`). SQLAlchemy does not notice, and the statements after
that would have no lock. `transaction_guard` gives them a transaction.
"""
