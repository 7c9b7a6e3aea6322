"""Turn texts into bags of tokens, so that a trainable mean-of-tokens encoder is a sparse product.

The vector that recipe `lines` has for a text is the mean of its tokens' rows. That is
`weights @ table` with weights = counts / length, so texts are tokenised once, and a gradient step
costs no more than the tokens that differ. Of several texts, both the vector of all read as one and
the mean of their vectors are such products too.

V = size of the vocabulary, E = width of the encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from code2lora.hypernetwork.encoder_lines import LinesEncoder

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Bags:
    """Texts as token counts, one after the other."""

    ids: npt.NDArray[np.int32]
    """Distinct token ids, ascending within a text."""
    counts: npt.NDArray[np.int32]
    """How often each occurs in its text."""
    offsets: IntArray
    """Text i owns the entries offsets[i] to offsets[i + 1]."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def mean(self, row: int) -> Weights:
        """Return one text's weights, counts / length; none for an empty text."""
        where = slice(self.offsets[row], self.offsets[row + 1])
        counts = self.counts[where]
        return self.ids[where], (counts / max(1, counts.sum())).astype(np.float32)

    def pooled_mean(self, rows: Sequence[int]) -> Weights:
        """Return the weights of several texts read as one."""
        ids = [self.ids[self.offsets[row] : self.offsets[row + 1]] for row in rows]
        counts = [self.counts[self.offsets[row] : self.offsets[row + 1]] for row in rows]
        if not ids:
            return _NOTHING
        distinct, inverse = np.unique(np.concatenate(ids), return_inverse=True)
        total = np.bincount(inverse, weights=np.concatenate(counts))
        return distinct, (total / max(1.0, total.sum())).astype(np.float32)

    def mean_of_means(self, rows: Sequence[int], n_vocabulary: int) -> FloatArray:
        """Return (V,): the mean over texts of each one's weights; zero where there are no texts."""
        mixed = np.zeros(n_vocabulary, dtype=np.float32)
        for row in rows:
            ids, weights = self.mean(row)
            mixed[ids] += weights  # ids are distinct, so no entry is lost
        mixed /= max(1, len(rows))
        return mixed


NO_TEXTS = Bags(
    np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int64)
)

Weights = tuple[npt.NDArray[np.int32], FloatArray]
"""Token ids and what each one's row is multiplied by."""

_NOTHING: Weights = (np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32))


def count_tokens(encoder: LinesEncoder, texts: Iterable[str]) -> Bags:
    """Return the bags of the texts, tokenised exactly as the encoder does."""
    ids: list[npt.NDArray[np.int32]] = []
    counts: list[npt.NDArray[np.int32]] = []
    offsets = [0]
    for text in texts:
        distinct, n = np.unique(encoder.tokens(text).numpy(), return_counts=True)
        ids.append(distinct.astype(np.int32))
        counts.append(n.astype(np.int32))
        offsets.append(offsets[-1] + len(distinct))
    empty = np.zeros(0, dtype=np.int32)
    return Bags(
        ids=np.concatenate([empty, *ids]),
        counts=np.concatenate([empty, *counts]),
        offsets=np.asarray(offsets, dtype=np.int64),
    )


def inverse_document_frequency(bags: Sequence[Bags], n_vocabulary: int) -> FloatArray:
    """Return (V,): log((1 + N) / (1 + n)) over the N texts of all bags, n of which hold the token.

    A token of no text gets 0, not the greatest value: nothing is known about it.
    """
    seen = np.zeros(n_vocabulary, dtype=np.int64)
    n_texts = 0
    for each in bags:
        seen += np.bincount(each.ids, minlength=n_vocabulary)  # distinct within a text
        n_texts += len(each)
    idf = np.log((1 + n_texts) / (1 + seen))
    return np.where(seen > 0, idf, 0.0).astype(np.float32)


def random_table(idf: FloatArray, width: int, generator: torch.Generator) -> Tensor:
    """Return (V, E): random directions whose lengths are the tokens' inverse document frequency.

    Two random directions are nearly orthogonal, so at first a text's vector is a sketch of its
    tf-idf bag: unlike texts are far apart before anything is learnt.
    """
    directions = torch.randn(len(idf), width, generator=generator) / width**0.5
    scaled: Tensor = directions * torch.from_numpy(idf)[:, None]
    return scaled


def encode(table: Tensor, texts: Sequence[Weights]) -> Tensor:
    """Return (n, E): each text's weighted sum of its tokens' rows; zeros for an empty text."""
    ids = np.concatenate([_NOTHING[0], *(ids for ids, _ in texts)])
    weights = np.concatenate([_NOTHING[1], *(weights for _, weights in texts)])
    offsets = np.cumsum([0, *(len(ids) for ids, _ in texts)])[:-1]
    pooled: Tensor = nn.functional.embedding_bag(
        torch.from_numpy(ids).long().to(table.device),
        table,
        torch.from_numpy(offsets).long().to(table.device),
        mode="sum",
        per_sample_weights=torch.from_numpy(weights).to(table.device),
    )
    return pooled


def encode_dense(table: Tensor, weights: FloatArray) -> Tensor:
    """Return (n, E) for (n, V) weights; cheaper than `encode` where most tokens occur."""
    product: Tensor = torch.from_numpy(weights).to(table.device) @ table
    return product
