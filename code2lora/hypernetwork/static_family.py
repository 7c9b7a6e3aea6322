"""A head on a snapshot alone: the released static checkpoints as an adapter family.

State: `{"snapshot": (D_s,)}`, the snapshot's features.

There is no recurrence. `advance` returns the state unchanged, so a commit's adapter is that of
the anchor it descends from, and only a new anchor brings newer code in. Diffs are not read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from code2lora.history.model import Diff, Snapshot
from code2lora.hypernetwork.encoder import Encoder
from code2lora.hypernetwork.family import Reading, State
from code2lora.hypernetwork.heads import Head, first
from code2lora.hypernetwork.lora import Lora

SNAPSHOT = "snapshot"
"""Name of the state's one tensor."""

_UNREAD = "static"


class StaticFamily(nn.Module):
    """Encoder, centring and head.

    The methods of `Family` run without gradients; `lora` is what training differentiates.
    """

    snapshot_mean: Tensor
    snapshot_scale: Tensor

    def __init__(self, encoder: Encoder, head: Head, snapshot_width: int) -> None:
        """snapshot_width: D_s, the length of a snapshot's features."""
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.register_buffer("snapshot_mean", torch.zeros(snapshot_width))
        self.register_buffer("snapshot_scale", torch.ones(snapshot_width))

    def start_states(self, snapshots: Tensor) -> Tensor:
        """Return the features of snapshots (N, D_s) themselves: they are the states."""
        return snapshots

    def lora(self, snapshots: Tensor) -> Lora:
        """Return N adapters for the features of snapshots (N, D_s)."""
        lora: Lora = self.head(self._centre(snapshots))
        return lora

    @torch.no_grad()
    def recentre(self, snapshots: Tensor) -> None:
        """Make the mean of snapshots (N, D_s) the mean repository; only `generic` changes."""
        self.head.recentre(self._centre(snapshots))

    def diff_key(self, diff: Diff) -> str:
        """Return one key for every diff: none is read."""
        return _UNREAD

    def read_diffs(self, diffs: Sequence[Diff]) -> list[Reading]:
        """Return empty features with no tokens for each diff."""
        return [Reading(torch.zeros(0), 0) for _ in diffs]

    def read_snapshot(self, snapshot: Snapshot) -> Reading:
        """Return a snapshot's features with the number of tokens read."""
        return self.encoder.read_snapshot(snapshot)

    def initial(self, snapshot: Tensor) -> State:
        """Return the features themselves as the state."""
        return {SNAPSHOT: snapshot.float().cpu()}

    def advance(self, state: State, diff: Tensor) -> State:
        """Return the state unchanged; see the module's header."""
        return state

    @torch.no_grad()
    def adapter(self, state: State) -> Lora:
        """See `Family`."""
        return first(self.lora(state[SNAPSHOT].to(self.snapshot_mean.device, copy=True)[None]))

    @torch.no_grad()
    def generic(self) -> Lora:
        """See `Family`."""
        return self.head.generic()

    def _centre(self, features: Tensor) -> Tensor:
        return (features - self.snapshot_mean) / self.snapshot_scale
