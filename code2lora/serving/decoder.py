"""Run a decoder over pieces of several sequences in one pass, each with an adapter of its own.

The decoder's weights stay those of the Hugging Face module, laid side by side where projections
share an input; the pass itself is written out here, because the module's own costs a small model
as much again, and because sequences of different lengths need no padding this way: their tokens
are one list, and only attention is taken sequence by sequence.

Made for layers of the Llama kind (Llama, Mistral, Qwen2, Qwen3); what a module computes otherwise
is found out by comparing with it once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention

from code2lora.errors import UserError
from code2lora.hypernetwork.config import block_of
from code2lora.hypernetwork.projections import TARGETS
from code2lora.serving.kvcache import CacheShape, KvCache
from code2lora.serving.packing import GROUPS, MergedWeights, PackedLora

_PROBE = 6
"""Tokens that are compared when a module is taken over."""
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}  # some modules round norms to float32
_COARSE_TOLERANCE = 0.1  # of the largest score; 16-bit formats round every step of the way


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of one sequence that follow those in its cache."""

    ids: Sequence[int]
    cache: KvCache
    adapter: PackedLora | None = None
    n_logits: int = 1
    """The scores after this many of its last tokens are wanted."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """The weights of one layer."""

    attention_norm: Tensor
    weights: tuple[Tensor, Tensor, Tensor, Tensor]
    """The projections' weights, in the order of GROUPS."""
    biases: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    head_norms: tuple[Tensor, Tensor] | None
    """Qwen3 normalizes queries and keys."""
    mlp_norm: Tensor


