"""The step `migrate`: Alembic to the tree's head, once, under a lock."""
