"""Keep recently used adapters on the compute device, within a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from code2lora.serving.completion import AdapterIdentity
from code2lora.serving.packing import PackedLora


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """An adapter in the device's memory. Two are the same only if they are one object."""

    identity: AdapterIdentity
    weights: PackedLora
    swap_ms: float
    """From being asked for to being ready, without the wait for another adapter's loading."""

    @property
    def size_bytes(self) -> int:
        """Device memory held."""
        return self.weights.size_bytes


class AdapterCache:
    """Makes every adapter once; what a key stands for must never change."""

    def __init__(
        self, *, max_bytes: int, evicted: Callable[[LoadedAdapter], None] = lambda _: None
    ) -> None:
        """Hold `max_bytes`; `evicted` hears of every adapter that is given up."""
        self._max_bytes = max_bytes
        self._evicted = evicted
        self._held: OrderedDict[Hashable, LoadedAdapter] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], LoadedAdapter]) -> LoadedAdapter:
        """Return a key's adapter, from memory if it is there.

        The one asked for last is always kept, even when it alone exceeds the limit. Raises what
        `make` raises; nothing is kept then.
        """
        with self._lock:
            adapter = self._held.pop(key, None) or make()
            self._held[key] = adapter
            self._evict()
            return adapter

    @property
    def size_bytes(self) -> int:
        """Device memory held now."""
        with self._lock:
            return self._total()

    def _total(self) -> int:
        return sum(adapter.size_bytes for adapter in self._held.values())

    def _evict(self) -> None:
        while len(self._held) > 1 and self._total() > self._max_bytes:
            _, adapter = self._held.popitem(last=False)
            self._evicted(adapter)
