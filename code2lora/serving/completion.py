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


@dataclass(frozen=True, slots=True)
class ExtraFile:
    """Part of another file that the client thinks helpful."""

    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """What to complete and how. Greedy unless a temperature is given."""

    prompt: str
    """The text before the cursor. Without `suffix` it may hold control tokens of its own."""
    suffix: str | None = None
    """The text after the cursor. When given, prompt and suffix are text and never control tokens,
    unless the prompt already ends in the fill-in-the-middle marker."""
    prompt_ids: tuple[int, ...] | None = None
    """The prompt in the model's own token ids, read as they are instead of `prompt`."""
    score_prompt: bool = False
    """Tell of the prompt's tokens what `logprobs` tells of the produced ones. Nothing of such a
    prompt is left out: one that does not fit is refused."""
    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = 0.0
    """0 takes the likeliest token; above, samples from the softmax of logits / temperature."""
    top_p: float = 1.0
    """Samples among the likeliest tokens that together hold this share of the probability."""
    top_k: int = 0
    """Samples among this many of the likeliest tokens; 0 means all."""
    seed: int | None = None
    """Equal seeds give equal samples; None draws one."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    n: int = 1
    """How many completions of the one prompt; the second samples with the next seed, and so on."""
    greedy_first: bool = False
    """The first of several completions takes the likeliest tokens whatever the temperature."""
    logprobs: int | None = None
    """How many likeliest tokens to tell beside each produced one; None tells nothing."""
    extra: tuple[ExtraFile, ...] = ()
    """Other files to read before the prompt, where there is room and the tokenizer marks files."""
    min_indent: int = 0
    """From its second line on the text ends before a line that is indented less."""
    predict_limit_ms: float | None = None
    """After this long since the first token the text ends at the next line end."""


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
class TokenChance:
    """A token and how likely the model, at temperature 1, held it and others."""

    text: str
    offset: int
    """Where in the completion's, or the prompt's, text it begins, in characters."""
    logprob: float | None
    """None for the first token of a prompt, which follows nothing."""
    top: tuple[tuple[str, float], ...]
    """The likeliest tokens' text and log-probability, the likeliest first."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that became safe to show, with the tokens since the last piece."""

    text: str
    tokens: tuple[TokenChance, ...] = ()
    """Empty unless log-probabilities were asked for. Where the prompt is scored, its tokens come
    first, in a piece without text."""


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
    n_cached_tokens: int = 0
    """Of the prompt's tokens, how many were remembered from an earlier request."""
    stop_text: str | None = None
    """The stop string that ended the text."""
    tokens: tuple[TokenChance, ...] = ()
    """The produced tokens, when log-probabilities were asked for; the end token among them only
    where the prompt is scored."""
    prompt_tokens: tuple[TokenChance, ...] = ()
    """The prompt's tokens, when they were to be scored."""
    index: int = 0
    """Which of its prompt's completions it is."""


@dataclass(frozen=True, slots=True)
class Score:
    """How well a target was predicted."""

    nll: float
    """Summed negative log-likelihood of the target's tokens, in nats."""
    n_tokens: int
    """Target tokens scored; fewer than the target has when it exceeds the context window."""
