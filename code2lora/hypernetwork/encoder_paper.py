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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from code2lora.errors import UserError
from code2lora.history.model import Diff, Snapshot, SourceFile
from code2lora.hypernetwork.config import Recipe
from code2lora.hypernetwork.family import Reading

_PIECE_CHARS = 1 << 22
"""A text is tokenised in pieces of at most this length, so that a huge one stays within memory."""
_SLAB_WINDOWS = 256
"""Windows are sorted by length and batched within slabs of this many."""
_BATCH_TOKENS = 8192
"""Tokens of a batch, padding included; a single window may have more."""
_ACROSS_SLAB_WINDOWS = 2048
_ACROSS_BATCH_TOKENS = {"cuda": 65536}
"""The same where batches may be formed freely, by kind of device."""
_ROTARY_DECODERS = ("llama", "mistral", "qwen2", "qwen3")
"""Models in which a token sees only those before it, and only how far away they are."""
_NORM_FLOOR = 1e-12

T = TypeVar("T")


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


@dataclass(frozen=True)
class _Slab:
    """Tokenised windows of some texts."""

    owners: list[int]
    """Which text each window is of."""
    ids: list[list[int]]


class PaperEncoder:
    """A transformer encoder with the released pooling."""

    def __init__(self, transformer: Any, recipe: Recipe) -> None:
        """transformer: the `Transformer` module of sentence-transformers."""
        self.recipe = recipe
        self._tokenizer = transformer.tokenizer
        self._model = transformer.auto_model.eval()
        config = self._model.config
        config.use_cache = False  # one pass, nothing is generated
        self._ignores_what_follows = config.model_type in _ROTARY_DECODERS and not getattr(
            config, "use_bidirectional_attention", False
        )
        self.width = int(config.hidden_size)

    @classmethod
    def load(
        cls,
        path: Path,
        recipe: Recipe,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> PaperEncoder:
        """Return the encoder in a directory. Raises UserError when it is damaged.

        dtype: of weights and activations; states are computed in float32.
        """
        from sentence_transformers import SentenceTransformer

        try:
            model = SentenceTransformer(
                str(path),
                device=str(device),
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"dtype": dtype},
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
            texts = [diff.unified for diff in group]
            pools, counts = self._pool_windows(texts, DIFF_WINDOWS, across=across)
            readings += [
                Reading(torch.cat([pool.maximum, pool.mean]), n)
                for pool, n in zip(pools, counts, strict=True)
            ]
        return readings

    def told(self, files: Sequence[SourceFile]) -> Sequence[SourceFile]:
        """Return all files: a snapshot is read whole."""
        return files

    def file_key(self, file: SourceFile) -> str:
        """Return the digest of the file's blob id: its path is not read."""
        return hashlib.sha256(file.blob.encode()).hexdigest()

    def read_files(self, files: Sequence[SourceFile], *, across: bool = False) -> list[Reading]:
        """Return the mean over the windows of each file, (D,), rounded to float16.

        A file too short for a window gives zeros.
        """
        texts = [file.text for file in files]
        pools, counts = self._pool_windows(texts, FILE_WINDOWS, across=across)
        # the released vectors were stored as float16 before they were pooled
        return [Reading(pool.mean.half().float(), n) for pool, n in zip(pools, counts, strict=True)]

    def pool_files(self, vectors: Tensor) -> Tensor:
        """Return [mean; max] over files, (2 D,), of unit length. vectors: (n, D)"""
        over_files = _Pool(self.width)
        for vector in vectors:
            over_files.add(vector)
        features = torch.cat([over_files.mean, over_files.maximum])
        unit: Tensor = features / (features.norm() + _NORM_FLOOR)
        return unit

    def read_snapshot(self, snapshot: Snapshot) -> Reading:
        """Return `pool_files` of the snapshot's files; zeros without files."""
        readings = self.read_files(snapshot.files)
        vectors = torch.stack([reading.features for reading in readings]) if readings else None
        features = self.pool_files(torch.empty(0, self.width) if vectors is None else vectors)
        return Reading(features, sum(reading.n_tokens for reading in readings))

    def _pool_windows(
        self, texts: Sequence[str], windows: Windows, *, across: bool
    ) -> tuple[list[_Pool], list[int]]:
        """Return the pooled windows and the number of tokens of each text."""
        pools = [_Pool(self.width) for _ in texts]
        counts = [0] * len(texts)
        slabs = self._slabs(texts, windows, counts, across=across)
        # While the device computes a slab, the next one is tokenised.
        for slab in _ahead(slabs) if across else slabs:
            vectors = self._encode(slab.ids, across=across)
            for owner, vector in zip(slab.owners, vectors, strict=True):
                pools[owner].add(vector)
        return pools, counts

    def _slabs(
        self, texts: Sequence[str], windows: Windows, counts: list[int], *, across: bool
    ) -> Iterator[_Slab]:
        stream = self._window_texts(texts, windows, counts)
        while slab := list(islice(stream, _ACROSS_SLAB_WINDOWS if across else _SLAB_WINDOWS)):
            encoded = self._tokenizer(
                [text for _, text in slab],
                padding=False,
                truncation=True,
                max_length=windows.length,
                return_attention_mask=False,
            )
            yield _Slab([owner for owner, _ in slab], encoded["input_ids"])

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
    def _encode(self, ids: list[list[int]], *, across: bool) -> Tensor:
        """Return the mean of the last hidden states of each sequence, (n, D) float32 CPU."""
        device = self._model.device
        limit = _ACROSS_BATCH_TOKENS.get(device.type, _BATCH_TOKENS) if across else _BATCH_TOKENS
        batches = list(_batches([len(row) for row in ids], limit))
        # Nothing is fetched in between, so that an accelerator never waits.
        means = [self._masked_means([ids[i] for i in rows]) for rows in batches]
        vectors = torch.empty(len(ids), self.width)
        vectors[[i for rows in batches for i in rows]] = torch.cat(means).cpu()
        return vectors

    def _masked_means(self, rows: list[list[int]]) -> Tensor:
        """Return the means over each row's own positions, (n, D) float32 on the device."""
        longest = max(len(row) for row in rows)
        pad = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        device = self._model.device
        ids, mask = ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)
        # Padding on the right is never seen where nothing that follows is, and attention without
        # a mask has faster kernels.
        seen = None if self._ignores_what_follows else mask
        hidden = self._model(input_ids=ids, attention_mask=seen).last_hidden_state.float()
        weight = mask[..., None].float()
        means: Tensor = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1.0)
        return means


def _batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of sequences of like length that make up a batch, padding included."""
    batch: list[int] = []
    # the longest last, so that each one sets the padded length of its batch
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[i] > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items, while another thread prepares the next one."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(lambda: list(islice(items, 1)))
        while item := coming.result():
            coming = pool.submit(lambda: list(islice(items, 1)))
            yield item[0]
