"""Turn rows and adapters into losses: how well each row is written, and by whose adapter.

The base decoder is frozen; every row of a batch has an adapter of its own, so one pass serves many
repositories, and the rows of the margin ride along with their wrong adapters. Rows go through the
base a few at a time, those of like length together; the graphs of all passes are kept until the
gradients are known, with activations computed again in the backward pass where that is asked for.

N = rows, T = tokens, A = adapters, D = hidden width of the decoder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from code2lora.hypernetwork.inject import LoraSlots
from code2lora.hypernetwork.lora import Lora
from code2lora.training.fitting.items import IGNORED
from code2lora.training.fitting.token_losses import token_divergence, token_nll

ROWS_PER_PASS = 10

_P = TypeVar("_P")
_Q = TypeVar("_Q")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Lane:
    """A decoder that shares its weights with those of the other lanes, and its adapter places."""

    model: PreTrainedModel
    slots: LoraSlots


@dataclass(frozen=True)
class Frozen:
    """A base decoder that only lends its gradients to the adapters.

    Rows are divided among the lanes, a thread each. That keeps every core busy where a parallel
    loop inside each product would wait for its slowest part, most of all on a busy machine.
    """

    lanes: tuple[Lane, ...]
    autocast: bool
    """Take matrix products in bfloat16."""
    rows_per_pass: int = ROWS_PER_PASS

    @property
    def device(self) -> torch.device:
        """Where the decoder is."""
        device: torch.device = self.lanes[0].model.device
        return device

    @property
    def head(self) -> Tensor:
        """(V, D), the output head."""
        head: Tensor = self.lanes[0].model.lm_head.weight
        return head


def freeze(
    model: PreTrainedModel,
    *,
    autocast: bool,
    n_lanes: int = 1,
    rows_per_pass: int = ROWS_PER_PASS,
    checkpointing: bool = False,
) -> Frozen:
    """Return the decoder, in evaluation mode and without gradients of its own.

    n_lanes: more than one is for the CPU; elsewhere one is all that is used
    checkpointing: keep only each layer's input for the backward pass, and compute the rest again
    """
    model.train(False).requires_grad_(False)
    lanes = []
    for _ in range(n_lanes if model.device.type == "cpu" else 1):
        # Parameters are put into the memo of the copy, so all lanes share them.
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        own = copy.deepcopy(model, shared)
        if checkpointing:
            checkpoint_layers(own)
        lanes.append(Lane(own, LoraSlots(own)))
    return Frozen(tuple(lanes), autocast, rows_per_pass)


def row_nll(
    base: Frozen, tokens: Tensor, labels: Tensor, lora: Lora | None, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return each row's summed negative log-likelihood, in nats, and its number of tokens.

    tokens, labels: (N, T); labels equal the tokens that are asked for and IGNORED elsewhere
    lora: A adapters, one for all rows (no batch axis), or None for the base alone
    index: (N,) which adapter each row has; None with a single adapter
    returns (N,) float32, differentiable in the adapters, and (N,) int64, both where `tokens` are
    """
    nll, _, n_tokens = row_losses(base, tokens, labels, lora, index)
    return nll, n_tokens


