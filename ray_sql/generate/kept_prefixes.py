"""Prefixes kept from one call to the next: the schemas of databases that are asked again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from ray_sql.models.decode_attention import Prefix


class KeptPrefixes:
    """The prefixes used last, in at most `most_bytes` bytes."""

    def __init__(self, most_bytes: int = 0) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()

    def get(self, tokens: Sequence[int], compute: Callable[[Sequence[int]], Prefix]) -> Prefix:
        """Return the prefix of these tokens: the one that is kept, or a new one."""
        key = tuple(tokens)
        prefix = self._kept.pop(key, None) or compute(tokens)
        self._kept[key] = prefix
        while self.bytes > self._most_bytes:
            self._kept.popitem(last=False)
        return prefix

    @property
    def bytes(self) -> int:
        """Return the bytes of all that is kept."""
        return sum(prefix.bytes for prefix in self._kept.values())
