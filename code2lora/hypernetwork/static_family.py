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
    """Encoder and head, with nothing between them."""

    def __init__(self, encoder: Encoder, head: Head) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

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
        device = next(self.head.parameters()).device
        lora: Lora = self.head(state[SNAPSHOT].to(device, copy=True)[None])
        return first(lora)

    @torch.no_grad()
    def generic(self) -> Lora:
        """See `Family`."""
        return self.head.generic()
