"""Recipe `lines`: what a diff adds and what it removes, each the mean of its tokens' vectors.

    diff      [added; removed]                     2 D
    snapshot  mean over files of the file's mean     D

Each file's lines follow a line with its path. Text is read in bounded pieces and weighted by
tokens, so a huge diff costs time and not memory. Reads the directory of a sentence-transformers
`StaticEmbedding` itself: the library is three times as slow to import as everything else here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from code2lora.errors import UserError
from code2lora.history.model import Diff, Snapshot, SourceFile
from code2lora.hypernetwork.config import Recipe
from code2lora.hypernetwork.family import Reading

PIECE_CHARS = 1 << 16
"""A text is tokenised in pieces of at most this length, cut after a line where there is one."""
_SLAB_CHARS = 1 << 20
"""Pieces go to the tokenizer together up to this length, so that it can use all cores."""


class LinesEncoder:
    """Token vectors in a table, averaged. `table` may be a parameter while it is being trained."""

    def __init__(self, tokenizer: Tokenizer, table: Tensor, recipe: Recipe) -> None:
        """table: (V, D) float32, one row a token id."""
        if tokenizer.get_vocab_size() > table.shape[0]:
            raise UserError(
                f"the encoder's tokenizer has {tokenizer.get_vocab_size()} tokens, "
                f"but its table has {table.shape[0]} rows"
            )
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.table = table
        self.width = table.shape[1]

    @classmethod
    def load(cls, path: Path, recipe: Recipe) -> LinesEncoder:
        """Return the encoder in a directory. Raises UserError when a file is damaged."""
        folder = next(iter(sorted(path.glob("*_StaticEmbedding"))), path)
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            table = load_file(folder / "model.safetensors")["embedding.weight"]
        # tokenizers raises bare Exception for a missing or malformed file
        except Exception as error:
            raise UserError(
                f"the encoder in {path} is damaged: {error}", hint="fetch the model again"
            ) from error
        return cls(tokenizer, table.to(torch.float32, copy=True), recipe)

    def save(self, path: Path) -> None:
        """Write a directory that `load` and `SentenceTransformer` read."""
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding

        module = StaticEmbedding(self.tokenizer, embedding_weights=self.table.detach().clone())
        model = SentenceTransformer(modules=[module], device="cpu")
        model.save(str(path), create_model_card=False)

    def diff_key(self, diff: Diff) -> str:
        """Return the digest of the added and the removed text."""
        digest = hashlib.sha256()
        for text in diff_texts(diff):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()

    def read_diffs(self, diffs: Sequence[Diff], *, across: bool = False) -> list[Reading]:
        """Return [added; removed] of each diff, (2 D,); a side without text is zeros.

        across: has no effect; texts are always read together, and do not change one another.
        """
        texts = (text for diff in diffs for text in diff_texts(diff))
        vectors, counts = self._mean_vectors(texts, 2 * len(diffs))
        features = vectors.view(len(diffs), 2 * self.width)
        totals = counts.view(len(diffs), 2).sum(1)
        return [Reading(row.clone(), int(n)) for row, n in zip(features, totals, strict=True)]

    def told(self, files: Sequence[SourceFile]) -> Sequence[SourceFile]:
        """Return all files: a snapshot is read whole."""
        return files

    def file_key(self, file: SourceFile) -> str:
        """Return the digest of the file's path and blob id."""
        return hashlib.sha256(
            f"{file.blob}\0{file.path}".encode("utf-8", "surrogatepass")
        ).hexdigest()

    def read_files(self, files: Sequence[SourceFile], *, across: bool = False) -> list[Reading]:
        """Return the mean over the tokens of each file, (D,), its path included.

        across: has no effect.
        """
        texts = (file_text(file) for file in files)
        vectors, counts = self._mean_vectors(texts, len(files))
        return [Reading(row.clone(), int(n)) for row, n in zip(vectors, counts, strict=True)]

    def pool_files(self, vectors: Tensor) -> Tensor:
        """Return the mean over files, (D,); zeros without files. vectors: (n, D)"""
        return vectors.mean(0) if len(vectors) else torch.zeros(self.width)

    def read_snapshot(self, snapshot: Snapshot) -> Reading:
        """Return the mean over files, (D,); zeros without files."""
        texts = (file_text(file) for file in snapshot.files)
        vectors, counts = self._mean_vectors(texts, len(snapshot.files))
        return Reading(self.pool_files(vectors), int(counts.sum()))

    def tokens(self, text: str) -> Tensor:
        """Return a text's token ids, int64, cut exactly as the encoder cuts it."""
        ids = [i for piece in _pieces(text) for i in self._encode([piece])[0]]
        return torch.tensor(ids, dtype=torch.int64)

    def pool(self, ids: Sequence[Tensor]) -> Tensor:
        """Return the mean vector of each list of token ids, (len(ids), D); empty gives zeros.

        Differentiable in `table`, for training.
        """
        offsets = torch.tensor([0, *(len(row) for row in ids[:-1])]).cumsum(0)
        flat = torch.cat(list(ids)).to(self.table.device)
        return torch.nn.functional.embedding_bag(
            flat, self.table, offsets.to(self.table.device), mode="mean"
        )

    @torch.no_grad()
    def _mean_vectors(self, texts: Iterable[str], n_texts: int) -> tuple[Tensor, Tensor]:
        """Return the token means (n_texts, D) float32 and token counts (n_texts,) int64."""
        sums = torch.zeros(n_texts, self.width, dtype=torch.float64)
        counts = torch.zeros(n_texts, dtype=torch.int64)
        table = self.table.detach()
        for owners, pieces in _slabs(texts):
            ids = self._encode(pieces)
            lengths = torch.tensor([len(row) for row in ids])
            flat = torch.tensor([i for row in ids for i in row], dtype=torch.int64)
            starts = lengths.cumsum(0) - lengths
            partial = torch.nn.functional.embedding_bag(
                flat.to(table.device), table, starts.to(table.device), mode="sum"
            )
            sums.index_add_(0, torch.tensor(owners), partial.cpu().double())
            counts.index_add_(0, torch.tensor(owners), lengths)
        return (sums / counts.clamp(min=1)[:, None]).float(), counts

    def _encode(self, pieces: list[str]) -> list[list[int]]:
        encodings = self.tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def diff_texts(diff: Diff) -> tuple[str, str]:
    """Return the text that a diff adds and the text that it removes.

    A side names a file when it has lines of it, or when the file's name itself comes or goes.
    """
    added, removed = [], []
    for change in diff.changes:
        if change.added or change.status in ("A", "R"):
            added += [change.path, "\n", change.added]
        if change.removed or change.status in ("D", "R"):
            removed += [change.old_path or change.path, "\n", change.removed]
    return "".join(added), "".join(removed)


def file_text(file: SourceFile) -> str:
    """Return the text that stands for a file of a snapshot."""
    return f"{file.path}\n{file.text}"


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + PIECE_CHARS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _slabs(texts: Iterable[str]) -> Iterator[tuple[list[int], list[str]]]:
    """Yield (owner of each piece, pieces), a bounded number of characters at a time."""
    owners: list[int] = []
    pieces: list[str] = []
    size = 0
    for owner, text in enumerate(texts):
        for piece in _pieces(text):
            owners.append(owner)
            pieces.append(piece)
            size += len(piece)
            if size >= _SLAB_CHARS:
                yield owners, pieces
                owners, pieces, size = [], [], 0
    if pieces:
        yield owners, pieces
