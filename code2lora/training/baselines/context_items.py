"""Put retrieved text in front of the items that the hypernetwork is trained on.

What is retrieved never contains what is asked: a later commit's span is looked up in a snapshot
from before that commit, and a span of a file in other files of its snapshot.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

from code2lora.training.data.dataset import RepositoryData, Target
from code2lora.training.fitting.items import Item
from code2lora.training.fitting.windows import WindowSampler
from code2lora.training.pretraining.tokenizer import ADDED_TOKENS, SPECIAL_TOKENS

ContextOf = Callable[[RepositoryData, Target], list[int]]
"""Returns the tokens to put in front of an item; none where nothing was found."""


class Retriever(Protocol):
    """Chooses text for a prompt out of the files that it was made with."""

    def retrieve(self, prefix: str, *, path: str, max_tokens: int) -> str:
        """Return text of at most `max_tokens` tokens, empty where nothing was found."""


MakeRetriever = Callable[[Mapping[str, str], Callable[[str], list[int]]], Retriever]
"""Returns a retriever for (path -> text, tokenizer's `text -> tokens`)."""


class ContextItems:
    """An `ItemSource`: the items of the hypernetwork's windows behind their contexts."""

    def __init__(
        self,
        sampler: WindowSampler,
        repositories: Sequence[RepositoryData],
        context_of: ContextOf,
        *,
        begin: Sequence[int] = (),
    ) -> None:
        """repositories: those of the sampler, in its order. begin: see `with_context`"""
        self._sampler = sampler
        self._repositories = repositories
        self._context_of = context_of
        self._begin = tuple(begin)

    def items(self, step: int) -> list[Item]:
        """See `ItemSource`."""
        found = []
        for window in self._sampler.windows(step):
            data = self._repositories[window.repository]
            for item, target in zip(window.items, window.targets, strict=True):
                found.append(with_context(item, self._context_of(data, target), self._begin))
        return found

    def state_dict(self) -> dict[str, Any]:
        """See `ItemSource`."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `ItemSource`."""
        self._sampler.load_state_dict(state)


def with_context(item: Item, context: Sequence[int], begin: Sequence[int] = ()) -> Item:
    """Return the item behind given tokens, none of them asked for.

    begin: what the tokenizer begins every text with, which stays in front
    """
    n = len(begin) if item.ids[: len(begin)] == tuple(begin) else 0
    ids = (*item.ids[:n], *context, *item.ids[n:])
    return Item(ids=ids, n_given=item.n_given + len(context))


class RetrievedContexts:
    """A `ContextOf` that retrieves from the snapshots that mining kept.

    The retrievers of the snapshots that were used last are kept: making one reads every file.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        make: MakeRetriever,
        *,
        max_tokens: int,
        n_kept: int = 64,
    ) -> None:
        self._tokenizer = tokenizer
        self._make = make
        self._max_tokens = max_tokens
        self._n_kept = n_kept
        self._kept: OrderedDict[tuple[str, int, int | None], Retriever] = OrderedDict()

    def __call__(self, data: RepositoryData, target: Target) -> list[int]:
        """Return at most `max_tokens` tokens for a target of a repository."""
        place = _place(data, target)
        if place is None:
            return []
        prefix = data.texts[target.file][: target.start]
        retriever = self._retriever(data, *place)
        found = retriever.retrieve(prefix, path=target.path, max_tokens=self._max_tokens)
        # Text that spells a control token would be encoded to the token itself.
        if any(token in found for token in SPECIAL_TOKENS + ADDED_TOKENS):
            return []
        return self._encode(found)[: self._max_tokens]

    def _retriever(self, data: RepositoryData, anchor: int, half: int | None) -> Retriever:
        key = (data.name, anchor, half)
        if key not in self._kept:
            files = {
                file.path: data.texts[file.text]
                for file in data.files(anchor)
                if half is None or _half(data, file.text) == half
            }
            self._kept[key] = self._make(files, self._encode)
            if len(self._kept) > self._n_kept:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _place(data: RepositoryData, target: Target) -> tuple[int, int | None] | None:
    """Return (snapshot, half of its files or None for all) to look in; None where there is none.

    A span of a file is looked up in the half of the snapshot's texts that its own is not in, so
    one index serves all spans of a half and none can find itself, nor a copy of its file.
    """
    if target.kind == "file":
        return target.index, 1 - _half(data, target.file)
    earlier = [anchor for anchor in data.anchors if anchor < target.index]
    return (earlier[-1], None) if earlier else None


def _half(data: RepositoryData, row: int) -> int:
    """Return the half, 0 or 1, that a text belongs to."""
    text = data.texts[row].encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).digest()[0] & 1
