"""Turn a context vector into LoRA weights: the paper's head, the factorized one, the memory's.

All are modules with `forward(context (N, D)) -> Lora` with a batch axis, `generic() -> Lora`
without one (the adapter of the mean repository), and `recentre(contexts)`, which sets that mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from code2lora.errors import UserError
from code2lora.hypernetwork.config import BaseConfig, HeadConfig
from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.projections import TARGETS

Dims = Mapping[str, tuple[int, int]]

_LOG_SCALE_INIT = -3.5
_SCALE_RANGE = (1e-5, 0.3)
_TASK_INIT_STD = 0.02
_GAIN_UNIT, _GAIN_INIT = 0.04, 0.03
"""Of the memory head's step. The unit makes one learning rate serve gains and matrices."""
_MIX_UNIT = 0.3
_REACH = 1.5
"""Of the median repository's distance from the mean one: how far a memory head steps at most."""


class PaperHead(nn.Module):
    """The released head: a trunk and two linear maps a module type; all layers share one pair.

    Parameter names, views and the clamped scales are those of the released checkpoints.
    """

    mean_context: Tensor
    """(D,) the context of the mean repository, for `generic`; zero until `recentre`."""

    def __init__(self, config: HeadConfig, dims: Dims) -> None:
        super().__init__()
        self.rank = config.rank
        self.alpha = config.alpha
        width = config.trunk_width
        self.trunk = nn.Sequential(
            nn.Linear(config.context_width + config.task_width, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
        )
        self.heads_A = nn.ModuleDict({t: nn.Linear(width, self.rank * dims[t][0]) for t in TARGETS})
        self.heads_B = nn.ModuleDict({t: nn.Linear(width, dims[t][1] * self.rank) for t in TARGETS})
        self.log_scale_A = nn.ParameterDict({t: _log_scale() for t in TARGETS})
        self.log_scale_B = nn.ParameterDict({t: _log_scale() for t in TARGETS})
        self.task_embedding: nn.Embedding | None = None
        if config.n_tasks:
            self.task_embedding = nn.Embedding(config.n_tasks, config.task_width)
            nn.init.normal_(self.task_embedding.weight, std=_TASK_INIT_STD)
        self.register_buffer("mean_context", torch.zeros(config.context_width))

    def forward(self, context: Tensor, task: int = 0) -> Lora:
        """Return N adapters for contexts (N, D): A (N, 1, R, d_in), B (N, 1, d_out, R).

        task: row of the task embedding, where the head has one.
        """
        n = context.shape[0]
        if self.task_embedding is not None:
            row = self.task_embedding.weight[task].expand(n, -1)
            context = torch.cat([context, row], dim=-1)
        hidden = self.trunk(context)
        hidden = nn.functional.normalize(hidden, dim=-1) * math.sqrt(hidden.shape[-1])
        a, b = {}, {}
        for target in TARGETS:
            raw_a = self.heads_A[target](hidden).view(n, 1, self.rank, -1)
            raw_b = self.heads_B[target](hidden).view(n, 1, -1, self.rank)
            a[target] = torch.tanh(raw_a) * _scale(self.log_scale_A[target])
            b[target] = torch.tanh(raw_b) * _scale(self.log_scale_B[target])
        return Lora(a=a, b=b, rank=self.rank, alpha=self.alpha)

    def generic(self) -> Lora:
        """Return the adapter of the mean context, without a batch axis."""
        return first(self(self.mean_context[None]))

    @torch.no_grad()
    def recentre(self, contexts: Tensor) -> None:
        """Make the mean of contexts (N, D) the mean repository; only `generic` changes."""
        self.mean_context.copy_(contexts.mean(0))


class FactorizedHead(nn.Module):
    """Shared directions, and an R x R core between them that the repository moves.

    In layer l and module type t, with z the trunk's output and its mean subtracted:

        delta W = alpha / R * B_lt (C0_lt + W_lt z) A_lt

    C0 starts as the identity and W, which has no bias, as zero: the adapter starts generic, and
    whatever differs between repositories has to come through z. B starts small and not at zero,
    so gradient reaches the cores at the first step. The core folds into B, so what comes out is
    plain LoRA of rank R.
    """

    z_mean: Tensor
    """(H,) the trunk's output for the mean repository."""

    def __init__(self, config: HeadConfig, dims: Dims, n_layers: int) -> None:
        super().__init__()
        self.rank = config.rank
        self.alpha = config.alpha
        rank, width = config.rank, config.trunk_width
        self.core_shape = (n_layers, len(TARGETS), rank, rank)
        self.trunk = nn.Sequential(nn.Linear(config.context_width, width), nn.GELU())
        self.a = nn.ParameterDict(
            {t: _normal((n_layers, rank, d_in), d_in**-0.5) for t, (d_in, _) in _ordered(dims)}
        )
        self.b = nn.ParameterDict(
            {t: _normal((n_layers, d_out, rank), 0.1 / rank) for t, (_, d_out) in _ordered(dims)}
        )
        self.core = nn.Parameter(torch.eye(rank).expand(self.core_shape).clone())
        self.residual = nn.Linear(width, math.prod(self.core_shape), bias=False)
        nn.init.zeros_(self.residual.weight)
        self.register_buffer("z_mean", torch.zeros(width))

    def forward(self, context: Tensor) -> Lora:
        """Return N adapters for contexts (N, D): A (N, L, R, d_in), B (N, L, d_out, R)."""
        return self._compose(self.trunk(context) - self.z_mean)

    def generic(self) -> Lora:
        """Return the adapter whose residual is zero, without a batch axis."""
        return first(self._compose(torch.zeros_like(self.z_mean)[None]))

    @torch.no_grad()
    def recentre(self, contexts: Tensor) -> None:
        """Make the mean of contexts (N, D) the mean repository; only `generic` changes."""
        self.fold_mean(self.trunk(contexts).mean(0))

    @torch.no_grad()
    def fold_mean(self, z_bar: Tensor) -> None:
        """Make z_bar (H,) the mean of the trunk's output without changing the map.

        What W does with the difference of the means moves into C0, so `generic` becomes the
        adapter of the repository whose trunk output is z_bar.
        """
        moved = self.residual(z_bar - self.z_mean)
        self.core.add_(moved.view(self.core_shape))
        self.z_mean.copy_(z_bar)

    def _compose(self, z: Tensor) -> Lora:
        n = z.shape[0]
        core = self.core + self.residual(z).view(n, *self.core_shape)  # (N, L, 7, R, R)
        a, b = {}, {}
        for i, target in enumerate(TARGETS):
            a[target] = self.a[target].expand(n, -1, -1, -1)
            b[target] = self.b[target] @ core[:, :, i]
        return Lora(a=a, b=b, rank=self.rank, alpha=self.alpha)


class MemoryHead(nn.Module):
    """One learned step along a repository's own gradients, taken from a learned generic adapter.

    In layer l and module type t, with C the context's block of that projection (d_out, R), or
    nothing where it has none, and its mean over repositories subtracted:

        delta W = alpha / R * (B_lt - (I + P_lt) C_lt diag(g_lt)) A_lt

    With A the keys of the gradients and P zero, that is the first step of training this LoRA on the
    repository's own code. A, B, P and g are learned from there: which step to take, and from where.
    A step is no longer than what most repositories take: a few files of a kind that the base has
    never seen, such as tables or another language, have gradients that would drown all else.
    """

    mean: Tensor
    """(W,) the context of the mean repository."""
    reach: Tensor
    """() the distance from the mean context beyond which a context counts as if it were so far."""

    def __init__(self, config: HeadConfig, base: BaseConfig) -> None:
        """Raises UserError when the blocks do not fit the context, the rank or the base model."""
        super().__init__()
        assert config.blocks is not None, "parse_config saw to it"
        self.rank = config.rank
        self.alpha = config.alpha
        self.blocks = config.blocks
        blocks, dims = config.blocks, base.dims
        fits = (config.context_width, config.rank) == (blocks.width, blocks.n_keys)
        fits = fits and set(blocks.layers) <= set(range(base.n_layers))
        if not fits or any(dims.get(t, (0, 0))[1] != n for t, n in blocks.outputs.items()):
            raise UserError(
                f"head.blocks has {blocks.width} numbers, {blocks.n_keys} keys, layers "
                f"{blocks.layers} and outputs {blocks.outputs}, which do not fit the head's width "
                f"{config.context_width}, its rank {config.rank} or the base model"
            )
        n, rank = base.n_layers, config.rank
        self.a = nn.ParameterDict(
            {t: _normal((n, rank, d_in), d_in**-0.5) for t, (d_in, _) in _ordered(dims)}
        )
        self.b = nn.ParameterDict(
            {t: _normal((n, d_out, rank), 0.02 / rank) for t, (_, d_out) in _ordered(dims)}
        )
        self.p = nn.ParameterDict(
            {
                _place(layer, t): nn.Parameter(torch.zeros(blocks.outputs[t], blocks.outputs[t]))
                for layer, t in blocks.places
            }
        )
        self.g = nn.ParameterDict(
            {
                _place(layer, t): nn.Parameter(torch.full((rank,), _GAIN_INIT))
                for layer, t in blocks.places
            }
        )
        self.register_buffer("mean", torch.zeros(blocks.width))
        self.register_buffer("reach", torch.tensor(torch.inf))

    def forward(self, context: Tensor) -> Lora:
        """Return N adapters for contexts (N, W): A (N, L, R, d_in), B (N, L, d_out, R)."""
        step = context - self.mean
        length = step.norm(dim=1, keepdim=True).clamp(min=torch.finfo(step.dtype).tiny)
        return self._stepped(step * (self.reach / length).clamp(max=1.0))

    def _stepped(self, step: Tensor) -> Lora:
        """Return N adapters for steps (N, W) from the mean context."""
        n = step.shape[0]
        parts = step.split(self.blocks.sizes, dim=1)
        cores = {
            place: part.view(n, -1, self.rank)
            for place, part in zip(self.blocks.places, parts, strict=True)
        }
        a, b = {}, {}
        for target in TARGETS:
            generic = self.b[target]
            layers = [
                self._moved(generic[layer], cores.get((layer, target)), _place(layer, target), n)
                for layer in range(len(generic))
            ]
            a[target] = self.a[target].expand(n, -1, -1, -1)
            b[target] = torch.stack(layers, dim=1)
        return Lora(a=a, b=b, rank=self.rank, alpha=self.alpha)

    def generic(self) -> Lora:
        """Return the adapter of the mean context, without a batch axis."""
        return first(self(self.mean[None]))

    @torch.no_grad()
    def recentre(self, contexts: Tensor) -> None:
        """Make the mean of contexts (N, W) the mean repository, and `reach` that of the median one.

        Only `generic` changes, and what is farther from the mean than `reach`.
        """
        mean = contexts.mean(0)
        moved = first(self._stepped((mean - self.mean)[None]))
        for target in TARGETS:
            self.b[target].copy_(moved.b[target])
        self.mean.copy_(mean)
        self.reach.copy_(_REACH * (contexts - mean).norm(dim=1).median())

    @torch.no_grad()
    def begin_at(self, keys: Mapping[tuple[int, str], Tensor]) -> None:
        """Make the adapter a plain gradient step. keys: place of each block -> (R, d_in)"""
        for (layer, target), rows in keys.items():
            self.a[target][layer] = nn.functional.normalize(rows, dim=1)

    def _moved(self, generic: Tensor, core: Tensor | None, place: str, n: int) -> Tensor:
        """Return B of one projection for N repositories, (N, d_out, R)."""
        if core is None:
            return generic.expand(n, -1, -1)
        turned = core + (self.p[place] @ core) * _MIX_UNIT
        step: Tensor = turned * (self.g[place] * _GAIN_UNIT)
        return generic - step


Head = PaperHead | FactorizedHead | MemoryHead


def build_head(config: HeadConfig, base: BaseConfig) -> Head:
    """Return a freshly initialised head for a base model.

    Raises UserError when the configuration asks for what the head does not have.
    """
    if bool(config.n_tasks) != bool(config.task_width):
        raise UserError("head.n_tasks and head.task_width must both be zero or both be positive")
    if config.kind == "paper":
        return PaperHead(config, base.dims)
    if config.kind == "memory":
        return MemoryHead(config, base)
    if config.n_tasks:
        raise UserError("the factorized head has no task embedding; set head.n_tasks to 0")
    return FactorizedHead(config, base.dims, base.n_layers)


def first(lora: Lora) -> Lora:
    """Return the first adapter of a batch, sharing storage and without the batch axis."""
    return Lora(
        a={t: v[0] for t, v in lora.a.items()},
        b={t: v[0] for t, v in lora.b.items()},
        rank=lora.rank,
        alpha=lora.alpha,
    )


def _place(layer: int, target: str) -> str:
    return f"{layer}_{target}"


def _ordered(dims: Dims) -> list[tuple[str, tuple[int, int]]]:
    return [(target, dims[target]) for target in TARGETS]


def _log_scale() -> nn.Parameter:
    return nn.Parameter(torch.tensor(_LOG_SCALE_INIT))


def _scale(log_scale: Tensor) -> Tensor:
    return log_scale.exp().clamp(*_SCALE_RANGE)


def _normal(shape: tuple[int, ...], std: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * std)
