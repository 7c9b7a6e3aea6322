"""The commit GRU as an adapter family: features are centred, folded into one vector, read out.

State: `{"h": (G,)}`, the GRU's hidden vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from code2lora.history.model import Diff, Snapshot
from code2lora.hypernetwork.config import GruConfig
from code2lora.hypernetwork.encoder import Encoder
from code2lora.hypernetwork.family import Reading, State
from code2lora.hypernetwork.gru import CommitGRU
from code2lora.hypernetwork.heads import Head, first
from code2lora.hypernetwork.lora import Lora

HIDDEN = "h"
"""Name of the state's one tensor."""


class GruFamily(nn.Module):
    """Encoder, centring, GRU and head.

    The encoder is frozen and no submodule, because it is kept in files of its own.
    The methods of `Family` run without gradients; `states` and `lora` are what training
    differentiates. N = repositories, K = commits, G = hidden width.
    """

    diff_mean: Tensor
    diff_scale: Tensor
    snapshot_mean: Tensor
    snapshot_scale: Tensor

    def __init__(self, encoder: Encoder, config: GruConfig, head: Head) -> None:
        super().__init__()
        self.encoder = encoder
        self.gru = CommitGRU(config)
        self.head = head
        self.register_buffer("diff_mean", torch.zeros(config.diff_width))
        self.register_buffer("diff_scale", torch.ones(config.diff_width))
        self.register_buffer("snapshot_mean", torch.zeros(config.snapshot_width))
        self.register_buffer("snapshot_scale", torch.ones(config.snapshot_width))

    @torch.no_grad()
    def set_statistics(
        self,
        *,
        diff_mean: Tensor,
        diff_scale: Tensor,
        snapshot_mean: Tensor,
        snapshot_scale: Tensor,
    ) -> None:
        """Set what is subtracted from features and what they are then divided by.

        Means are (D,); scales are (D,) or scalars, and positive.
        """
        self.diff_mean.copy_(diff_mean)
        self.diff_scale.copy_(diff_scale)
        self.snapshot_mean.copy_(snapshot_mean)
        self.snapshot_scale.copy_(snapshot_scale)

    def states(self, snapshots: Tensor, diffs: Tensor) -> Tensor:
        """Return every hidden state: snapshots (N, D_s), diffs (N, K, D_d) -> (N, K + 1, G)."""
        return self.advance_states(self.start_states(snapshots), diffs)

    def start_states(self, snapshots: Tensor) -> Tensor:
        """Return the hidden states (N, G) at snapshots (N, D_s)."""
        return self.gru.initial(self._centre_snapshot(snapshots))

    def advance_states(self, hidden: Tensor, diffs: Tensor) -> Tensor:
        """Return the states from `hidden` on: hidden (N, G), diffs (N, K, D_d) -> (N, K + 1, G).

        Index 0 is `hidden`; detach it to truncate the gradient there.
        """
        return self.gru.sequence(hidden, self._centre_diff(diffs))

    def lora(self, hidden: Tensor) -> Lora:
        """Return N adapters for hidden states (N, G)."""
        lora: Lora = self.head(self.gru.read_out(hidden))
        return lora

    @torch.no_grad()
    def recentre(self, hidden: Tensor) -> None:
        """Make the mean of hidden states (N, G) the mean repository of `generic`.

        No adapter changes but the generic one.
        """
        self.head.recentre(self.gru.read_out(hidden))

    def diff_key(self, diff: Diff) -> str:
        """See `Family`."""
        return self.encoder.diff_key(diff)

    def read_diffs(self, diffs: Sequence[Diff]) -> list[Reading]:
        """Return each diff's features with the number of tokens read."""
        return self.encoder.read_diffs(diffs)

    def read_snapshot(self, snapshot: Snapshot) -> Reading:
        """Return a snapshot's features with the number of tokens read."""
        return self.encoder.read_snapshot(snapshot)

    @torch.no_grad()
    def initial(self, snapshot: Tensor) -> State:
        """See `Family`. snapshot: (D_s,)."""
        features = self._centre_snapshot(self._placed(snapshot))
        return self._state(self.gru.initial(features))

    @torch.no_grad()
    def advance(self, state: State, diff: Tensor) -> State:
        """See `Family`. diff: (D_d,).

        Always one commit of one repository in memory of our own, so that a replay takes the same
        arithmetic and gives the same bits as the increments did: batches change the order of
        sums, and so can the alignment of tensors that came out of a file.
        """
        hidden, features = self._placed(state[HIDDEN]), self._placed(diff)
        return self._state(self.gru.step(hidden, self._centre_diff(features)))

    @torch.no_grad()
    def adapter(self, state: State) -> Lora:
        """See `Family`."""
        return first(self.lora(self._placed(state[HIDDEN])))

    @torch.no_grad()
    def generic(self) -> Lora:
        """See `Family`."""
        return self.head.generic()

    def _placed(self, vector: Tensor) -> Tensor:
        """Return a fresh (1, D) copy on the compute device."""
        return vector.to(self.diff_mean.device, copy=True)[None]

    def _centre_diff(self, features: Tensor) -> Tensor:
        return (features - self.diff_mean) / self.diff_scale

    def _centre_snapshot(self, features: Tensor) -> Tensor:
        return (features - self.snapshot_mean) / self.snapshot_scale

    def _state(self, hidden: Tensor) -> State:
        return {HIDDEN: hidden[0].float().cpu()}
