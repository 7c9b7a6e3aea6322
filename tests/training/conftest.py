"""The small worlds, made once for all tests of this room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from code2lora.training import run
from code2lora.training.data.dataset import RepositoryData, load_repositories
from code2lora.training.data.mining import Repository, mine
from code2lora.training.data.shards import read_shards
from tests.training import worlds


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep to one thread: the sums are small, and equal runs must give equal bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> list[Repository]:
    """Three repositories, each with words of its own."""
    root = tmp_path_factory.mktemp("repositories")
    return [worlds.make_repository(root, name) for name in worlds.WORDS]


@pytest.fixture(scope="session")
def mined(repositories: list[Repository], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of the three repositories."""
    out_dir = tmp_path_factory.mktemp("mined")
    results = mine(repositories, out_dir, worlds.MINE)
    assert {result.status for result in results} == {"mined"}
    return out_dir


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A tokenizer of 330 ids."""
    return worlds.make_tokenizer()


@pytest.fixture(scope="session")
def data(mined: Path, tokenizer: Tokenizer) -> list[RepositoryData]:
    """The three repositories in memory, in the order of their names."""
    return load_repositories(read_shards(mined), tokenizer)


@pytest.fixture
def decoder(tokenizer: Tokenizer, tmp_path: Path) -> run.Decoder:
    """A random decoder of two layers, read from `model/base` below the test's folder."""
    model, _ = worlds.make_base(tokenizer)
    model.save_pretrained(tmp_path / "model" / "base")
    tokenizer.save(str(tmp_path / "model" / "base" / "tokenizer.json"))
    return run.load_decoder(tmp_path / "model" / "base", name="tiny")
