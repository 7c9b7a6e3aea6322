"""Turn LoRA weights into the form that the decoder multiplies with, and into merged weights.

The decoder reads q, k and v with one product, and gate and up with one; so an adapter's matrices
are laid side by side in the same way, and an adapted projection costs two small products however
many modules it stands for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from code2lora.errors import UserError
from code2lora.hypernetwork.lora import Lora

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""The projections that share an input, in the order in which a layer reads them."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One adapted group of projections in one layer: ``y += (x A^T) B``."""

    a: Tensor
    """(R', d_in), R' the ranks of the group's modules together."""
    b: Tensor
    """(R', d_out), zero where a module's rank meets another's outputs; alpha / rank is in it."""


Layer = tuple[Pair | None, Pair | None, Pair | None, Pair | None]
"""A layer's groups, in the order of GROUPS; None where nothing is adapted."""


@dataclass(frozen=True, eq=False, slots=True)
class PackedLora:
    """One adapter, ready to be multiplied. Two are the same only if they are one object."""

    layers: tuple[Layer, ...]
    size_bytes: int
    """Device memory held; storage that several layers share counts once."""


def pack(
    lora: Lora,
    dims: dict[str, tuple[int, int]],
    n_layers: int,
    device: torch.device,
    dtype: torch.dtype,
) -> PackedLora:
    """Return an adapter in the decoder's layout, on its device and in its dtype.

    dims: module type -> (d_in, d_out) of the decoder
    Raises UserError when the adapter's shapes are not the decoder's.
    """
    for target in lora.a:
        _check(lora, target, dims, n_layers)
    like = torch.empty(0, device=device, dtype=dtype)
    groups = [_pack_group(lora, group, dims, n_layers, like) for group in GROUPS]
    layers: list[Any] = [tuple(group[i] for group in groups) for i in range(n_layers)]
    tensors = [t for layer in layers for pair in layer if pair for t in (pair.a, pair.b)]
    return PackedLora(tuple(layers), _storage_bytes(tensors))


def _check(lora: Lora, target: str, dims: dict[str, tuple[int, int]], n_layers: int) -> None:
    a, b = lora.a[target], lora.b[target]
    d_in, d_out = dims.get(target, (0, 0))
    shapes = (a.shape[-2:], b.shape[-2:]) == ((lora.rank, d_in), (d_out, lora.rank))
    if not shapes or any(t.dim() != 3 or t.shape[0] not in (1, n_layers) for t in (a, b)):
        raise UserError(
            f"the adapter's {target} has shapes A {tuple(a.shape)} and B {tuple(b.shape)}, "
            f"but the model has {n_layers} layers of {d_in} -> {d_out}",
            hint="use an adapter that was made for this base model",
        )


def _pack_group(
    lora: Lora,
    group: Sequence[str],
    dims: dict[str, tuple[int, int]],
    n_layers: int,
    like: Tensor,
) -> list[Pair | None]:
    """Return one group's pair for every layer; all are views of two tensors."""
    targets = [target for target in group if target in lora.a]
    if not targets:
        return [None] * n_layers
    n = max(t.shape[0] for target in targets for t in (lora.a[target], lora.b[target]))
    n_ranks, d_out = lora.rank * len(targets), sum(dims[target][1] for target in group)
    a = _zeros((n, n_ranks, dims[targets[0]][0]), like)
    b = _zeros((n, n_ranks, d_out), like)
    to_a, to_b = _writable(a), _writable(b)
    row = column = 0
    for target in group:
        width = dims[target][1]
        if target in lora.a:
            to_a[:, row : row + lora.rank] = _readable(lora.a[target], like)
            block = _readable(lora.b[target], like).swapaxes(1, 2)  # (n or 1, R, d_out)
            to_b[:, row : row + lora.rank, column : column + width] = block * lora.scale
            row += lora.rank
        column += width
    pairs: list[Pair | None] = [Pair(a[i], b[i]) for i in range(n)]
    return pairs if n == n_layers else pairs * n_layers


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return zeros where and as `like` is.

    On the CPU numpy does the copying here, in one thread. Torch would share even small copies among
    several and wait for all: on a busy machine, where the others are not running, for much longer
    than the copy takes.
    """
    if not _is_plain(like):
        return like.new_zeros(shape)
    return torch.from_numpy(np.zeros(shape, dtype=like.numpy().dtype))


def _writable(tensor: Tensor) -> Any:
    """Return a tensor as an array that shares its memory, where there is one."""
    return tensor.numpy() if _is_plain(tensor) else tensor


def _readable(tensor: Tensor, like: Tensor) -> Any:
    """Return weights as what can be assigned to a part of `_writable(like)`."""
    if not _is_plain(like):
        return tensor.detach().to(device=like.device, dtype=like.dtype)
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # the upper half of a float32, and unknown to numpy
        bits = tensor.view(torch.uint16).numpy().astype(np.uint32)
        return (bits << 16).view(np.float32)
    return tensor.numpy()


def _is_plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)


class MergedWeights:
    """Private copies of the decoder's weights with an adapter added in, for adapters in steady use.

    A merged layer costs what the base model's does, where the two small products cost a small
    model a tenth. Built a layer at a time, so that no pass waits long for it; the decoder's own
    weights are never touched, so nothing has to be undone.
    """

    def __init__(self, weights: Sequence[Sequence[Tensor]], *, max_bytes: int) -> None:
        """Merge into copies of `weights`, each layer's in the order of GROUPS.

        Only where whole copies fit `max_bytes` and no precision is lost: rounding the sum of a
        weight and an adapter to 16 bits would lose most of the adapter.
        """
        self._weights = weights
        self._max_bytes = max_bytes
        self._each_bytes = sum(t.numel() * t.element_size() for layer in weights for t in layer)
        exact = all(t.dtype in (torch.float32, torch.float64) for layer in weights for t in layer)
        self._usable = exact and self._each_bytes <= max_bytes
        self._held: OrderedDict[PackedLora, list[tuple[Tensor, ...]]] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """Memory held now."""
        tensors = [t for layers in self._held.values() for layer in layers for t in layer]
        return sum(t.numel() * t.element_size() for t in tensors)

    def advance(self, adapter: PackedLora) -> Sequence[tuple[Tensor, ...]]:
        """Merge one more layer, if one is left, and return the weights of those that are merged."""
        if not self._usable:
            return ()
        layers = self._held.pop(adapter, [])
        if len(layers) < len(self._weights):
            at = len(layers)
            layers.append(tuple(map(_merge, self._weights[at], adapter.layers[at])))
        self._held[adapter] = layers
        while len(self._held) * self._each_bytes > self._max_bytes:
            self._held.popitem(last=False)
        return layers

    def forget(self, adapter: PackedLora) -> None:
        """Give up an adapter's copy."""
        self._held.pop(adapter, None)


def _merge(weight: Tensor, pair: Pair | None) -> Tensor:
    """Return weight (d_out, d_in) with an adapter added."""
    return weight if pair is None else torch.addmm(weight, pair.b.t(), pair.a)


def _storage_bytes(tensors: Sequence[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
