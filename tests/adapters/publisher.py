"""A process that publishes without end and is killed again and again: `publisher.py ROOT`.

It imports torch once and then forks one publisher for each kill.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from itertools import count
from pathlib import Path

import torch

from code2lora.adapters.layout import AdapterMetadata
from code2lora.adapters.publish import publish
from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.projections import TARGETS

KILLS = 25
LONGEST_LIFE_S = 0.06
"""After it has begun to publish."""
LATEST_START_S = 10.0


def publish_for_ever(root: Path, turn: int) -> None:
    for i in count(turn * 1_000_000):
        draw = torch.Generator().manual_seed(i)
        lora = Lora(
            a={t: torch.randn(2, 3, 50, generator=draw) for t in TARGETS},
            b={t: torch.randn(2, 60, 3, generator=draw) for t in TARGETS},
            rank=3,
            alpha=6.0,
        )
        metadata = AdapterMetadata(
            repository="a" * 32,
            commit=f"{i:040d}"[::-1],
            state_sha256="5" * 64,
            checkpoint="6" * 64,
            base_model="tiny",
        )
        publish(lora, metadata, root, n_layers=2)


def entries(root: Path) -> set[str]:
    """Return what publishers have made, finished or not."""
    return {path.name for path in root.glob("*/*")} | {path.name for path in root.glob("*/.*")}


def main() -> None:
    torch.set_num_threads(1)
    chance = random.Random(0)
    root = Path(sys.argv[1])
    for turn in range(KILLS):
        before = entries(root)
        child = os.fork()
        if child == 0:
            publish_for_ever(root, turn)
        deadline_s = time.monotonic() + LATEST_START_S
        while entries(root) == before and time.monotonic() < deadline_s:
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, LONGEST_LIFE_S))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
