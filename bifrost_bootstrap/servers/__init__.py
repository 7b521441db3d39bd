"""Connections to PostgreSQL and Redis, their errors in our words, and waiting for servers."""
