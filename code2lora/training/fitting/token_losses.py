"""Turn hidden vectors into losses of single tokens through a frozen output head, in small pieces.

The logits of all asked tokens at once would be the largest tensor of a step by far. Only a few are
ever in memory: a piece's losses and its gradients are taken together, and what is kept for the
backward pass is as small as the hidden vectors. The head itself gets no gradient.

n = tokens, D = hidden width, V = size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_LOGITS_AT_ONCE = 1 << 26
"""Logits of a piece, at most: a quarter of a gigabyte in float32."""


def token_nll(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Return (n,) float32: each token's negative log-likelihood, in nats.

    hidden: (n, D), which gets gradients   head: (V, D), which gets none   targets: (n,) int64
    The products are taken in hidden.dtype.
    """
    nll: Tensor = _TokenNll.apply(hidden, head, targets)  # type: ignore[no-untyped-call]
    return nll


def token_divergence(hidden: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    """Return (n,) float32: KL(teacher || student) over the whole vocabulary, in nats.

    hidden: (n, D) of the student, which gets gradients
    teacher: (n, D), which gets none   head: (V, D) of both
    """
    found: Tensor = _TokenDivergence.apply(hidden, teacher, head)  # type: ignore[no-untyped-call]
    return found


class _TokenNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        low = head.to(hidden.dtype)
        nll = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for piece in _pieces(hidden, head):
            wanted = targets[piece, None]
            log_p = (hidden[piece] @ low.T).float().log_softmax(-1)  # (piece, V)
            nll[piece] = -log_p.gather(1, wanted)[:, 0]
            if gradient is not None:
                slope = log_p.exp_()
                slope.scatter_add_(1, wanted, slope.new_full(wanted.shape, -1.0))
                gradient[piece] = slope.to(hidden.dtype) @ low
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (per_token,), (gradient,) = gradients, ctx.saved_tensors
        return gradient * per_token[:, None].to(gradient.dtype), None, None


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
        low = head.to(hidden.dtype)
        found = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for piece in _pieces(hidden, head):
            log_q = (hidden[piece] @ low.T).float().log_softmax(-1)  # (piece, V)
            log_p = (teacher[piece].to(hidden.dtype) @ low.T).float().log_softmax(-1)
            p = log_p.exp()
            found[piece] = (p * (log_p - log_q)).sum(-1)
            if gradient is not None:
                gradient[piece] = log_q.exp_().sub_(p).to(hidden.dtype) @ low
        ctx.save_for_backward(gradient)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (per_token,), (gradient,) = gradients, ctx.saved_tensors
        return gradient * per_token[:, None].to(gradient.dtype), None, None


def _pieces(hidden: Tensor, head: Tensor) -> Iterator[slice]:
    size = max(1, _LOGITS_AT_ONCE // len(head))
    for start in range(0, len(hidden), size):
        yield slice(start, start + size)
