"""Measures the init container against what such scripts usually do (naive), and against what is possible (limit)."""
