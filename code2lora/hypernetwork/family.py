"""What an adapter family offers; everything outside this room knows only this.

A family turns text into features (the expensive, cacheable part), features into a state, and a
state into LoRA weights. There are three: the commit GRU, a static one that only a snapshot moves,
and a memory of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from code2lora.history.model import Diff, Snapshot
from code2lora.hypernetwork.lora import Lora

State = dict[str, Tensor]
"""A named set of float32 CPU tensors; what the state store keeps for a commit."""


@dataclass(frozen=True)
class Reading:
    """What a family made of one diff or snapshot."""

    features: Tensor
    """float32, CPU, of the family's own fixed shape; zeros when there was nothing to read."""
    n_tokens: int
    """How many tokens were read."""


class Family(Protocol):
    """One way to carry a repository's knowledge. All methods run without gradients."""

    def diff_key(self, diff: Diff) -> str:
        """Return the content key of what `read_diffs` would read: equal keys, equal features.

        Line numbers, blob ids and commit ids are not content (unless the family reads them), so a
        rebased, unchanged patch keeps its key.
        """

    def read_diffs(self, diffs: Sequence[Diff]) -> list[Reading]:
        """Return what was read of each diff; it depends on that diff alone, bit for bit."""

    def read_snapshot(self, snapshot: Snapshot) -> Reading:
        """Return what was read of a snapshot."""

    def initial(self, snapshot: Tensor) -> State:
        """Return the state at an anchor commit from its snapshot's features."""

    def advance(self, state: State, diff: Tensor) -> State:
        """Return the state after a commit from its first parent's state and the diff's features."""

    def adapter(self, state: State) -> Lora:
        """Return the LoRA weights for a state: float32, on the compute device, no batch axis."""

    def generic(self) -> Lora:
        """Return the adapter of the mean training repository, the control for `adapter`."""
