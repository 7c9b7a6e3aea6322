"""Turn what is told of a repository into features: token bags that learn, or vectors that do not.

Two kinds of inputs, for two kinds of encoders. `LexicalInputs` holds the table of the `lines`
encoder as a parameter; it can leave files out of what it tells, so files can be asked for. What a
frozen encoder made of a whole diff cannot be taken apart again: `FrozenInputs` tells everything,
and nothing of a snapshot that it tells may be asked for.

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
from code2lora.hypernetwork.encoder_lines import LinesEncoder
from code2lora.training.data.bags import FloatArray, encode, encode_dense
from code2lora.training.data.dataset import RepositoryData
from code2lora.training.data.features import Features

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


@dataclass(frozen=True)
class Sample:
    """Fixed inputs of training repositories, on which the statistics are taken."""

    snapshots: tuple[SnapshotInput, ...]
    diffs: tuple[DiffInput, ...]


def statistics_sample(
    inputs: Inputs, repositories: Sequence[RepositoryData], *, diffs_each: int = 24
) -> Sample:
    """Return every snapshot and evenly spaced commits that may be trained on."""
    snapshots: list[SnapshotInput] = []
    diffs: list[DiffInput] = []
    for data in repositories:
        anchors = [anchor for anchor in data.anchors if anchor < data.n_train]
        snapshots += [inputs.snapshot(data, anchor, frozenset()) for anchor in anchors]
        step = max(1, data.n_train // diffs_each)
        diffs += [inputs.diff(data, i, frozenset()) for i in range(1, data.n_train, step)]
    return Sample(tuple(snapshots), tuple(diffs))


def _refuse(held_out: Collection[str]) -> None:
    if held_out:
        raise UserError(
            f"{len(held_out)} files are to be held out, but frozen features tell whole diffs",
            hint="set evaluate.held_out_share = 0 in the recipe, or train the `lines` encoder",
        )


def _features(data: RepositoryData) -> Features:
    if data.features is None:
        raise UserError(
            f"{data.name} has no features", hint="run `code2lora train embed`, and name its encoder"
        )
    return data.features
