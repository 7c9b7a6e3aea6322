"""Turn rows and adapters into losses: how well each row is written, and by whose adapter.

The base decoder is frozen; every row of a batch has an adapter of its own, so one pass serves many
repositories, and the rows of the margin ride along with their wrong adapters.

N = rows, T = tokens, A = adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from code2lora.hypernetwork.inject import LoraSlots
from code2lora.hypernetwork.lora import Lora
from code2lora.training.fitting.items import IGNORED

_ROWS_PER_PASS = 10

_P = TypeVar("_P")
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


def freeze(model: PreTrainedModel, *, autocast: bool, n_lanes: int = 1) -> Frozen:
    """Return the decoder, in evaluation mode and without gradients of its own."""
    model.train(False).requires_grad_(False)
    lanes = []
    for _ in range(n_lanes):
        # Parameters are put into the memo of the copy, so all lanes share them.
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        own = copy.deepcopy(model, shared)
        lanes.append(Lane(own, LoraSlots(own)))
    return Frozen(tuple(lanes), autocast)


def row_nll(
    base: Frozen, tokens: Tensor, labels: Tensor, lora: Lora | None, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return each row's summed negative log-likelihood, in nats, and its number of tokens.

    tokens, labels: (N, T); labels equal the tokens that are asked for and IGNORED elsewhere
    lora: A adapters, one for all rows (no batch axis), or None for the base alone
    index: (N,) which adapter each row has; None with a single adapter
    returns (N,) float32, differentiable in the adapters, and (N,) int64
    """
    n_tokens = (labels[:, 1:] != IGNORED).sum(1)
    names = [] if lora is None else sorted(lora.a)
    weights = [] if lora is None else [side[t] for side in (lora.a, lora.b) for t in names]
    batch = _Batch(base, tokens, labels, lora, index, names)
    nll: Tensor = _RowNll.apply(batch, *weights)  # type: ignore[no-untyped-call]
    return nll, n_tokens


@dataclass(frozen=True)
class _Batch:
    base: Frozen
    tokens: Tensor
    labels: Tensor
    lora: Lora | None
    index: Tensor | None
    names: list[str]

    def rows(self) -> list[Tensor]:
        """Return the rows of each lane, longest first, all lanes of about equal cost."""
        by_length = _lengths(self.labels).argsort(descending=True, stable=True)
        found = [by_length[i :: len(self.base.lanes)] for i in range(len(self.base.lanes))]
        return [rows for rows in found if len(rows)]

    def forward(self, lane: Lane, rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Return the NLL of some rows, (len(rows),)."""
        lora = None
        if self.lora is not None:
            half = len(self.names)
            a = dict(zip(self.names, weights[:half], strict=True))
            b = dict(zip(self.names, weights[half:], strict=True))
            lora = Lora(a=a, b=b, rank=self.lora.rank, alpha=self.lora.alpha)
        # Rows of a pass are padded to the longest of them, so each pass takes rows of like length.
        found = []
        for mine in rows.split(_ROWS_PER_PASS):
            labels = self.labels[mine]
            end = int(_lengths(labels).max())
            index = None if self.index is None else self.index[mine]
            tokens, labels = self.tokens[mine, :end], labels[:, :end]
            found.append(_pass_nll(lane, tokens, labels, lora, index, self.base.autocast))
        return torch.cat(found)


class _RowNll(torch.autograd.Function):
    """Forward and backward passes of all lanes at once; the gradient is that of the adapters."""

    @staticmethod
    def forward(ctx: Any, batch: _Batch, *weights: Tensor) -> Tensor:
        needed = any(ctx.needs_input_grad)
        rows = batch.rows()

        def run(lane: Lane, mine: Tensor) -> tuple[list[Tensor], Tensor]:
            with torch.set_grad_enabled(needed):
                leaves = [weight.detach().requires_grad_(needed) for weight in weights]
                return leaves, batch.forward(lane, mine, leaves)

        ctx.parts = _in_threads(run, batch.base.lanes, rows)
        ctx.rows = rows
        nll = torch.zeros(len(batch.tokens))
        for mine, (_, part) in zip(rows, ctx.parts, strict=True):
            nll[mine] = part.detach()
        return nll

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients

        def run(part: tuple[list[Tensor], Tensor], mine: Tensor) -> list[Tensor]:
            leaves, nll = part
            return list(torch.autograd.grad(nll, leaves, gradient[mine]))

        per_lane = _in_threads(run, ctx.parts, ctx.rows)
        return (None, *(torch.stack(each).sum(0) for each in zip(*per_lane, strict=True)))


def _lengths(labels: Tensor) -> Tensor:
    """Return (N,): where each row ends, one after its last asked token."""
    places = torch.arange(1, labels.shape[1] + 1)
    return ((labels != IGNORED) * places).amax(1)


def _pass_nll(
    lane: Lane, tokens: Tensor, labels: Tensor, lora: Lora | None, index: Tensor | None, cast: bool
) -> Tensor:
    asked = labels[:, 1:] != IGNORED
    with torch.autocast("cpu", torch.bfloat16, enabled=cast), lane.slots.use(lora, index):
        hidden = lane.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        # Logits are made only where a token is asked for: they cost as much as the layers.
        logits = lane.model.lm_head(hidden[:, :-1][asked])
    losses = nn.functional.cross_entropy(logits.float(), labels[:, 1:][asked], reduction="none")
    row_of = torch.arange(len(tokens)).repeat_interleave(asked.sum(1))
    return torch.zeros(len(tokens)).index_add(0, row_of, losses)


def _in_threads(
    run: Callable[[_P, Tensor], _R], firsts: Sequence[_P], rows: Sequence[Tensor]
) -> list[_R]:
    """Return run(first, rows) of each pair, each in a thread of its own if there are several."""
    pairs = list(zip(firsts, rows, strict=False))
    if len(pairs) == 1:
        return [run(*pairs[0])]
    with ThreadPoolExecutor(len(pairs)) as pool:
        return list(pool.map(lambda pair: run(*pair), pairs))


def wrong_adapters(repository_of: Tensor, adapter_of: Tensor) -> Tensor:
    """Return (N,): for each row an adapter of the next repository in the batch.

    repository_of: (A,) each adapter's repository
    adapter_of: (N,) each row's own adapter
    The adapter has the same place among its repository's adapters, as far as there are so many.
    Raises ValueError when there is only one repository.
    """
    repositories = list(dict.fromkeys(repository_of.tolist()))
    if len(repositories) < 2:
        raise ValueError("a wrong adapter needs a second repository in the batch")
    members = [torch.nonzero(repository_of == each)[:, 0] for each in repositories]
    wrong = torch.empty_like(repository_of)
    for i, own in enumerate(members):
        other = members[(i + 1) % len(members)]
        wrong[own] = other[torch.arange(len(own)).clamp(max=len(other) - 1)]
    return wrong[adapter_of]


def margin_loss(own: Tensor, wrong: Tensor, margin: float) -> Tensor:
    """Return the mean of max(0, margin + own - wrong): zero where own is better by the margin.

    own, wrong: (N,) nats per token of the same rows under their own and another adapter
    """
    return (margin + own - wrong).clamp(min=0).mean()
