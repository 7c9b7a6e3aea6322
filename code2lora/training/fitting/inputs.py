"""Turn what is told of a repository into features: token bags that learn, or vectors that do not.

Three kinds of inputs, for three kinds of encoders. `LexicalInputs` holds the table of the `lines`
encoder as a parameter; it can leave files out of what it tells, so files can be asked for. So can
`PartInputs`, which adds up what an encoder made of each file and each change alone. What a frozen
encoder made of a whole diff cannot be taken apart again: `FrozenInputs` tells everything, and
nothing of a snapshot that it tells may be asked for.

V = size of the vocabulary, E = width of the encoder, D_s and D_d = lengths of a snapshot's and of a
diff's features.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from code2lora.errors import UserError
from code2lora.hypernetwork.encoder_gradients import pooled, pooled_changes
from code2lora.hypernetwork.encoder_lines import LinesEncoder
from code2lora.training.data.bags import FloatArray, encode, encode_dense
from code2lora.training.data.dataset import RepositoryData
from code2lora.training.data.features import Features, Parts

SnapshotInput = Any
DiffInput = Any
"""What an `Inputs` gathers of a snapshot and of a commit; only the same `Inputs` can read it."""


class Inputs(Protocol):
    """One way to tell a repository: first gathered on the CPU, then turned into features."""

    holds_out: bool
    """Whether it can leave files out of what it tells."""

    def snapshot(
        self, data: RepositoryData, anchor: int, held_out: Collection[str]
    ) -> SnapshotInput:
        """Return what is read of a snapshot."""

    def diff(self, data: RepositoryData, index: int, held_out: Collection[str]) -> DiffInput:
        """Return what is read of a commit's changes."""

    def snapshot_features(self, snapshots: Sequence[SnapshotInput]) -> Tensor:
        """Return (n, D_s)."""

    def diff_features(self, diffs: Sequence[DiffInput]) -> Tensor:
        """Return (n, D_d)."""


class LexicalInputs(nn.Module):
    """Token bags times a table that is trained with everything behind it."""

    holds_out = True

    def __init__(self, encoder: LinesEncoder) -> None:
        """encoder: its table becomes the parameter."""
        super().__init__()
        self.encoder = encoder
        self.table = nn.Parameter(encoder.table)
        encoder.table = self.table

    def snapshot(self, data: RepositoryData, anchor: int, held_out: Collection[str]) -> FloatArray:
        """Return (V,) weights of the files that are told."""
        return data.snapshot_weights(data.told_files(anchor, held_out), self.table.shape[0])

    def diff(self, data: RepositoryData, index: int, held_out: Collection[str]) -> DiffInput:
        """Return the weights of the added and of the removed lines that are told."""
        return data.diff_weights(index, held_out)

    def snapshot_features(self, snapshots: Sequence[FloatArray]) -> Tensor:
        """Return (n, E)."""
        return encode_dense(self.table, np.stack(snapshots))

    def diff_features(self, diffs: Sequence[DiffInput]) -> Tensor:
        """Return (n, 2 E), [added; removed] of each commit."""
        both = encode(self.table, [side for diff in diffs for side in diff])
        return both.view(len(diffs), 2 * self.table.shape[1])


class FrozenInputs(nn.Module):
    """Vectors that a frozen encoder made beforehand, as `RepositoryData.features` holds them."""

    holds_out = False

    _device: Tensor

    def __init__(self, snapshot_width: int, diff_width: int) -> None:
        """snapshot_width, diff_width: D_s and D_d; D_d is 0 where diffs are not read."""
        super().__init__()
        self._widths = (snapshot_width, diff_width)
        self.register_buffer("_device", torch.empty(0), persistent=False)  # follows the module

    def snapshot(
        self, data: RepositoryData, anchor: int, held_out: Collection[str]
    ) -> SnapshotInput:
        """Return (D_s,). Raises UserError when something is held out."""
        _refuse(held_out)
        return _features(data).snapshots[anchor]

    def diff(self, data: RepositoryData, index: int, held_out: Collection[str]) -> DiffInput:
        """Return (D_d,). Raises UserError when something is held out."""
        _refuse(held_out)
        return _features(data).diffs[index]

    def snapshot_features(self, snapshots: Sequence[SnapshotInput]) -> Tensor:
        """Return (n, D_s)."""
        return self._rows(snapshots, self._widths[0])

    def diff_features(self, diffs: Sequence[DiffInput]) -> Tensor:
        """Return (n, D_d)."""
        return self._rows(diffs, self._widths[1])

    def _rows(self, rows: Sequence[Tensor], width: int) -> Tensor:
        values = torch.stack(list(rows)) if len(rows) else torch.zeros(0, width)
        if values.shape[1] != width:
            raise UserError(
                f"the features have {values.shape[1]} numbers, expected {width}",
                hint="embed with the encoder and the recipe that the model was made for",
            )
        return values.to(self._device.device)


