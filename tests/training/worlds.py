"""Small worlds to learn from: repositories with words of their own, a tiny tokenizer and base."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from code2lora.hypernetwork.config import BaseConfig, decoder_dims
from code2lora.training.data.mining import MineConfig, Repository
from code2lora.training.data.targets import TargetConfig
from code2lora.training.pretraining.tokenizer import train_tokenizer
from tests.gitrepo import GitRepo

WORDS = {
    "alpha": ("anchor", "almond", "amber", "arrow"),
    "beta": ("basket", "bishop", "bronze", "beacon"),
    "gamma": ("garden", "goblet", "granite", "glacier"),
}
"""Repository -> the words that its code is made of."""

MORE_WORDS = {
    "delta": ("dagger", "dolphin", "drawer", "dragon"),
    "epsilon": ("ember", "engine", "easel", "eagle"),
}
"""Repositories for tests that need more than three that share nothing."""

N_COMMITS = 9

MINE = MineConfig(
    commits=N_COMMITS,
    anchor_every=4,
    target_every=1,
    targets=TargetConfig(max_lines=4, min_chars=8, prefix_chars=120),
)


def source(words: tuple[str, ...], rng: random.Random, *, n_functions: int) -> str:
    """Return Python source whose names are made of the words."""
    lines = []
    for _ in range(n_functions):
        name, other = rng.choice(words), rng.choice(words)
        lines += [
            f"def {name}_{rng.randrange(100)}({other}):",
            f"    return make_{other}({other}, {name}_{other})",
            "",
        ]
    return "\n".join(lines) + "\n"


def make_repository(path: Path, name: str) -> Repository:
    """Return a repository of a few files and `N_COMMITS` commits, the same on every call."""
    rng = random.Random(name)
    repo = GitRepo(path / name)
    words = (WORDS | MORE_WORDS)[name]
    files = {f"{word}.py": source(words, rng, n_functions=3) for word in words}
    repo.commit(dict(files))
    for _ in range(N_COMMITS - 1):
        file = rng.choice(sorted(files))
        files[file] += source(words, rng, n_functions=2)
        repo.commit({file: files[file]})
    return Repository(f"test/{name}", repo.path / ".git")


def make_tokenizer() -> Tokenizer:
    """Return a tokenizer that has whole tokens for most of the words."""
    rng = random.Random(0)
    texts = [source(words, rng, n_functions=40) for words in WORDS.values()]
    return train_tokenizer(texts, vocab_size=330)


def make_base(tokenizer: Tokenizer) -> tuple[Qwen2ForCausalLM, BaseConfig]:
    """Return a random decoder of two layers, every dimension another number."""
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    n_layers, dims = decoder_dims(config.to_dict())
    return model, BaseConfig(id="tiny", n_layers=n_layers, dims=dims)
