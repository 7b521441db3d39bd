"""The difference between rows and cache, as a value: what warm, check, plan, cache monitor and init decide by."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

#: Paths of each kind that a report names.
NAMED_PATHS = 10
#: A warm that removes more entries than this, and more than this share of the index, looks like the wrong database.
SHRINK_ENTRIES = 20
SHRINK_SHARE = 0.5

#: Paths in UTF-8, as in Redis, each with the fingerprint of its entry when the cache was read: b"" if it had none.
Entries = dict[bytes, bytes]


@dataclass
class CacheDiff:
    """
    What a warm would do.

    added: rows that are not in the index. changed: entries that differ from their row. removed: indexed paths
    without a row. ttl_only: entries with the right content, but another TTL than the policy says, or not in the index;
    reports call them `expiring`. rejected: rows that cannot be cached, as (path, reason); reports call them `odd`.
    modules: rows that can be cached. private: paths in the index that are the platform's own. indexed: paths in the
    index. index_expires: the index has a TTL. requirements: the requirements entry is "present", "missing" (a warm
    makes it), or "none" (absent, and no row to make it from).
    """

    added: Entries = field(default_factory=dict)
    changed: Entries = field(default_factory=dict)
    removed: Entries = field(default_factory=dict)
    ttl_only: Entries = field(default_factory=dict)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    modules: int = 0
    private: int = 0
    indexed: int = 0
    index_expires: bool = False
    requirements: str = "none"

    @property
    def kinds(self) -> dict[str, Entries]:
        """The differing paths by kind, under the names that reports use."""
        return {"added": self.added, "changed": self.changed, "removed": self.removed, "expiring": self.ttl_only}

    @property
    def entries(self) -> Entries:
        """The differing paths of all kinds."""
        return self.added | self.changed | self.removed | self.ttl_only

    @property
    def empty(self) -> bool:
        """Whether a warm has nothing to do."""
        return self.complete and not (self.ttl_only or self.index_expires or self.requirements == "missing")

    @property
    def complete(self) -> bool:
        """Whether index and contents equal the rows. Entries may still have another TTL than the policy says."""
        return not (self.added or self.changed or self.removed)

    @property
    def shrinks(self) -> bool:
        """Whether it looks like the wrong database: a warm would remove most of the cache."""
        return len(self.removed) > max(SHRINK_ENTRIES, SHRINK_SHARE * self.indexed)

    def confirmed_by(self, second: CacheDiff) -> CacheDiff:
        """
        The part of this difference that a second comparison finds unchanged; the totals are those of the second.

        A path in only one of the two is the work of a live writer, between its commit and its cache entry.
        """
        first = self.entries

        def confirmed(entries: Entries) -> Entries:
            return {path: fingerprint for path, fingerprint in entries.items() if first.get(path) == fingerprint}

        return replace(
            second,
            added=confirmed(second.added),
            changed=confirmed(second.changed),
            removed=confirmed(second.removed),
            ttl_only=confirmed(second.ttl_only),
        )

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: counts, the first paths of each kind, and all rows that cannot be cached."""
        facts: dict[str, Any] = {}
        for kind, entries in self.kinds.items():
            facts[kind] = len(entries)
            facts[f"{kind}_paths"] = [path.decode(errors="replace") for path in islice(entries, NAMED_PATHS)]
        facts |= {"index_expires": self.index_expires, "requirements": self.requirements}
        return facts | {"odd": [{"path": path, "reason": reason} for path, reason in self.rejected]}

    def summary(self) -> str:
        """`3 added, 1 removed`; "no difference" if it is empty."""
        parts = [f"{len(entries)} {kind}" for kind, entries in self.kinds.items() if entries]
        if self.index_expires:
            parts.append("the index expires")
        if self.requirements == "missing":
            parts.append("the requirements entry is missing")
        return ", ".join(parts) or "no difference"
