"""Read an adapter directory as numpy arrays, for the layouts that other programs want. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from code2lora.adapters.layout import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterMetadata,
    read_json,
    read_metadata,
    tensor_name,
)
from code2lora.adapters.tensors import TensorInfo, read_tensors
from code2lora.errors import UserError
from code2lora.hypernetwork.projections import TARGETS

_PUBLISH_AGAIN = "`code2lora refresh` publishes it again"


@dataclass(frozen=True)
class Pair:
    """The two matrices of one projection in one layer."""

    layer: int
    target: str
    a: TensorInfo
    """(R, d_in)."""
    b: TensorInfo
    """(d_out, R)."""


@dataclass(frozen=True)
class AdapterArrays:
    """An adapter directory whose weights have been checked against their digest."""

    metadata: AdapterMetadata
    sha256: str
    """Of the weights file."""
    n_layers: int
    rank: int
    alpha: float
    pairs: tuple[Pair, ...]

    def __iter__(self) -> Iterator[Pair]:
        """Yield the pairs, layer by layer."""
        return iter(self.pairs)


def read_arrays(path: Path) -> AdapterArrays:
    """Return what an adapter directory holds.

    Raises UserError when a file is missing or damaged, the weights are not those that were
    published, or names or shapes are not those of the configuration.
    """
    metadata, info = read_metadata(path)
    config = read_json(path / CONFIG_FILE)
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / CONFIG_FILE} has no usable {error}") from error
    weights = path / WEIGHTS_FILE
    tensors = read_tensors(weights)
    with weights.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != info.sha256:
            raise UserError(f"{path} has changed since it was published", hint=_PUBLISH_AGAIN)
    wanted = [(i, t) for i in range(info.n_layers) for t in TARGETS]
    if {tensor_name(i, t, side) for i, t in wanted for side in "AB"} != set(tensors):
        raise UserError(
            f"{weights} does not hold one pair for each of {info.n_layers} layers and "
            f"{len(TARGETS)} projections",
            hint=_PUBLISH_AGAIN,
        )
    pairs = tuple(
        Pair(i, t, tensors[tensor_name(i, t, "A")], tensors[tensor_name(i, t, "B")])
        for i, t in wanted
    )
    for pair in pairs:
        if len(pair.a.shape) != 2 or pair.a.shape[0] != rank or pair.b.shape[1:] != (rank,):
            raise UserError(
                f"{weights}: {pair.target} of layer {pair.layer} has shapes {pair.a.shape} and "
                f"{pair.b.shape}, expected rank {rank}",
                hint=_PUBLISH_AGAIN,
            )
    return AdapterArrays(metadata, info.sha256, info.n_layers, rank, alpha, pairs)
