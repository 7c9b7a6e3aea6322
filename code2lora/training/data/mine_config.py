"""How a history is mined: what of it, by which rules, and for which kinds of task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from code2lora.history.stream import StreamName
from code2lora.training.data.targets import TargetConfig

Kind = Literal["assertion", "commit", "file"]


@dataclass(frozen=True, kw_only=True)
class MineConfig:
    """How much of a history is mined."""

    stream: StreamName = "commits"
    """Which commits are steps; the stream's name in `history.stream`. Under `assertions` each is
    compared with the step before it, and the first of the history with the empty tree."""
    commits: int = 384
    """Newest steps that are mined; 0 takes the whole history."""
    anchor_every: int = 64
    """Steps between two snapshots. The newest step always has one; under `assertions`, the last
    that is trained on too."""
    kinds: tuple[Kind, ...] = ("assertion", "commit", "file")
    """Kinds of targets: assertions that a commit writes (Python tests), stretches of lines that it
    adds, stretches of files that are never told (both any language)."""
    target_every: int = 3
    """Every so many steps one gives targets of kind `commit`."""
    max_files: int = 600
    """Files of a snapshot, the first in the order of their blob ids where there are more."""
    max_change_chars: int = 200_000
    """Added and removed text of one file in one step; a longer one is left out of the step."""
    rules: str = "source"
    """Which files count in changes; the rules' name in `history.rules`."""
    snapshot_rules: str | None = None
    """The same for snapshots; None for the rules of the changes."""
    targets: TargetConfig = field(default_factory=TargetConfig)
