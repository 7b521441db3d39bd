"""Questions about an SQL statement, each answered by a pattern: a match means yes."""

from __future__ import annotations

import re

GAP = r"(?:\s|--[^\n]*\n|/\*(?:[^*]|\*(?!/))*\*/)"
NAME = r'(?:"(?:[^"]|"")+"|[^\W\d][\w$]*)'

#: Does it build an index concurrently? The groups `index` and `table` name it.
find_concurrent_index = re.compile(
    rf"""\bcreate{GAP}+(?:unique{GAP}+)?index{GAP}+concurrently{GAP}+(?:if{GAP}+not{GAP}+exists{GAP}+)?
        (?P<index>{NAME}){GAP}*\bon\b{GAP}*(?:only\b{GAP}*)?(?P<table>(?:{NAME}\.)?{NAME})""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
).search
#: Does the server refuse it in a transaction, or may it end the transaction from within?
needs_no_transaction = re.compile(
    rf"{GAP}*(?:(?:vacuum|call|alter{GAP}+system|(?:create|drop){GAP}+(?:database|tablespace))\b"
    r"|(?:create|drop|reindex|refresh|alter)\b.*\bconcurrently\b|do\b.*\b(?:commit|rollback)\b)",
    re.IGNORECASE | re.DOTALL,
).match
#: Does it begin or end a transaction?
controls_transaction = re.compile(rf"{GAP}*(?:begin|start|commit|end|rollback|abort)\b", re.IGNORECASE).match
#: May it end a transaction by hand, also among other statements?
may_end_transaction = re.compile(r"\b(?:commit|end|rollback|abort)\b", re.IGNORECASE).search
#: Does it end a transaction and do nothing else? The group `commit` tells how.
only_ends_transaction = re.compile(
    rf"{GAP}*(?:(?P<commit>commit|end)|rollback|abort)(?:{GAP}+(?:work|transaction))?{GAP}*;?{GAP}*$", re.IGNORECASE
).match
#: Does it change something, as env.py may do each time before it reads its versions?
writes = re.compile(
    rf"{GAP}*(?:create|alter|drop|grant|revoke|comment|insert|update|delete|truncate|do)\b", re.IGNORECASE
).match
#: Does the server take it only before the first query of a transaction?
sets_transaction = re.compile(
    rf"{GAP}*set{GAP}+(?:(?:local|session){GAP}+)?transaction(?:_isolation|_read_only|_deferrable)?\b", re.IGNORECASE
).match


def quote_literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
