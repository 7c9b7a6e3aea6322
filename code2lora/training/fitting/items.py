"""Turn spans of source files into token rows in the base decoder's own formats.

The forms are those that the base was trained on: a plain chunk, a continuation of the text above,
and a hole between prefix and suffix. An assertion's answer is a continuation too, with the token
that ends a text after it, so that writing stops there. A base whose tokenizer has no tokens for
holes is asked for continuations only, and one without a file separator sees no paths. Rows are
padded on the right; a causal decoder needs no mask for that.

N = rows, T = tokens of the longest row.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from code2lora.errors import UserError
from code2lora.training.pretraining.tokenizer import (
    ADDED_TOKENS,
    END_OF_TEXT,
    FILE_SEP,
    FIM_MIDDLE,
    FIM_PREFIX,
    FIM_SUFFIX,
    SPECIAL_TOKENS,
)

IGNORED = -100
"""The label of a token that gives no loss."""

_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
"""Names of the token that ends a text, tried in order where the base does not say which it is."""

_LEAST_PREFIX = 8
"""Tokens of the text above an assertion, at least; one whose answer leaves less is not asked."""

_CHARS_PER_TOKEN = 8
"""More characters than a token has on average, so that a cut text still fills its tokens."""


@dataclass(frozen=True, kw_only=True)
class ItemConfig:
    """Sizes of a row."""

    max_tokens: int = 256
    """Longest row."""
    prefix_tokens: int = 128
    """Of the text above a span, at most."""
    suffix_tokens: int = 48
    """Of the text below a hole, at most."""
    header_share: float = 0.5
    """Share of rows that begin with the file's path."""
    hole_share: float = 0.3
    """Share of spans that are asked for as a hole rather than as a continuation."""

    def __post_init__(self) -> None:
        """Raise ValueError when what is given would leave no room for what is asked."""
        if 4 * (self.prefix_tokens + self.suffix_tokens) > 3 * self.max_tokens:
            raise ValueError(
                f"prefix_tokens {self.prefix_tokens} and suffix_tokens {self.suffix_tokens} take "
                f"more than three quarters of max_tokens {self.max_tokens}"
            )


@dataclass(frozen=True, slots=True)
class Item:
    """One row: tokens, and how many of the first are given rather than asked for."""

    ids: tuple[int, ...]
    n_given: int

    @property
    def n_asked(self) -> int:
        """Tokens that count for the loss."""
        return len(self.ids) - self.n_given


