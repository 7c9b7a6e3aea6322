"""Turn states and features into bytes and back, and measure how far a state has moved.

The bytes are safetensors: the same tensors give the same bytes, and nothing is ever unpickled.
"""

from __future__ import annotations

import math

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from code2lora.errors import UserError
from code2lora.hypernetwork.family import State

_FEATURES = "features"


def pack(state: State) -> bytes:
    """Return the bytes of a state; equal states give equal bytes."""
    return save({name: tensor.contiguous() for name, tensor in state.items()})


def unpack(data: bytes) -> State:
    """Return the state that `pack` wrote. Raises UserError when the bytes are damaged."""
    try:
        return load(data)
    except SafetensorError as error:
        raise UserError(
            f"a stored state is damaged: {error}",
            hint="stop the daemon and delete the database; the states are computed again from git",
        ) from error


def pack_tensor(features: Tensor) -> bytes:
    """Return the bytes of one features tensor; in half precision, where that keeps every bit."""
    half = features.half()
    return pack({_FEATURES: half if torch.equal(half.float(), features) else features})


def unpack_tensor(data: bytes) -> Tensor:
    """Return the tensor that `pack_tensor` wrote, float32. Raises UserError when it is damaged."""
    state = unpack(data)
    if set(state) != {_FEATURES}:
        raise UserError(f"stored features are damaged: they hold {sorted(state)}")
    return state[_FEATURES].float()


def drift(before: State, after: State) -> float:
    """Return 1 - cosine of two states of one family: 0 for the same direction, 2 for opposite."""
    x, y = _flat(before), _flat(after)
    if torch.equal(x, y):
        return 0.0
    norms = math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))
    return 1.0 - float(x @ y) / norms if norms else 1.0


def _flat(state: State) -> Tensor:
    return torch.cat([state[name].flatten().double() for name in sorted(state)])
