"""Turn mined shards into what fitting samples from: token bags to be told, spans to be asked.

Reads   shards (`shards.py`).
Writes  `bags-<tokenizer>.safetensors` into each shard: its texts, tokenised once.

What is asked is never told: a span's commit comes after everything that conditions it, and a
held-out file, with every change to it, is left out of the conditioning input.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from code2lora.history.model import Diff, FileChange, SourceFile
from code2lora.hypernetwork.config import Recipe
from code2lora.hypernetwork.encoder_lines import LinesEncoder, diff_texts, file_text
from code2lora.training.data.bags import NO_TEXTS, Bags, FloatArray, Weights, count_tokens
from code2lora.training.data.features import Features, Parts, read_features
from code2lora.training.data.shards import Rows, Shard, patch_sides
from code2lora.training.data.texts import PackedTexts

LINES = Recipe(diff="lines", snapshot="lines", rules="source")
"""What the trainable encoder reads."""


@dataclass(frozen=True, slots=True)
class Target:
    """A span that a model is asked to write, and from when on it may be asked."""

    kind: str
    """`commit` or `file`."""
    index: int
    """The commit that wrote it, or the snapshot that it stands in."""
    path: str
    file: int
    """Row of the file in `RepositoryData.texts`."""
    start: int
    end: int
    absent: int
    """Identifiers that other files use and the text just above does not show."""
    target: str | None = None
    """What is to be written, where that is not text[start:end] itself."""


@dataclass(frozen=True, slots=True)
class Change:
    """One file's change in one commit."""

    path: str
    old_path: str | None
    status: str
    row: int
    """Row in the bags of added and of removed lines, and in the shard's table."""


@dataclass(frozen=True, slots=True)
class TellableFile:
    """One file of a snapshot."""

    path: str
    text: int
    """Row of its text in `RepositoryData.texts`."""
    bag: int
    """Row of its bag in `RepositoryData.file_bags`; the path is part of what is read."""


class RepositoryData:
    """One repository's texts, bags, snapshots, changes and targets, in memory."""

    opens: bool
    """Whether the first commit is the first step of its history (`Stream.opens`). It is then told
    twice: as a snapshot, and with the whole of its tree as one diff."""
    n_train: int
    """Commits that may be trained on, the oldest; the rest of `n_commits` is for evaluation."""
    features: Features | Parts | None = None
    """What a frozen encoder made of its commits and snapshots, where a model is told by that."""

    def __init__(self, shard: Shard, encoder: LinesEncoder | None) -> None:
        """Read a shard and tokenise it, unless its bags for this tokenizer lie beside it.

        encoder: None leaves the bags empty, for models that are told by `features` alone
        """
        self.name = shard.name
        self.opens = shard.opens
        self._shard = shard
        files = shard.table("files")
        snapshots = shard.table("snapshots")
        self.texts = PackedTexts(files["text"])
        splits = shard.table("commits", ["split"])["split"]
        self.n_commits = len(splits)
        self.n_train = splits.count("train")

        def told() -> list[list[str]]:
            text_of = dict(zip(files["blob"], files["text"], strict=True))
            return [_file_texts(snapshots, text_of), *_change_texts(shard.table("changes"))]

        self.file_bags, self.added_bags, self.removed_bags = (
            [NO_TEXTS] * 3 if encoder is None else _bags(shard.path, encoder, told)
        )
        row_of = {blob: row for row, blob in enumerate(files["blob"])}
        self._changes: dict[int, list[Change]] = {}
        changes = shard.table("changes", ["index", "path", "old_path", "status"])
        for row, (index, path, old_path, status) in enumerate(_shared(changes)):
            self._changes.setdefault(index, []).append(Change(path, old_path, status, row))
        self._snapshots: dict[int, list[TellableFile]] = {}
        bag_of: dict[tuple[str, str], int] = {}
        for index, path, blob in _shared(snapshots):
            bag = bag_of.setdefault((path, blob), len(bag_of))
            self._snapshots.setdefault(index, []).append(TellableFile(path, row_of[blob], bag))
        self.anchors = sorted({*self._snapshots, *shard.imported_snapshots})
        self._file_targets: dict[int, list[Target]] = {}
        self._commit_targets: list[Target] = []
        for target in sorted(_targets(shard, row_of), key=lambda target: target.index):
            if target.kind == "file":
                self._file_targets.setdefault(target.index, []).append(target)
            else:
                self._commit_targets.append(target)
        self._commit_indices = [target.index for target in self._commit_targets]

    def files(self, anchor: int) -> list[TellableFile]:
        """Return a snapshot's files, in path order; none of one that came as a vector alone."""
        return self._snapshots.get(anchor, [])

    def told_files(self, anchor: int, held_out: Collection[str]) -> list[TellableFile]:
        """Return a snapshot's files that may be told.

        A copy of a held-out file under another name is held out too.
        """
        hidden = self.hidden_paths(anchor, held_out)
        return [file for file in self.files(anchor) if file.path not in hidden]

    def hidden_paths(self, anchor: int, held_out: Collection[str]) -> frozenset[str]:
        """Return a snapshot's held-out paths, and those of the copies of their files."""
        texts = {file.text for file in self.files(anchor) if file.path in held_out}
        return frozenset(file.path for file in self.files(anchor) if file.text in texts)

    def opens_at(self, anchor: int) -> bool:
        """Tell whether the state at a snapshot is that of a history's first step."""
        return self.opens and anchor == 0

    def changes(self, index: int, held_out: Collection[str]) -> list[Change]:
        """Return a commit's changes to files that may be told."""
        return [
            change
            for change in self._changes.get(index, [])
            if change.path not in held_out and change.old_path not in held_out
        ]

    def follow(self, index: int, held_out: frozenset[str]) -> frozenset[str]:
        """Return the held-out paths with the new names that a commit gave to some of them."""
        new = {c.path for c in self._changes.get(index, []) if c.old_path in held_out}
        return held_out | new if new else held_out

    def added_text(self, change: Change) -> str:
        """Return the path and the added lines of a change."""
        patch = self._patches[change.row]
        return _sides(change.path, change.old_path, change.status, patch)[0]

    @cached_property
    def _patches(self) -> PackedTexts:
        return PackedTexts(self._shard.table("changes", ["patch"])["patch"])

    def diff_weights(self, index: int, held_out: Collection[str]) -> tuple[Weights, Weights]:
        """Return the weights of a commit's added and of its removed lines."""
        rows = [change.row for change in self.changes(index, held_out)]
        return self.added_bags.pooled_mean(rows), self.removed_bags.pooled_mean(rows)

    def snapshot_weights(self, files: Sequence[TellableFile], n_vocabulary: int) -> FloatArray:
        """Return (V,): the mean over the files of each one's weights."""
        return self.file_bags.mean_of_means([file.bag for file in files], n_vocabulary)

    def commit_targets(self, first: int, last: int) -> list[Target]:
        """Return the targets of the commits `first` to `last`, both included."""
        low = bisect_left(self._commit_indices, first)
        return self._commit_targets[low : bisect_right(self._commit_indices, last)]

    def file_targets(self, anchor: int, held_out: Collection[str]) -> list[Target]:
        """Return the targets that stand in the held-out files of a snapshot."""
        found = self._file_targets.get(anchor, [])
        return [target for target in found if target.path in held_out]


