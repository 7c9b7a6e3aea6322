"""Turn a prefix, with or without other text above it, into the tokens that a decoder is given.

Every row of a comparison has the same budget: what a context takes is missing from the prefix,
which is cut on its left. Nothing of the target is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer

from code2lora.training.pretraining.tokenizer import (
    ADDED_TOKENS,
    END_OF_TEXT,
    SPECIAL_TOKENS,
)

CONTROL_TOKENS = SPECIAL_TOKENS + ADDED_TOKENS
"""Tokens that are never part of an answer; which of them a tokenizer has differs."""

_CHARS_PER_TOKEN = 12
"""More characters than a token has on average, so that a cut text still fills its tokens."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """How many tokens a decoder is given."""

    prompt_tokens: int = 2048
    """Context and prefix together."""
    context_share: float = 0.75
    """Of them, the most that a context may take."""

    @property
    def context_tokens(self) -> int:
        """The most tokens of a context."""
        return int(self.prompt_tokens * self.context_share)


class Prompts:
    """Makes prompts with one tokenizer, in training and in evaluation alike."""

    def __init__(self, tokenizer: Tokenizer, config: PromptConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self._start = tokenizer.token_to_id(END_OF_TEXT)

    def ids(self, prefix: str, context: str = "") -> list[int]:
        """Return at most `prompt_tokens` tokens: the context's first, then the prefix's last.

        An empty prompt is one end-of-text token, where the tokenizer has it.
        """
        config = self.config
        above = self.encode(context)[: config.context_tokens] if context else []
        room = config.prompt_tokens - len(above)
        below = self.encode(prefix[-room * _CHARS_PER_TOKEN :])[-room:]
        return [*above, *below] or ([] if self._start is None else [self._start])

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens, no special ones added."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of some tokens, special ones left out."""
        text: str = self.tokenizer.decode(ids)
        return text


def spells_control_token(text: str) -> bool:
    """Tell whether encoding a text would give control tokens instead of their spelling."""
    return any(token in text for token in CONTROL_TOKENS)