class PartInputs(nn.Module):
    """Vectors of files and of changes, made beforehand, and added up here."""

    holds_out = True

    _device: Tensor

    def __init__(self, diff_files: int) -> None:
        """diff_files: `GradientsConfig.diff_files`"""
        super().__init__()
        self._diff_files = diff_files
        self.register_buffer("_device", torch.empty(0), persistent=False)  # follows the module

    def snapshot(self, data: RepositoryData, anchor: int, held_out: Collection[str]) -> Tensor:
        """Return (D_s,) of the files that are told; the last number counts them all."""
        parts, told = _parts(data), data.told_files(anchor, held_out)
        rows = [row for file in told if (row := parts.file_rows[file.bag]) is not None]
        features = pooled(parts.files[rows].float())
        features[-1] = sum(parts.sizes[file.bag] for file in told) / 1000
        return features

    def diff(self, data: RepositoryData, index: int, held_out: Collection[str]) -> Tensor:
        """Return (D_d,) of the changes that are told."""
        parts = _parts(data)
        rows = parts.change_rows[[change.row for change in data.changes(index, held_out)]]
        return pooled_changes(parts.changes[rows.long()].float(), self._diff_files)

    def snapshot_features(self, snapshots: Sequence[SnapshotInput]) -> Tensor:
        """Return (n, D_s)."""
        return torch.stack(list(snapshots)).to(self._device.device)

    def diff_features(self, diffs: Sequence[DiffInput]) -> Tensor:
        """Return (n, D_d)."""
        return torch.stack(list(diffs)).to(self._device.device)


def opening(
    inputs: Inputs, data: RepositoryData, anchor: int, held_out: Collection[str]
) -> DiffInput | None:
    """Return the diff that is told with a snapshot; None where it is told by itself.

    The first step of a history starts from its own snapshot and goes on by its whole tree as one
    diff, in training as in use (`history.stream`).
    """
    if not data.opens_at(anchor):
        return None
    return inputs.diff(data, anchor, data.hidden_paths(anchor, held_out))


@dataclass(frozen=True)
class Sample:
    """Fixed inputs of training repositories, on which the statistics are taken."""

    snapshots: tuple[SnapshotInput, ...]
    openings: tuple[DiffInput | None, ...]
    """For each snapshot, as `opening` returned it."""
    diffs: tuple[DiffInput, ...]


def statistics_sample(
    inputs: Inputs, repositories: Sequence[RepositoryData], *, diffs_each: int = 24
) -> Sample:
    """Return every snapshot and evenly spaced commits that may be trained on."""
    snapshots: list[SnapshotInput] = []
    openings: list[DiffInput | None] = []
    diffs: list[DiffInput] = []
    for data in repositories:
        anchors = [anchor for anchor in data.anchors if anchor < data.n_train]
        snapshots += [inputs.snapshot(data, anchor, frozenset()) for anchor in anchors]
        openings += [opening(inputs, data, anchor, frozenset()) for anchor in anchors]
        step = max(1, data.n_train // diffs_each)
        first = 0 if data.opens else 1
        diffs += [inputs.diff(data, i, frozenset()) for i in range(first, data.n_train, step)]
    return Sample(tuple(snapshots), tuple(openings), tuple(diffs))


def _refuse(held_out: Collection[str]) -> None:
    if held_out:
        raise UserError(
            f"{len(held_out)} files are to be held out, but frozen features tell whole diffs",
            hint="set evaluate.held_out_share = 0 in the recipe, or train the `lines` encoder",
        )


_EMBED = "run `code2lora train embed`, and name the encoder"


def _parts(data: RepositoryData) -> Parts:
    if not isinstance(data.features, Parts):
        raise UserError(f"{data.name} has no features of its files and changes", hint=_EMBED)
    return data.features


def _features(data: RepositoryData) -> Features:
    if not isinstance(data.features, Features):
        raise UserError(f"{data.name} has no features", hint=_EMBED)
    return data.features
