"""Recipe `paper`: windows of tokens through a transformer, pooled as the released models expect.

    diff      windows of 512 / 64, at least 16 tokens; [max; mean] over windows            2 D
    snapshot  windows of 2048 / 256, at least 8; mean per file, rounded to float16;
              [mean; max] over files, L2-normalised                                        2 D

A window is decoded to text and tokenised again, now with the model's own special tokens, which
are inside the mean: the released models were trained on exactly that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from code2lora.errors import UserError
from code2lora.history.model import Diff, Snapshot
from code2lora.hypernetwork.config import Recipe
from code2lora.hypernetwork.family import Reading

_PIECE_CHARS = 1 << 22
"""A text is tokenised in pieces of at most this length, so that a huge one stays within memory."""
_SLAB_WINDOWS = 256
"""Windows are sorted by length and batched within slabs of this many."""
_BATCH_TOKENS = 8192
_NORM_FLOOR = 1e-12


@dataclass(frozen=True)
class Windows:
    """How a text is cut, in tokens."""

    length: int
    overlap: int
    minimum: int
    """Shorter windows are dropped."""

    def cut(self, ids: Sequence[int]) -> Iterator[Sequence[int]]:
        """Yield the windows, the last of which reaches the end."""
        for start in range(0, len(ids), self.length - self.overlap):
            window = ids[start : start + self.length]
            if len(window) >= self.minimum:
                yield window
            if start + self.length >= len(ids):
                return


DIFF_WINDOWS = Windows(length=512, overlap=64, minimum=16)
FILE_WINDOWS = Windows(length=2048, overlap=256, minimum=8)


class _Pool:
    """Running sum, maximum and count of vectors."""

    def __init__(self, width: int) -> None:
        self.total = torch.zeros(width)
        self.peak = torch.full((width,), -torch.inf)
        self.count = 0

    def add(self, vector: Tensor) -> None:
        self.total += vector
        self.peak = torch.maximum(self.peak, vector)
        self.count += 1

    @property
    def mean(self) -> Tensor:
        return self.total / max(self.count, 1)

    @property
    def maximum(self) -> Tensor:
        return self.peak if self.count else torch.zeros_like(self.total)


class PaperEncoder:
    """A transformer encoder with the released pooling."""

    def __init__(self, transformer: Any, recipe: Recipe) -> None:
        """transformer: the `Transformer` module of sentence-transformers."""
        self.recipe = recipe
        self._tokenizer = transformer.tokenizer
        self._model = transformer.auto_model.eval()
        self._model.config.use_cache = False  # one pass, nothing is generated
        self.width = int(self._model.config.hidden_size)

    @classmethod
    def load(cls, path: Path, recipe: Recipe, device: torch.device | str = "cpu") -> PaperEncoder:
        """Return the encoder in a directory, in float32. Raises UserError when it is damaged."""
        from sentence_transformers import SentenceTransformer

        try:
            model = SentenceTransformer(
                str(path),
                device=str(device),
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"dtype": torch.float32},
            )
        # the loaders of three libraries raise whatever they met
        except Exception as error:
            raise UserError(
                f"the encoder in {path} is damaged: {error}", hint="fetch the model again"
            ) from error
        return cls(model[0], recipe)

    def diff_key(self, diff: Diff) -> str:
        """Return the digest of the unified diff, which the encoder reads with its line numbers."""
        return hashlib.sha256(diff.unified.encode("utf-8", "surrogatepass")).hexdigest()

    def read_diffs(self, diffs: Sequence[Diff], *, across: bool = False) -> list[Reading]:
        """Return [max; mean] over the windows of each diff, (2 D,); zeros for an empty diff.

        across: batch windows of different diffs together. That is faster on an accelerator, but
        the last digits then depend on what is read with a diff; for training, not for states.
        """
        groups = [list(diffs)] if across else [[diff] for diff in diffs]
        readings = []
        for group in groups:
            pools, counts = self._pool_windows([diff.unified for diff in group], DIFF_WINDOWS)
            readings += [
                Reading(torch.cat([pool.maximum, pool.mean]), n)
                for pool, n in zip(pools, counts, strict=True)
            ]
        return readings

    def read_snapshot(self, snapshot: Snapshot) -> Reading:
        """Return [mean; max] over files, (2 D,), of unit length; zeros without files.

        A file too short for a window counts as a zero vector.
        """
        pools, counts = self._pool_windows([file.text for file in snapshot.files], FILE_WINDOWS)
        over_files = _Pool(self.width)
        for pool in pools:
            over_files.add(pool.mean.half().float())  # the released vectors were stored as float16
        features = torch.cat([over_files.mean, over_files.maximum])
        return Reading(features / (features.norm() + _NORM_FLOOR), sum(counts))

    def _pool_windows(
        self, texts: Sequence[str], windows: Windows
    ) -> tuple[list[_Pool], list[int]]:
        """Return the pooled windows and the number of tokens of each text."""
        pools = [_Pool(self.width) for _ in texts]
        counts = [0] * len(texts)
        stream = self._window_texts(texts, windows, counts)
        while slab := list(islice(stream, _SLAB_WINDOWS)):
            vectors = self._encode([text for _, text in slab], windows.length)
            for (owner, _), vector in zip(slab, vectors, strict=True):
                pools[owner].add(vector)
        return pools, counts

    def _window_texts(
        self, texts: Iterable[str], windows: Windows, counts: list[int]
    ) -> Iterator[tuple[int, str]]:
        """Yield (owner, decoded window), and write each text's token count into `counts`."""
        for owner, text in enumerate(texts):
            if not text.strip():
                continue
            ids = self._token_ids(text)
            counts[owner] = len(ids)
            for window in windows.cut(ids):
                yield owner, self._tokenizer.decode(window, skip_special_tokens=True)

    def _token_ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for start in range(0, len(text), _PIECE_CHARS):
            piece = text[start : start + _PIECE_CHARS]
            encoded = self._tokenizer(
                piece, add_special_tokens=False, truncation=False, verbose=False
            )
            ids += encoded["input_ids"]
        return ids

    @torch.no_grad()
    def _encode(self, texts: list[str], max_length: int) -> Tensor:
        """Return the masked mean of the last hidden states of each text, (n, D) float32 CPU."""
        vectors = torch.empty(len(texts), self.width)
        # like lengths together, so that little is spent on padding
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
        batch_size = max(1, _BATCH_TOKENS // max_length)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = self._tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            )
            vectors[rows] = self._masked_means(batch["input_ids"], batch["attention_mask"])
        return vectors

    def _masked_means(self, ids: Tensor, mask: Tensor) -> Tensor:
        device = self._model.device
        output = self._model(input_ids=ids.to(device), attention_mask=mask.to(device))
        hidden = output.last_hidden_state.float()
        weight = mask.to(device)[..., None].float()
        means: Tensor = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1.0)
        return means.cpu()
