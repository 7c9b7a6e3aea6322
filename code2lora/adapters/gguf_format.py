"""What our GGUF files have in common: the package that writes them, kinds of numbers, streaming.

GGUF is what llama.cpp and Ollama read. The package `gguf` is llama.cpp's own; it is optional.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from code2lora.adapters.export import GGUF_DTYPES
from code2lora.adapters.layout import read_json
from code2lora.adapters.tensors import Array, TensorInfo
from code2lora.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURE = "qwen2"
"""The one whose tensors llama.cpp holds in the order in which Hugging Face does."""

_BYTES = {"f16": 2, "f32": 4, "bf16": 2}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file, read when it is written."""

    name: str
    tensor: TensorInfo
    dtype: str

    @property
    def n_bytes(self) -> int:
        """Size in the file, without padding."""
        return int(np.prod(self.tensor.shape)) * _BYTES[self.dtype]

    def array(self) -> Array:
        """Return the numbers as they are written; a bfloat16 as its 16 bits.

        Raises UserError when one is too large for the dtype.
        """
        if self.dtype == "bf16" and self.tensor.dtype == "BF16":
            return self.tensor.stored()
        full = self.tensor.float32()
        if self.dtype == "f32":
            return full
        if self.dtype == "bf16":
            return _to_bfloat16(full)
        with np.errstate(over="ignore"):
            half = full.astype(np.float16)
        if not np.isfinite(half).all():
            raise UserError(
                f"{self.name} has numbers that f16 cannot hold", hint="add `--dtype f32`"
            )
        return half


def require_architecture(base_dir: Path) -> dict[str, Any]:
    """Return a base model's configuration. Raises UserError when it is not of our architecture."""
    config = read_json(base_dir / "config.json")
    if config.get("model_type") != ARCHITECTURE:
        raise UserError(
            f"{base_dir} is a model of type {config.get('model_type')!r}, "
            f"but GGUF files are made for {ARCHITECTURE!r} alone"
        )
    return config


def require_gguf() -> Any:
    """Return the package. Raises UserError when it is not installed."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise UserError(
            "GGUF files need the package gguf", hint="`pip install 'code2lora-daemon[gguf]'`"
        ) from error
    return gguf


def write_gguf(
    file: Path, fields: Callable[[GGUFWriter], None], tensors: Sequence[GgufTensor]
) -> None:
    """Write a file, one tensor in memory at a time.

    fields: adds what the file says of itself
    Raises UserError when the package is missing or a number does not fit.
    """
    gguf = require_gguf()
    kinds = {name: gguf.GGMLQuantizationType[name.upper()] for name in GGUF_DTYPES}
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    try:
        fields(writer)
        for each in tensors:
            # The writer takes the shape of 16 bits for what it is, so the kind is told apart.
            writer.add_tensor_info(
                each.name,
                each.tensor.shape,
                np.dtype(np.float32),
                each.n_bytes,
                raw_dtype=kinds[each.dtype],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for each in tensors:
            writer.write_tensor_data(each.array())
    finally:
        writer.close()


def _to_bfloat16(full: Array) -> Array:
    """Return the upper 16 bits, rounded to nearest, ties to even."""
    bits = full.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
