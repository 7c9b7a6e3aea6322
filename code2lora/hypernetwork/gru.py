"""Turn a snapshot's features and a stream of diff features into hidden states, one per commit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from code2lora.hypernetwork.config import GruConfig


class CommitGRU(nn.Module):
    """The paper's recurrence over commits, with the released parameter names.

    N = repositories, K = commits, G = hidden width.
    """

    def __init__(self, config: GruConfig) -> None:
        super().__init__()
        width = config.hidden_width
        self.diff_proj = nn.Sequential(nn.Linear(config.diff_width, width), nn.LayerNorm(width))
        self.repo_init_proj = nn.Sequential(
            nn.Linear(config.snapshot_width, width), nn.GELU(), nn.LayerNorm(width)
        )
        self.gru = nn.GRU(width, width, batch_first=True)
        self.output_norm = nn.LayerNorm(width)

    def initial(self, snapshot: Tensor) -> Tensor:
        """Return the hidden state at an anchor: snapshot (N, D_s) -> (N, G)."""
        hidden: Tensor = self.repo_init_proj(snapshot)
        return hidden

    def step(self, hidden: Tensor, diff: Tensor) -> Tensor:
        """Return the hidden state after one commit: hidden (N, G), diff (N, D_d) -> (N, G)."""
        return self.sequence(hidden, diff[:, None])[:, -1]

    def sequence(self, hidden: Tensor, diffs: Tensor) -> Tensor:
        """Return every hidden state: hidden (N, G), diffs (N, K, D_d) -> (N, K + 1, G).

        Index 0 is `hidden` itself, index k the state after the k-th diff.
        """
        if diffs.shape[1] == 0:
            return hidden[:, None]
        after, _ = self.gru(self.diff_proj(diffs), hidden[None].contiguous())
        return torch.cat([hidden[:, None], after], dim=1)

    def read_out(self, hidden: Tensor) -> Tensor:
        """Return the head's context for hidden states of any leading shape; nothing feeds back."""
        context: Tensor = self.output_norm(hidden)
        return context
