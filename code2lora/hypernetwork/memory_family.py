"""A memory of a repository's gradients as an adapter family: what it wrote adds up.

State: `{"mean": (W,), "recent": (W,), "sizes": (2,)}`: the mean gradient of all the code, that of
what was written lately, and thousands of characters that either stands for. A commit moves both
means towards the gradient of its added lines by their share, and forgets what it removed evenly; so
both stay means of gradients, however long the history is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from code2lora.history.model import Diff, Snapshot
from code2lora.hypernetwork.config import MemoryConfig
from code2lora.hypernetwork.encoder import Encoder
from code2lora.hypernetwork.family import Reading, State
from code2lora.hypernetwork.heads import Head, first
from code2lora.hypernetwork.lora import Lora

MEAN, RECENT, SIZES = "mean", "recent", "sizes"

_LEAST_SIZE = 1e-3
"""Thousands of characters; keeps an empty repository's means defined."""


class MemoryFamily(nn.Module):
    """Encoder, memory and head.

    The methods of `Family` run without gradients; `advance_states` and `lora` are what training
    differentiates, over flat states (N, G): mean, recent and sizes, G = 2 W + 2.
    N = repositories, K = commits.
    """

    def __init__(self, encoder: Encoder, config: MemoryConfig, head: Head) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.width = config.width
        self._keep = 0.5 ** (1.0 / config.half_life)
        self._recency = config.recency
        self._horizon = config.horizon

    def start_states(self, snapshots: Tensor) -> Tensor:
        """Return the flat states (N, G) at snapshots (N, W + 1)."""
        means, sizes = snapshots[:, :-1], snapshots[:, -1:]
        return torch.cat([means, torch.zeros_like(means), sizes, torch.zeros_like(sizes)], dim=1)

    def advance_states(self, states: Tensor, diffs: Tensor) -> Tensor:
        """Return the states from `states` on: (N, G), diffs (N, K, W + 2) -> (N, K + 1, G)."""
        found = [states]
        for diff in diffs.unbind(1):
            found.append(self._step(found[-1], diff))
        return torch.stack(found, dim=1)

    def lora(self, states: Tensor) -> Lora:
        """Return N adapters for flat states (N, G)."""
        lora: Lora = self.head(self.context(states))
        return lora

    def context(self, states: Tensor) -> Tensor:
        """Return (N, W): the mean gradient, moved towards the recent one."""
        mean, recent, sizes = self._parts(states)
        size = sizes[:, 1:]
        trust = self._recency * size / (size + self._horizon)
        return mean + trust * (recent - mean)

    @torch.no_grad()
    def recentre(self, states: Tensor) -> None:
        """Make the mean of flat states (N, G) the mean repository; only `generic` changes."""
        self.head.recentre(self.context(states))

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
        """See `Family`. snapshot: (W + 1,)."""
        return self._state(self.start_states(snapshot.float()[None]))

    @torch.no_grad()
    def advance(self, state: State, diff: Tensor) -> State:
        """See `Family`. diff: (W + 2,). Always on the CPU, so that a replay gives the same bits."""
        flat = torch.cat([state[MEAN], state[RECENT], state[SIZES]])[None]
        return self._state(self._step(flat, diff.float()[None]))

    @torch.no_grad()
    def adapter(self, state: State) -> Lora:
        """See `Family`."""
        flat = torch.cat([state[MEAN], state[RECENT], state[SIZES]])[None]
        return first(self.lora(flat.to(next(self.head.parameters()).device)))

    @torch.no_grad()
    def generic(self) -> Lora:
        """See `Family`."""
        return self.head.generic()

    def _step(self, states: Tensor, diff: Tensor) -> Tensor:
        """Return the states (N, G) after one commit each, (N, W + 2); an empty one only ages."""
        mean, recent, sizes = self._parts(states)
        written, added, removed = diff[:, : self.width], diff[:, -2:-1], diff[:, -1:]
        kept = (sizes[:, :1] - removed).clamp(min=0.0)
        recent_kept = sizes[:, 1:] * self._keep
        mean = _mixed(mean, kept, written, added)
        recent = _mixed(recent, recent_kept, written, added)
        # What is there is at least what was written just now, whatever was counted before.
        return torch.cat([mean, recent, kept + added, recent_kept + added], dim=1)

    def _parts(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = self.width
        return states[:, :width], states[:, width : 2 * width], states[:, 2 * width :]

    def _state(self, flat: Tensor) -> State:
        mean, recent, sizes = (part[0].float().clone() for part in self._parts(flat))
        return {MEAN: mean, RECENT: recent, SIZES: sizes}


def _mixed(old: Tensor, old_size: Tensor, new: Tensor, new_size: Tensor) -> Tensor:
    """Return the mean of both, weighted by size; the old one where the new has none."""
    share = new_size / (old_size + new_size).clamp(min=_LEAST_SIZE)
    return old + share * (new - old)
