"""Safetensors files as numpy arrays, bfloat16 included. No torch here.

The format is a length, a JSON header and the data; numpy has no bfloat16, so such tensors come as
their 16 bits or as float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from code2lora.errors import UserError

Array = NDArray[Any]

_STORED: dict[str, type[np.generic]] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
}
_HEADER_LIMIT = 100_000_000
"""As the library has it: a header beyond this is no header."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in a file, and what it is."""

    file: Path
    dtype: str
    """`F32`, `F16` or `BF16`."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    def stored(self) -> Array:
        """Return the tensor as it is in the file; a bfloat16 is its 16 bits."""
        kind = np.dtype(_STORED[self.dtype]).newbyteorder("<")
        flat = np.memmap(self.file, kind, "r", self.offset, (math.prod(self.shape),))
        return np.array(flat).reshape(self.shape)

    def float32(self) -> NDArray[np.float32]:
        """Return the tensor in float32, which every stored value fits in."""
        stored = self.stored()
        if self.dtype == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32)


def read_tensors(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file by name.

    Raises UserError when the file is missing, is no safetensors file, or holds what is no float.
    """
    try:
        n_bytes = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= min(n_bytes - 8, _HEADER_LIMIT):
                raise ValueError("its header does not fit in it")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return {name: _info(file, 8 + length, n_bytes, entry) for name, entry in header.items()}
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {error}") from error


def file_header(tensors: Iterable[tuple[str, str, Sequence[int], int]], *, maker: str) -> bytes:
    """Return what a safetensors file begins with.

    tensors: name, dtype, shape and bytes of each, in the order of the data that follows
    maker: `pt` or `mlx`, by which readers tell whose layout it is
    """
    header: dict[str, object] = {"__metadata__": {"format": maker}}
    offset = 0
    for name, dtype, shape, n_bytes in tensors:
        end = offset + n_bytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    return len(text).to_bytes(8, "little") + text


def _info(file: Path, begin: int, n_bytes: int, entry: dict[str, Any]) -> TensorInfo:
    dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
    if dtype not in _STORED:
        raise ValueError(f"a tensor is {dtype}, expected one of {', '.join(_STORED)}")
    first, last = entry["data_offsets"]
    n_wanted = math.prod(shape) * np.dtype(_STORED[dtype]).itemsize
    if min(shape, default=1) < 1 or last - first != n_wanted or not 0 <= first <= n_bytes - begin:
        raise ValueError("a tensor has another size than its shape")
    if begin + last > n_bytes:
        raise ValueError("it is cut short")
    return TensorInfo(file, dtype, shape, begin + first)