def load_repositories(
    shards: Iterable[Shard],
    tokenizer: Tokenizer,
    *,
    begun: Callable[[str], None] | None = None,
) -> list[RepositoryData]:
    """Return the repositories of some shards, in their order, with token bags.

    begun: called with each one's name; the first time, tokenising takes seconds a repository
    """
    encoder = LinesEncoder(tokenizer, torch.zeros(tokenizer.get_vocab_size(), 1), LINES)
    found = []
    for shard in shards:
        if begun is not None:
            begun(shard.name)
        found.append(RepositoryData(shard, encoder))
    return found


def load_embedded(shards: Iterable[Shard], fingerprint: str | None) -> list[RepositoryData]:
    """Return the repositories of some shards, in their order, with a frozen encoder's features.

    fingerprint: of the encoder; None takes the features that an imported data set came with.
    Raises UserError when a repository was not embedded.
    """
    found = []
    for shard in shards:
        data = RepositoryData(shard, None)
        data.features = read_features(shard, fingerprint)
        found.append(data)
    return found


def tokenizer_key(tokenizer: Tokenizer) -> str:
    """Return a short name for what a tokenizer does to a text."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]


def _targets(shard: Shard, row_of: dict[str, int]) -> Iterator[Target]:
    names = ["kind", "index", "path", "blob", "start", "end", "absent", "target"]
    table = shard.table("targets", names)
    for kind, index, path, blob, *rest in _shared({name: table[name] for name in names}):
        yield Target(kind, index, path, row_of[blob], *rest)


def _shared(table: Rows) -> Iterator[tuple[Any, ...]]:
    """Yield a table's rows, in which values that are equal are one object."""
    known: dict[Any, Any] = {}
    for row in zip(*table.values(), strict=True):
        yield tuple(known.setdefault(value, value) for value in row)


def _change_texts(changes: Rows) -> tuple[list[str], list[str]]:
    """Return what the encoder reads of each change, as if it were all of its commit."""
    names = ("path", "old_path", "status", "patch")
    both = [_sides(*row) for row in zip(*(changes[name] for name in names), strict=True)]
    return [added for added, _ in both], [removed for _, removed in both]


def _sides(path: str, old_path: str | None, status: Any, patch: str) -> tuple[str, str]:
    added, removed = patch_sides(patch)
    change = FileChange(path, old_path, status, added, removed, patch="")
    return diff_texts(Diff(commit="", parent=None, changes=(change,), skipped=()))


def _file_texts(snapshots: Rows, text_of: dict[str, str]) -> list[str]:
    """Return what the encoder reads of each distinct (path, blob), in the order they come."""
    distinct = dict.fromkeys(zip(snapshots["path"], snapshots["blob"], strict=True))
    return [file_text(SourceFile(path, blob, text_of[blob])) for path, blob in distinct]


def _bags(folder: Path, encoder: LinesEncoder, read: Callable[[], list[list[str]]]) -> list[Bags]:
    """Return the bags of files, added and removed lines; `read` returns these texts if need be."""
    path = folder / f"bags-{tokenizer_key(encoder.tokenizer)}.safetensors"
    try:
        stored = load_file(path)
    except (OSError, SafetensorError):
        stored = {}
        for i, each in enumerate(read()):
            bags = count_tokens(encoder, each)
            stored[f"{i}.ids"], stored[f"{i}.counts"] = bags.ids, bags.counts
            stored[f"{i}.offsets"] = bags.offsets
        temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        save_file(stored, temporary)
        os.replace(temporary, path)
    return [
        Bags(stored[f"{i}.ids"], stored[f"{i}.counts"], stored[f"{i}.offsets"]) for i in range(3)
    ]