class Decoder:
    """A decoder that reads segments. One thread at a time."""

    def __init__(
        self, module: nn.Module, *, context_tokens: int, device: torch.device, merged_bytes: int
    ) -> None:
        """Lay the module's weights out; it shares them and still works.

        merged_bytes: memory for copies of the weights with adapters added in

        Raises UserError when the module is no decoder of a kind that is known here.
        """
        found = _layers(module)
        inner: Any = module.model
        attention = found[0].self_attn
        self.dims = {t: _dims(found[0], t) for t in TARGETS}
        self.n_layers = len(found)
        self._layers = [_read_layer(layer) for layer in found]
        self._embedding: Tensor = inner.embed_tokens.weight
        self._norm: Tensor = inner.norm.weight
        self._output: Tensor = module.lm_head.weight  # type: ignore[union-attr, assignment]
        self.n_scores = len(self._output)
        """Scores after one token."""
        self._epsilon = float(inner.norm.variance_epsilon)
        self._activation = found[0].mlp.act_fn
        self._width = int(attention.head_dim)
        self._scale = float(getattr(attention, "scaling", 1 / math.sqrt(self._width)))
        self._n_heads = self.dims["q_proj"][1] // self._width
        self._n_pairs = self.dims["k_proj"][1] // self._width
        self._cos, self._sin = self._rotations(inner, context_tokens)
        self._merged = MergedWeights(
            [layer.weights for layer in self._layers], max_bytes=merged_bytes
        )
        self.device = device
        self.shape = CacheShape(
            self.n_layers, self._n_pairs, self._width, self._embedding.dtype, device
        )
        self._compare(module)

    @property
    def merged_bytes(self) -> int:
        """Memory that merged copies hold now."""
        return self._merged.size_bytes

    def forget(self, adapter: PackedLora) -> None:
        """Give up what is kept for an adapter."""
        self._merged.forget(adapter)

    def read(self, segments: Sequence[Segment]) -> Tensor:
        """Read every segment, adding it to its cache; return the scores asked for, (n, V).

        The rows are in the order of the segments. What a segment gets does not depend on the
        others but for rounding.
        """
        order = sorted(range(len(segments)), key=lambda i: id(segments[i].adapter))
        batch = _Batch([segments[i] for i in order], self)
        x = self._embedding[batch.ids]
        for number, layer in enumerate(self._layers):
            x = self._layer(x, number, layer, batch)
        for segment in segments:
            segment.cache.length += len(segment.ids)
        x = rms_norm(x[batch.wanted(order)], self._norm.shape, self._norm, self._epsilon)
        return linear(x, self._output)

    def _layer(self, x: Tensor, number: int, layer: _Layer, batch: _Batch) -> Tensor:
        """Return x (T, hidden) after one layer."""
        h = rms_norm(x, layer.attention_norm.shape, layer.attention_norm, self._epsilon)
        heads = batch.project(h, number, 0, layer).view(len(h), -1, self._width)
        if layer.head_norms is not None:
            heads = self._normalize(heads, layer.head_norms)
        heads = torch.addcmul(heads * batch.cos, heads.roll(self._width // 2, -1), batch.sin)
        x = x + batch.project(self._attend(heads, number, batch), number, 1, layer)
        h = rms_norm(x, layer.mlp_norm.shape, layer.mlp_norm, self._epsilon)
        gate, up = batch.project(h, number, 2, layer).chunk(2, dim=-1)
        return x + batch.project(self._activation(gate) * up, number, 3, layer)

    def _attend(self, heads: Tensor, number: int, batch: _Batch) -> Tensor:
        """Add keys and values to the caches and return what the queries find, (T, heads * width).

        heads: (T, queries + keys + values, width), rotated
        """
        found = []
        n_query, n_pair, width = self._n_heads, self._n_pairs, self._width
        for segment, start, mask in zip(batch.segments, batch.starts, batch.masks, strict=True):
            n = len(segment.ids)
            begin, end = segment.cache.length, segment.cache.length + n
            mine = heads[start : start + n]
            stored = segment.cache.layers[number]  # (2, key-value heads, capacity, width)
            new = mine[:, n_query:].view(n, 2, n_pair, width)
            stored[:, :, begin:end] = new.permute(1, 2, 0, 3)
            keys, values = stored[None, 0, :, :end], stored[None, 1, :, :end]
            if mask is None:  # one token: the queries that share a key stand as rows
                query = mine[:, :n_query].view(1, n_pair, -1, width)
                out = scaled_dot_product_attention(query, keys, values, scale=self._scale)
            else:
                query = mine[:, :n_query].transpose(0, 1)[None]
                out = scaled_dot_product_attention(
                    query, keys, values, attn_mask=mask, scale=self._scale, enable_gqa=True
                )[0].transpose(0, 1)
            found.append(out.reshape(n, n_query * width))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _normalize(self, heads: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
        split = [self._n_heads, self._n_pairs, self._n_pairs]
        queries, keys, values = heads.split(split, dim=1)
        shape = (self._width,)
        queries = rms_norm(queries, shape, weights[0], self._epsilon)
        return torch.cat([queries, rms_norm(keys, shape, weights[1], self._epsilon), values], dim=1)

    def _rotations(self, inner: Any, n: int) -> tuple[Tensor, Tensor]:
        """Return the factors of every position, (n, 1, width), the second with rotation's sign."""
        place = self._embedding.device
        positions = torch.arange(n, device=place)[None]
        cos, sin = inner.rotary_emb(self._embedding[:1, None], positions)  # (1, n, width)
        half = self._width // 2
        signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        return cos[0, :, None].contiguous(), signed[0, :, None].contiguous()

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return (T, queries + keys + values, width) factors; values are left as they are."""
        n, rotated = len(positions), self._n_heads + self._n_pairs
        cos = self._cos[positions].expand(n, rotated, self._width)
        sin = self._sin[positions].expand(n, rotated, self._width)
        still = (n, self._n_pairs, self._width)
        return (
            torch.cat([cos, cos.new_ones(still)], dim=1),
            torch.cat([sin, sin.new_zeros(still)], dim=1),
        )

    def merged(self, adapter: PackedLora) -> Sequence[tuple[Tensor, ...]]:
        """Return the merged weights of the first layers, one more with every pass."""
        return self._merged.advance(adapter)

    def _compare(self, module: Any) -> None:
        """Refuse a module whose own pass gives something else."""
        ids = [(7 * i + 3) % self._embedding.shape[0] for i in range(_PROBE)]
        with torch.inference_mode():
            tokens = torch.tensor([ids], device=self._embedding.device)
            expected = module(input_ids=tokens, use_cache=False).logits[0].float()
            cache = KvCache(self.shape, _PROBE)
            first = self.read([Segment(ids[:-2], cache, n_logits=len(ids) - 2)])
            rest = [self.read([Segment([i], cache)]) for i in ids[-2:]]
            found = torch.cat([first, *rest]).float()
        allowed = _TOLERANCE.get(self._embedding.dtype, _COARSE_TOLERANCE)
        if not (found - expected).abs().max() <= allowed * expected.abs().max().clamp(min=1.0):
            raise _unknown(module, "its layers compute something else than Llama's")


class _Batch:
    """What all layers of one pass share. Segments with the same adapter stand side by side."""

    def __init__(self, segments: Sequence[Segment], decoder: Decoder) -> None:
        self.segments = segments
        lengths = [len(segment.ids) for segment in segments]
        self.starts = [sum(lengths[:i]) for i in range(len(lengths))]
        positions: list[int] = []
        for segment in segments:
            segment.cache.reserve(len(segment.ids))
            begin = segment.cache.length
            positions.extend(range(begin, begin + len(segment.ids)))
        device = decoder.device
        self.ids = torch.tensor([i for s in segments for i in s.ids], device=device)
        self.cos, self.sin = decoder.rotation(torch.tensor(positions, device=device))
        self.masks = [_mask(segment, self.cos) for segment in segments]
        self._groups = self._adapted(sum(lengths))
        adapters = {segment.adapter for segment in segments}
        only = adapters.pop() if len(adapters) == 1 else None
        self._merged = decoder.merged(only) if only is not None else ()

    def project(self, x: Tensor, number: int, group: int, layer: _Layer) -> Tensor:
        """Return what one group of projections makes of x (T, d_in), adapters included."""
        if number < len(self._merged):
            return linear(x, self._merged[number][group], layer.biases[group])
        out = linear(x, layer.weights[group], layer.biases[group])
        for start, end, adapter in self._groups:
            pair = adapter.layers[number][group]
            if pair is not None:
                out[start:end].addmm_(linear(x[start:end], pair.a), pair.b)
        return out

    def wanted(self, order: Sequence[int]) -> Tensor:
        """Return the rows whose scores are asked for, in the order of the caller's segments."""
        rows: list[list[int]] = [[] for _ in order]
        for place, segment, start in zip(order, self.segments, self.starts, strict=True):
            end = start + len(segment.ids)
            rows[place] = list(range(end - segment.n_logits, end))
        flat = [i for row in rows for i in row]
        return torch.tensor(flat, device=self.ids.device, dtype=torch.int64)

    def _adapted(self, n_tokens: int) -> list[tuple[int, int, PackedLora]]:
        """Return the stretches of tokens that one adapter is for."""
        groups: list[tuple[int, int, PackedLora]] = []
        ends = [*self.starts[1:], n_tokens]
        for segment, start, end in zip(self.segments, self.starts, ends, strict=True):
            if segment.adapter is None:
                continue
            if groups and groups[-1][2] is segment.adapter:
                start = groups.pop()[0]
            groups.append((start, end, segment.adapter))
        return groups


def _mask(segment: Segment, like: Tensor) -> Tensor | None:
    """Return what keeps a token from seeing later ones, (n, cached + n); None for one token."""
    n, begin = len(segment.ids), segment.cache.length
    if n == 1:
        return None
    return like.new_full((n, begin + n), -math.inf).triu_(diagonal=begin + 1)


def _layers(module: Any) -> list[Any]:
    layers = getattr(getattr(module, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise _unknown(module, "it has no `model.layers`")
    wanted = ["input_layernorm", "post_attention_layernorm", "mlp.act_fn", "self_attn.head_dim"]
    wanted += [f"{block_of(target)}.{target}" for target in TARGETS]
    for i, layer in enumerate(layers):
        for path in wanted:
            if _attribute(layer, path) is None:
                raise _unknown(module, f"its layer {i} has no {path}")
    for path in ("model.embed_tokens", "model.rotary_emb", "model.norm.variance_epsilon"):
        if _attribute(module, path) is None:
            raise _unknown(module, f"it has no {path}")
    if getattr(module, "lm_head", None) is None:
        raise _unknown(module, "it has no lm_head")
    return list(layers)


def _attribute(thing: Any, path: str) -> Any:
    for name in path.split("."):
        thing = getattr(thing, name, None)
    return thing


def _unknown(module: object, why: str) -> UserError:
    return UserError(
        f"{type(module).__name__} is not a decoder that can be served: {why}",
        hint="use a decoder of the Llama, Mistral, Qwen2 or Qwen3 kind",
    )


def _dims(layer: Any, target: str) -> tuple[int, int]:
    module = getattr(getattr(layer, block_of(target)), target)
    return module.in_features, module.out_features


def _read_layer(layer: Any) -> _Layer:
    joined = [_join([getattr(getattr(layer, block_of(t)), t) for t in group]) for group in GROUPS]
    attention = layer.self_attn
    normed = hasattr(attention, "q_norm")
    return _Layer(
        attention_norm=layer.input_layernorm.weight,
        weights=tuple(weight for weight, _ in joined),  # type: ignore[arg-type]
        biases=tuple(bias for _, bias in joined),  # type: ignore[arg-type]
        head_norms=(attention.q_norm.weight, attention.k_norm.weight) if normed else None,
        mlp_norm=layer.post_attention_layernorm.weight,
    )


def _join(modules: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """Return the modules' weights as one matrix; the modules keep working, on views of it."""
    if len(modules) == 1:
        return modules[0].weight, modules[0].bias
    weight = torch.cat([module.weight for module in modules])
    start = 0
    for module in modules:
        view = weight[start : start + module.out_features]
        module.weight = nn.Parameter(view, requires_grad=False)
        start += module.out_features
    biases = [module.bias for module in modules]
    return weight, None if biases[0] is None else torch.cat(biases)
