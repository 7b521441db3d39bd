"""Compares the init container with the usual script (naive) and with the speed of the servers (limit)."""
