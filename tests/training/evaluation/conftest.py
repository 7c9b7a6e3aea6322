"""What the tests of this room share: shards in the order of `data`, and a decoder to ask."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from code2lora.hypernetwork.lora import Lora
from code2lora.training.data.shards import Shard, read_shards
from code2lora.training.fitting.objective import Frozen, freeze
from tests.training.worlds import make_base


@pytest.fixture(scope="session")
def shards(mined: Path) -> list[Shard]:
    """The shards of the three repositories, in the order of `data`."""
    return list(read_shards(mined))


@pytest.fixture
def base(tokenizer: Tokenizer) -> Frozen:
    """A random decoder of two layers."""
    return freeze(make_base(tokenizer)[0], autocast=False)


@pytest.fixture
def loras(tokenizer: Tokenizer) -> list[Lora]:
    """Three adapters that change what the decoder writes."""
    dims = make_base(tokenizer)[1].dims
    generator = torch.Generator().manual_seed(0)

    def one() -> Lora:
        return Lora(
            a={t: torch.randn(2, 3, d_in, generator=generator) for t, (d_in, _) in dims.items()},
            b={t: torch.randn(2, d_out, 3, generator=generator) for t, (_, d_out) in dims.items()},
            rank=3,
            alpha=1.0,
        )

    return [one() for _ in range(3)]
