"""Add generated LoRA weights to a decoder's projections while it runs.

Changes nothing in the model but forward hooks: no module is replaced and no weight is written,
so a swap is one reference assignment and taking the hooks out leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from code2lora.errors import UserError
from code2lora.hypernetwork.config import block_of
from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.projections import TARGETS


@dataclass(frozen=True)
class _Active:
    """What the hooks read: one object, so that a swap can never be seen half done."""

    pairs: list[tuple[Tensor, Tensor] | None]
    """(A, B) of each slot, in slot order; views of the adapter's own storage."""
    scale: float
    batched: bool
    index: Tensor | None


class LoraSlots:
    """The adapter places of one decoder: seven projections in every layer.

    Serving: `slots.set(lora)`, `slots.set(None)`. Training: `with slots.use(batch_of_loras):`.
    Not for use from several threads at once; the caller holds one lock around forward and swap.
    """

    def __init__(self, model: nn.Module) -> None:
        """Install the hooks. Raises UserError when the model lacks one of the projections."""
        modules = projections(model)
        self.n_layers = len(modules) // len(TARGETS)
        self._dims = {
            target: (module.in_features, module.out_features)
            for (_, target), module in modules.items()
        }
        self._slots = list(modules)
        self._active: _Active | None = None
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(self._hook(slot))
            for slot, module in enumerate(modules.values())
        ]

    def set(self, lora: Lora | None) -> None:
        """Let every later forward pass use this adapter, or none. Costs no copy.

        Raises UserError when its shapes are not the model's; the old adapter then stays.
        """
        self._active = None if lora is None else self._prepare(lora, None)

    @contextmanager
    def use(self, lora: Lora | None, index: Tensor | None = None) -> Iterator[None]:
        """Use an adapter inside the block, then what was in use before.

        A batched adapter (N of them) takes N * m sequences grouped by repository: the first m use
        adapter 0. With `index` (batch,), int64, sequence i uses adapter index[i] instead. Where
        activation checkpointing recomputes the forward pass, run backward inside the block.
        Raises UserError when the adapter's shapes are not the model's.
        """
        before = self._active
        self._active = None if lora is None else self._prepare(lora, index)
        try:
            yield
        finally:
            self._active = before

    def remove(self) -> None:
        """Take the hooks out; the model is as it was before."""
        self._active = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _prepare(self, lora: Lora, index: Tensor | None) -> _Active:
        for target in lora.a:
            self._check(lora, target)
        pairs = [lora.layer(t, layer) if t in lora.a else None for layer, t in self._slots]
        batched = next(iter(lora.a.values())).dim() == 4
        if index is not None and not batched:
            raise AssertionError("an index needs a batch of adapters")
        return _Active(pairs, lora.scale, batched, index)

    def _check(self, lora: Lora, target: str) -> None:
        a, b = lora.a[target], lora.b[target]
        d_in, d_out = self._dims.get(target, (0, 0))
        layers = (a.shape[-3], b.shape[-3])
        if (a.shape[-2:], b.shape[-2:]) != ((lora.rank, d_in), (d_out, lora.rank)) or any(
            n not in (1, self.n_layers) for n in layers
        ):
            raise UserError(
                f"the adapter's {target} has shapes A {tuple(a.shape)} and B {tuple(b.shape)}, "
                f"but the model has {self.n_layers} layers of {d_in} -> {d_out}",
                hint="use an adapter that was made for this base model",
            )

    def _hook(self, slot: int) -> Any:
        def add_delta(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            active = self._active
            if active is None:
                return None
            pair = active.pairs[slot]
            if pair is None:
                return None
            if active.batched:
                return output + _batched_delta(inputs[0], *pair, active).to(output.dtype)
            return _add_plain(output, inputs[0], *pair, active.scale)

        return add_delta


def _add_plain(output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return output + scale * (x A^T) B^T for one adapter, x (..., d_in), output (..., d_out)."""
    low = nn.functional.linear(x.to(a.dtype), a)  # (..., R)
    if output.dtype != a.dtype:
        return output + nn.functional.linear(low * scale, b).to(output.dtype)
    flat = torch.addmm(output.flatten(0, -2), low.flatten(0, -2), b.t(), alpha=scale)
    return flat.view(output.shape)


def _batched_delta(x: Tensor, a: Tensor, b: Tensor, active: _Active) -> Tensor:
    """Return scale * (x A^T) B^T with a repository's own A and B for each sequence.

    x: (batch, T, d_in)   a: (N, R, d_in)   b: (N, d_out, R)   returns (batch, T, d_out)
    """
    batch, n_tokens, d_in = x.shape
    if active.index is not None:
        a, b = a[active.index], b[active.index]  # (batch, R, d_in), (batch, d_out, R)
    elif batch % a.shape[0]:
        raise AssertionError(f"{batch} sequences cannot be split among {a.shape[0]} adapters")
    grouped = x.to(a.dtype).reshape(a.shape[0], -1, d_in)  # (N, m * T, d_in)
    low = torch.bmm(grouped, a.transpose(1, 2)) * active.scale  # (N, m * T, R)
    return torch.bmm(low, b.transpose(1, 2)).view(batch, n_tokens, -1)


def projections(model: nn.Module) -> dict[tuple[int, str], Any]:
    """Return (layer, module type) -> projection of `model.model.layers`."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UserError(
            f"{type(model).__name__} has no `model.layers`",
            hint="use a decoder of the Qwen2 or Llama kind",
        )
    found = {}
    for i, layer in enumerate(layers):
        for target in TARGETS:
            module = getattr(getattr(layer, block_of(target), None), target, None)
            if module is None:
                raise UserError(
                    f"layer {i} of {type(model).__name__} has no {block_of(target)}.{target}",
                    hint="use a decoder with the projections q, k, v, o, gate, up and down",
                )
            found[i, target] = module
    return found