class ItemBuilder:
    """Makes rows from texts with one tokenizer."""

    def __init__(
        self, tokenizer: Tokenizer, config: ItemConfig, *, end_id: int | None = None
    ) -> None:
        """end_id: the token that ends a text, where it is not one of the usual names.

        Raises UserError when the tokenizer has no such token.
        """
        self._tokenizer = tokenizer
        self._config = config
        found = ((token, tokenizer.token_to_id(token)) for token in _TOKENS)
        self._id: dict[str, int] = {token: id_ for token, id_ in found if id_ is not None}
        self._end = _end_token(tokenizer) if end_id is None else end_id
        # What the base expects every text to begin with, such as <s>; most have nothing.
        begin: list[int] = tokenizer.encode("").ids
        self._begin = [id_ for id_ in begin if id_ != self._end]

    @property
    def has_holes(self) -> bool:
        """Whether the base knows how to fill a hole."""
        return self._id.keys() >= {FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE}

    def chunk(self, text: str, path: str, start: int, rng: random.Random) -> Item | None:
        """Return a row of the text from the line at `start` on, all of it asked for.

        None where the text there is too short to ask for, or spells a control token.
        """
        config = self._config
        head = [*self._begin, *self._header(path, rng)] or [self._end]
        body = text[start : start + config.max_tokens * _CHARS_PER_TOKEN]
        return self._row(head, self._encode(body)[: config.max_tokens - len(head)], body)

    def completion(
        self, text: str, path: str, start: int, end: int, rng: random.Random
    ) -> Item | None:
        """Return a row that asks for text[start:end] after what stands above it.

        None where the span is empty or spells a control token. A span too long for the row is
        asked for in part.
        """
        hole = rng.random() < self._config.hole_share and self.has_holes
        header = self._header(path, rng)
        above = text[max(0, start - self._config.prefix_tokens * _CHARS_PER_TOKEN) : start]
        prefix = self._encode(above)[-self._config.prefix_tokens :]
        below = text[end : end + self._config.suffix_tokens * _CHARS_PER_TOKEN] if hole else ""
        if hole:
            suffix = self._encode(below)[: self._config.suffix_tokens]
            head = [*self._begin, *header, self._id[FIM_PREFIX], *prefix, self._id[FIM_SUFFIX]]
            head += [*suffix, self._id[FIM_MIDDLE]]
        else:
            head = [*self._begin, *header, *prefix] or [self._end]
        asked = self._encode(text[start:end])[: self._config.max_tokens - len(head)]
        return self._row(head, asked, above + text[start:end] + below)

    def assertion(self, text: str, start: int, wanted: str) -> Item | None:
        """Return a row that asks for `wanted`, and then the end, after text[:start].

        The text above fills the row. None where nothing is wanted, where the answer leaves no room
        for the text above, and where a control token is spelt.
        """
        asked = [*self._encode(wanted), self._end] if wanted else []
        room = self._config.max_tokens - len(asked) - len(self._begin)
        if room < _LEAST_PREFIX:
            return None
        above = text[max(0, start - room * _CHARS_PER_TOKEN) : start]
        head = [*self._begin, *self._encode(above)[-room:]] or [self._end]
        return self._row(head, asked, above + wanted)

    def with_context(self, item: Item, path: str, text: str, n_tokens: int) -> Item | None:
        """Return the row with the beginning of another text in front, none of it asked for.

        n_tokens: of the other text, at most. None where it spells a control token.
        """
        body = text[: n_tokens * _CHARS_PER_TOKEN]
        if any(token in body for token in self._id):
            return None
        separator = [self._id[FILE_SEP]] if FILE_SEP in self._id else []
        shown = self._encode(f"{path}\n{body}")[:n_tokens]
        own = item.ids[len(self._begin) :]
        ids = (*self._begin, *separator, *shown, *separator, *own)
        return Item(ids=ids, n_given=item.n_given + len(ids) - len(item.ids))

    def _row(self, head: list[int], asked: list[int], text: str) -> Item | None:
        # Text that spells a control token would be encoded to the token itself.
        if not asked or any(token in text for token in self._id):
            return None
        return Item(ids=(*head, *asked), n_given=len(head))

    def _header(self, path: str, rng: random.Random) -> list[int]:
        if rng.random() >= self._config.header_share or FILE_SEP not in self._id:
            return []
        ids = self._encode(f"{path}\n")
        fits = len(ids) <= self._config.max_tokens // 8
        return [self._id[FILE_SEP], *ids] if fits else []

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def collate(items: Sequence[Item], *, padding: int = 0) -> tuple[Tensor, Tensor]:
    """Return (tokens, labels), each (N, T) of int64; labels[:, t] is the token at t itself."""
    longest = max(len(item.ids) for item in items)
    tokens = torch.full((len(items), longest), padding, dtype=torch.long)
    labels = torch.full((len(items), longest), IGNORED, dtype=torch.long)
    for row, item in enumerate(items):
        ids = torch.tensor(item.ids)
        tokens[row, : len(ids)] = ids
        labels[row, item.n_given : len(ids)] = ids[item.n_given :]
    return tokens, labels


_TOKENS = SPECIAL_TOKENS + ADDED_TOKENS


def _end_token(tokenizer: Tokenizer) -> int:
    for token in _END_TOKENS:
        found: int | None = tokenizer.token_to_id(token)
        if found is not None:
            return found
    raise UserError(
        "the base model's tokenizer has no token that ends a text",
        hint=f"expected one of {', '.join(_END_TOKENS)}, or `eos_token_id` in its config.json",
    )
