"""Keep recently used adapters on the compute device, within a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from code2lora.hypernetwork.lora import Lora
from code2lora.serving.completion import AdapterIdentity


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """An adapter in the device's memory. Two are the same only if they are one object."""

    identity: AdapterIdentity
    lora: Lora
    """On the model's device, in the model's dtype."""

    @property
    def size_bytes(self) -> int:
        """Device memory held; storage that several layers share counts once."""
        tensors = [*self.lora.a.values(), *self.lora.b.values()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())


class AdapterCache:
    """Loads adapter directories once; they are immutable, so the path is the key."""

    def __init__(self, load: Callable[[Path], LoadedAdapter], *, max_bytes: int) -> None:
        self._load = load
        self._max_bytes = max_bytes
        self._held: OrderedDict[Path, LoadedAdapter] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path) -> LoadedAdapter:
        """Return the adapter in a directory, from memory if it is there.

        The one asked for last is always kept, even when it alone exceeds the limit. Raises what
        loading raises; nothing is kept then.
        """
        with self._lock:
            adapter = self._held.pop(path, None) or self._load(path)
            self._held[path] = adapter
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
            self._held.popitem(last=False)
