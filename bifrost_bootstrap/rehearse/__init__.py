"""Rehearse: run the pending revisions on a copy of the live schema, and say what they would do to the live tables."""
