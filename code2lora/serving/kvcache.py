"""Keys and values that sequences have computed: one growing tensor each, and a memory of prefixes.

Nothing here knows what an adapter is; the prefix cache takes any key, and what was computed under
one key is never given to another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

_ROUND = 64


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What one token's keys and values measure."""

    n_layers: int
    n_heads: int
    """Key-value heads."""
    width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Memory for one token."""
        return 2 * self.n_layers * self.n_heads * self.width * self.dtype.itemsize


class KvCache:
    """One sequence's keys and values, oldest first."""

    def __init__(self, shape: CacheShape, capacity: int) -> None:
        """Make room for `capacity` tokens; it grows when more come."""
        self.length = 0
        """Tokens held."""
        self.capacity = -(-max(capacity, 1) // _ROUND) * _ROUND
        self._shape = shape
        self._data = self._allocate(self.capacity)  # (layers, 2, heads, capacity, width)
        self.layers: tuple[Tensor, ...] = self._data.unbind()
        """Each (2, heads, capacity, width): keys, then values."""

    @property
    def size_bytes(self) -> int:
        """Memory held, empty room included."""
        return self._data.numel() * self._data.element_size()

    def reserve(self, n: int) -> None:
        """Make room for `n` more tokens."""
        if self.length + n > self.capacity:
            self._resize(max(self.length + n, self.capacity * 3 // 2))

    def head(self, n: int, capacity: int) -> KvCache:
        """Return a copy of the first `n` tokens, with room for `capacity`."""
        copy = KvCache(self._shape, max(n, capacity))
        copy._data[:, :, :, :n] = self._data[:, :, :, :n]
        copy.length = n
        return copy

    def trim(self) -> None:
        """Give back room that is not used, if it is much."""
        if self.capacity - self.length > max(_ROUND, self.length // 4):
            self._resize(self.length)

    def _resize(self, capacity: int) -> None:
        self.capacity = -(-max(capacity, 1) // _ROUND) * _ROUND
        data = self._allocate(self.capacity)
        data[:, :, :, : self.length] = self._data[:, :, :, : self.length]
        self._data, self.layers = data, data.unbind()

    def _allocate(self, capacity: int) -> Tensor:
        shape = self._shape
        return torch.empty(
            (shape.n_layers, 2, shape.n_heads, capacity, shape.width),
            dtype=shape.dtype,
            device=shape.device,
        )


class PrefixCache:
    """Remembers the keys and values of past sequences within a number of bytes, newest first."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[int, tuple[Hashable, list[int], KvCache]] = OrderedDict()
        self._numbers = count()
        self.size_bytes = 0
        """Memory held."""

    def find(self, key: Hashable, ids: Sequence[int], capacity: int) -> KvCache | None:
        """Return a copy of the longest remembered beginning of `ids`, with room to go on.

        Always leaves the last token to be read, whose scores nobody remembers.
        """
        best, best_number = 0, -1  # an empty beginning is worth nothing
        for number, (known, past, _) in self._entries.items():
            if known == key and (n := _n_common(past, ids, len(ids) - 1)) > best:
                best, best_number = n, number
        if best_number < 0:
            return None
        self._entries.move_to_end(best_number)
        return self._entries[best_number][2].head(best, capacity)

    def keep(self, key: Hashable, ids: list[int], cache: KvCache) -> None:
        """Take over the cache of a sequence that has ended; `ids` are the tokens that it holds."""
        if not ids:
            return
        for number, (known, past, held) in list(self._entries.items()):
            n = _n_common(past, ids, len(ids)) if known == key else -1
            if n == len(ids):
                self._entries.move_to_end(number)
                return
            if n == len(past):
                self._drop(number, held)
        cache.trim()
        if cache.size_bytes > self._max_bytes:
            return
        self._entries[next(self._numbers)] = (key, ids, cache)
        self.size_bytes += cache.size_bytes
        while self.size_bytes > self._max_bytes:
            number, (_, _, oldest) = next(iter(self._entries.items()))
            self._drop(number, oldest)

    def forget(self, key: Hashable) -> None:
        """Drop what was computed under a key."""
        for number, (known, _, held) in list(self._entries.items()):
            if known == key:
                self._drop(number, held)

    def _drop(self, number: int, held: KvCache) -> None:
        del self._entries[number]
        self.size_bytes -= held.size_bytes


def _n_common(one: Sequence[int], other: Sequence[int], limit: int) -> int:
    """Return the length of the common beginning, at most `limit`."""
    limit = min(limit, len(one), len(other))
    if one[:limit] == other[:limit]:  # the usual case, and fast
        return limit
    for i in range(limit):
        if one[i] != other[i]:
            return i
    raise AssertionError("sequences that differ differ somewhere")
