"""What a completion is asked with and what it gives, as plain values without torch.

The engine, the HTTP application and the client (which must start fast) share these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Use = Literal["own", "generic", "base"]
"""Which weights answer: the repository's adapter, the mean repository's, or none."""

FinishReason = Literal["stop", "length", "cancelled"]
"""`stop`: an end token or a stop string; `length`: no room or leave for more tokens; `cancelled`:
the caller wants no more."""

DEFAULT_MAX_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """What to complete and how. Greedy unless a temperature is given."""

    prompt: str
    """The text before the cursor. Without `suffix` it may hold control tokens of its own."""
    suffix: str | None = None
    """The text after the cursor. When given, prompt and suffix are text and never control tokens,
    unless the prompt already ends in the fill-in-the-middle marker."""
    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = 0.0
    """0 takes the likeliest token; above, samples from the softmax of logits / temperature."""
    top_p: float = 1.0
    """Samples among the likeliest tokens that together hold this share of the probability."""
    seed: int | None = None
    """Equal seeds give equal samples; None draws one."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""


@dataclass(frozen=True, slots=True)
class AdapterIdentity:
    """Which adapter answered."""

    repository: str | None
    """The repository's id; None for the generic adapter."""
    commit: str | None
    """The commit whose state the adapter was made from; None for the generic adapter."""
    generation: str
    """The name of the adapter's immutable directory: equal names, equal weights."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The text that was decoded, and what it took."""

    text: str
    finish_reason: FinishReason
    n_prompt_tokens: int
    """Tokens the model read, after truncation to the context window."""
    n_tokens: int
    """Tokens the model produced, without the end token."""
    first_token_ms: float | None
    """From the call to the first token; None when none was asked for or the call was cancelled."""
    total_ms: float
    adapter: AdapterIdentity | None
    """None: the base model alone."""


@dataclass(frozen=True, slots=True)
class Score:
    """How well a target was predicted."""

    nll: float
    """Summed negative log-likelihood of the target's tokens, in nats."""
    n_tokens: int
    """Target tokens scored; fewer than the target has when it exceeds the context window."""
