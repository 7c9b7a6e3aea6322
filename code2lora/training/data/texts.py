"""Hold many texts compressed in memory; each is unpacked when it is looked at.

Of all that training keeps of a repository its files are the most, and a step looks at a few of
them: compressed they take about a fifth, and unpacking one takes some ten microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import pyarrow as pa

_CODEC: Final = pa.Codec("zstd", 1)
_ERRORS = "surrogatepass"
"""Texts come out as they went in, lone surrogates too."""


class PackedTexts:
    """A sequence of texts that never change."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._packed: list[bytes] = []
        self._sizes: list[tuple[int, int]] = []
        for text in texts:
            content = text.encode("utf-8", _ERRORS)
            self._sizes.append((len(content), len(text)))
            self._packed.append(_CODEC.compress(content, asbytes=True) if content else b"")

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, row: int) -> str:
        n_bytes = self._sizes[row][0]
        if not n_bytes:
            return ""
        content: bytes = _CODEC.decompress(self._packed[row], n_bytes, asbytes=True)
        return content.decode("utf-8", _ERRORS)

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))

    def n_chars(self, row: int) -> int:
        """Return the length of a text without unpacking it."""
        return self._sizes[row][1]