def row_losses(
    base: Frozen,
    tokens: Tensor,
    labels: Tensor,
    lora: Lora | None,
    index: Tensor | None,
    teachers: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `row_nll` does, with each row's divergence from its teacher between the two.

    teachers: for each row what `asked_hidden` found where it was taught, or None
    returns (N,) and (N,) float32, differentiable in the adapters, and (N,) int64; the divergence
        is KL(teacher || row), summed over the asked tokens, in nats; zero without a teacher
    """
    n_tokens = (labels[:, 1:] != IGNORED).sum(1)
    names = [] if lora is None else sorted(lora.a)
    weights = [] if lora is None else [side[t] for side in (lora.a, lora.b) for t in names]
    batch = _Batch(
        base,
        tokens.to(base.device),
        labels.to(base.device),
        lora,
        None if index is None else index.to(base.device),
        names,
        teachers or [None] * len(tokens),
    )
    weights = [weight.to(base.device) for weight in weights]
    found: Tensor = _RowLosses.apply(batch, *weights)  # type: ignore[no-untyped-call]
    found = found.to(tokens.device)
    return found[0], found[1], n_tokens


def weighed(nll: Tensor, n_tokens: Tensor, length_power: float) -> tuple[Tensor, Tensor]:
    """Return (N,) twice: the share of each row in a step's loss, and its weight.

    The loss is the ratio of their sums.
    """
    weight = row_weight(n_tokens.to(nll.device), length_power)
    return nll / n_tokens.to(nll).clamp(min=1) * weight, weight


def row_weight(n_tokens: Tensor, length_power: float) -> Tensor:
    """Return (N,) float32: what rows of so many tokens weigh in a loss, n ** length_power.

    All tokens weigh alike with 1, all rows alike with 0.
    """
    return n_tokens.float() ** length_power


@torch.no_grad()
def asked_hidden(base: Frozen, tokens: Tensor, labels: Tensor) -> list[Tensor]:
    """Return for each row the hidden vectors that its asked tokens are read from, (asked, D).

    The base alone, without an adapter: what it is as a teacher. tokens, labels: as in `row_nll`
    """
    tokens, labels = tokens.to(base.device), labels.to(base.device)
    found: list[Tensor] = [tokens.new_empty(0)] * len(tokens)

    def run(lane: Lane, mine: Tensor) -> None:
        for rows in mine.split(base.rows_per_pass):
            hidden, wanted = _asked(lane, *_cut(tokens, labels, rows), base.autocast)
            counts = (wanted != IGNORED).sum(1).tolist()
            for row, part in zip(rows.tolist(), hidden.split(counts), strict=True):
                found[row] = part

    _in_threads(run, base.lanes, _lane_rows(labels, len(base.lanes)))
    return found


@dataclass(frozen=True)
class _Pass:
    """Some rows' forward pass, whose graph waits for the gradients."""

    rows: Tensor
    used: Tensor | None
    """The adapters that the rows have; None for one adapter, or none."""
    leaves: list[Tensor]
    lora: Lora | None
    index: Tensor | None
    losses: Tensor
    """(2, len(rows)): likelihood and divergence."""


@dataclass(frozen=True)
class _Batch:
    base: Frozen
    tokens: Tensor
    labels: Tensor
    lora: Lora | None
    index: Tensor | None
    names: list[str]
    teachers: Sequence[Tensor | None]

    def forward(self, lane: Lane, rows: Tensor, weights: Sequence[Tensor], grad: bool) -> _Pass:
        """Return the losses of some rows, with a graph if `grad`."""
        used, index = None, None
        if self.index is not None:
            used, index = self.index[rows].unique(return_inverse=True)
        with torch.set_grad_enabled(grad):
            parts = [w.detach() if used is None else w.detach()[used] for w in weights]
            leaves = [part.requires_grad_(grad) for part in parts]
            lora = self._adapters(leaves)
            with lane.slots.use(lora, index):
                losses = self._losses(lane, rows)
        return _Pass(rows, used, leaves, lora, index, losses)

    def backward(self, lane: Lane, done: _Pass, gradient: Tensor) -> list[Tensor]:
        """Return the gradients of a pass's leaves. gradient: (2, N)"""
        # Layers that are computed again need the same adapters in their places.
        with lane.slots.use(done.lora, done.index):
            return list(torch.autograd.grad(done.losses, done.leaves, gradient[:, done.rows]))

    def _adapters(self, leaves: list[Tensor]) -> Lora | None:
        if self.lora is None:
            return None
        dtype = torch.bfloat16 if self.base.autocast else torch.float32
        half = len(self.names)
        # Rounded once for a pass, and not again in every layer.
        low = [leaf.to(dtype) for leaf in leaves]
        return Lora(
            a=dict(zip(self.names, low[:half], strict=True)),
            b=dict(zip(self.names, low[half:], strict=True)),
            rank=self.lora.rank,
            alpha=self.lora.alpha,
        )

    def _losses(self, lane: Lane, rows: Tensor) -> Tensor:
        tokens, labels = _cut(self.tokens, self.labels, rows)
        hidden, wanted = _asked(lane, tokens, labels, self.base.autocast)
        asked = wanted != IGNORED
        row_of = torch.arange(len(rows), device=tokens.device).repeat_interleave(asked.sum(1))
        nll = token_nll(hidden, self.base.head, wanted[asked])
        zeros = nll.new_zeros(len(rows))
        teachers = [self.teachers[row] for row in rows.tolist()]
        shown = [hidden_of for hidden_of in teachers if hidden_of is not None]
        divergence = zeros
        if shown:
            has = torch.tensor([t is not None for t in teachers], device=tokens.device)[row_of]
            kl = token_divergence(hidden[has], torch.cat(shown), self.base.head)
            divergence = zeros.index_add(0, row_of[has], kl)
        return torch.stack([zeros.index_add(0, row_of, nll), divergence])


class _RowLosses(torch.autograd.Function):
    """Forward and backward passes of all lanes at once; the gradient is that of the adapters."""

    @staticmethod
    def forward(ctx: Any, batch: _Batch, *weights: Tensor) -> Tensor:
        grad = any(ctx.needs_input_grad)
        rows = _lane_rows(batch.labels, len(batch.base.lanes))

        def run(lane: Lane, mine: Tensor) -> list[_Pass]:
            parts = mine.split(batch.base.rows_per_pass)
            return [batch.forward(lane, part, weights, grad) for part in parts]

        ctx.batch, ctx.shapes = batch, [(weight.shape, weight.dtype) for weight in weights]
        ctx.passes = _in_threads(run, batch.base.lanes, rows)
        losses = batch.tokens.new_zeros(2, len(batch.tokens), dtype=torch.float32)
        for done in (done for lane in ctx.passes for done in lane):
            losses[:, done.rows] = done.losses.detach()
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients

        def run(lane: Lane, passes: list[_Pass]) -> list[Tensor]:
            totals = [gradient.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.shapes]
            for done in passes:
                found = ctx.batch.backward(lane, done, gradient)
                for total, part in zip(totals, found, strict=True):
                    total.add_(part) if done.used is None else total.index_add_(0, done.used, part)
            return totals

        per_lane = _in_threads(run, ctx.batch.base.lanes, ctx.passes)
        first, *others = per_lane
        for totals in others:
            for total, more in zip(first, totals, strict=True):
                total.add_(more)
        return (None, *first)


def _lane_rows(labels: Tensor, n_lanes: int) -> list[Tensor]:
    """Return the rows of each lane, longest first, all lanes of about equal cost."""
    by_length = _lengths(labels).argsort(descending=True, stable=True)
    found = [by_length[i::n_lanes] for i in range(n_lanes)]
    return [rows for rows in found if len(rows)]


def _lengths(labels: Tensor) -> Tensor:
    """Return (N,): where each row ends, one after its last asked token."""
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return ((labels != IGNORED) * places).amax(1)


def _cut(tokens: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return some rows, as long as the longest of them."""
    end = int(_lengths(labels[rows]).max())
    return tokens[rows, :end], labels[rows, :end]


def _asked(lane: Lane, tokens: Tensor, labels: Tensor, cast: bool) -> tuple[Tensor, Tensor]:
    """Return the hidden vectors before the asked tokens, (n, D), and what each one is to write.

    The second is (rows, T - 1) with IGNORED where nothing is asked.
    """
    wanted = labels[:, 1:]
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=cast):
        hidden = lane.model.model(input_ids=tokens, use_cache=False).last_hidden_state
    # Logits are made only where a token is asked for: they cost as much as the layers.
    chosen = hidden[:, :-1][wanted != IGNORED]
    return (chosen.to(torch.bfloat16) if cast else chosen), wanted


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Let each layer keep its input alone. Dropout stays off, as in the evaluation mode."""
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for layer in model.model.layers:
        inner = layer.forward
        layer.forward = partial(again, inner)


def _in_threads(
    run: Callable[[_P, _Q], _R], firsts: Sequence[_P], seconds: Sequence[_Q]
) -> list[_R]:
    """Return run(first, second) of each pair, each in a thread of its own if there are several."""
    pairs = list(zip(firsts, seconds, strict=False))
    if len(pairs) == 1:
        return [run(*pairs[0])]
    with ThreadPoolExecutor(len(pairs)) as pool:
        return list(pool.map(lambda pair: run(*pair), pairs))
