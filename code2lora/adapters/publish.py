"""Turn generated LoRA weights into a new immutable adapter directory.

Writes  <root>/<repository>/<commit>-<digest>/, first under a `.tmp-*` name beside it.

The directory is renamed into place after its files are on the disk, so a kill at any line leaves
either the whole adapter or a `.tmp-*` that `prune.sweep_temporary` removes. Files are 0600 in
directories 0700.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from code2lora.adapters.files import new_file, sync
from code2lora.adapters.layout import (
    CONFIG_FILE,
    METADATA_FILE,
    TEMPORARY_PREFIX,
    WEIGHTS_FILE,
    AdapterMetadata,
    WeightsInfo,
    check_identity,
    dump_json,
    metadata_json,
    peft_config,
    tensor_name,
)
from code2lora.adapters.prune import is_intact
from code2lora.adapters.tensors import file_header
from code2lora.errors import UserError
from code2lora.hypernetwork.lora import Lora

_DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class PublishedAdapter:
    """An adapter directory that is in place."""

    path: Path
    sha256: str
    """Hex, of the weights file."""
    n_bytes: int
    """Size of the weights file."""


def publish(
    lora: Lora,
    metadata: AdapterMetadata,
    root: Path,
    *,
    n_layers: int,
    dtype: torch.dtype = torch.bfloat16,
) -> PublishedAdapter:
    """Write an adapter as a PEFT directory and return where it is.

    lora: without a batch axis; a pair that all layers share is written once for each of the
        `n_layers` layers, which is what the format asks for.
    An identical adapter of the same commit that is already there is returned as it is.
    Raises UserError when the disk is full, the place cannot be written, or the repository's id
    or the commit is malformed.
    """
    check_identity(metadata)
    folder = root / metadata.repository
    with _readable_errors(root):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=folder))
        try:
            return _write(temporary, folder, lora, metadata, n_layers, dtype)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(
    temporary: Path,
    folder: Path,
    lora: Lora,
    metadata: AdapterMetadata,
    n_layers: int,
    dtype: torch.dtype,
) -> PublishedAdapter:
    sha256, n_bytes = _write_weights(temporary / WEIGHTS_FILE, lora, n_layers, dtype)
    shared = all(tensor.shape[0] == 1 for side in (lora.a, lora.b) for tensor in side.values())
    info = WeightsInfo(sha256=sha256, n_layers=n_layers, shared_layers=shared)
    config = peft_config(metadata, lora.rank, lora.alpha)
    for name, values in (
        (CONFIG_FILE, config),
        (METADATA_FILE, metadata_json(metadata, info)),
    ):
        with new_file(temporary / name) as stream:
            stream.write(dump_json(values))
            _sync(stream)
    sync(temporary)
    path = folder / f"{metadata.commit[:12]}-{sha256[:12]}"
    _move(temporary, path, sha256)
    sync(folder)
    return PublishedAdapter(path, sha256, n_bytes)


def _write_weights(file: Path, lora: Lora, n_layers: int, dtype: torch.dtype) -> tuple[str, int]:
    """Write a safetensors file and return its sha256 and size.

    Written here and not by the library, which refuses tensors that share memory and would need a
    copy for each layer, and so that the digest is taken on the way.
    """
    tensors = _layer_tensors(lora, n_layers, dtype)
    n_bytes = [tensor.numel() * tensor.element_size() for _, tensor in tensors]
    entries = [
        (name, _DTYPE_NAMES[dtype], tensor.shape, size)
        for (name, tensor), size in zip(tensors, n_bytes, strict=True)
    ]
    header = file_header(entries, maker="pt")
    digest = hashlib.sha256()
    with new_file(file) as stream:
        blocks: Iterable[bytes | memoryview] = chain([header], (_bytes_of(t) for _, t in tensors))
        for block in blocks:
            digest.update(block)
            stream.write(block)
        _sync(stream)
    return digest.hexdigest(), len(header) + sum(n_bytes)


def _layer_tensors(lora: Lora, n_layers: int, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """Return (name, contiguous CPU tensor) of every layer in name order, sharing storage."""
    found: list[tuple[str, Tensor]] = []
    for target in lora.a:
        for side, stacked in (("A", lora.a[target]), ("B", lora.b[target])):
            if stacked.dim() != 3 or stacked.shape[0] not in (1, n_layers):
                raise AssertionError(f"{target} {side}: {tuple(stacked.shape)}, {n_layers} layers")
            placed = stacked.detach().to(dtype).cpu().contiguous()
            found += [
                (tensor_name(i, target, side), placed[i if len(placed) > 1 else 0])
                for i in range(n_layers)
            ]
    return sorted(found, key=lambda pair: pair[0])


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _move(temporary: Path, path: Path, sha256: str) -> None:
    """Rename into place, unless a whole adapter of that name is there already."""
    try:
        os.rename(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if is_intact(path, sha256):
            return
        # Something damaged holds the name: put it aside, so that the whole one can have it.
        aside = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=path.parent))
        os.rename(path, aside / path.name)
        os.rename(temporary, path)
        shutil.rmtree(aside, ignore_errors=True)


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


@contextmanager
def _readable_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write an adapter under {root}: {error.strerror}",
            hint="free some space, or choose another place with CODE2LORA_DATA_DIR",
        ) from error
