"""The first stage of a model: gather a corpus, train a tokenizer, train the base decoder.

Writes  <out>/manifest.json, <out>/tokenizer/, and what `training.base` writes.

A tokenizer that is there is kept: the decoder's checkpoints are only good with the one that they
were begun with.
"""

from __future__ import annotations

import hashlib
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer

from code2lora.training.pretraining.base import BaseResult, fit_base
from code2lora.training.pretraining.corpus import Corpus, gather, write_manifest
from code2lora.training.pretraining.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from code2lora.training.recipe import Recipe

Tell = Callable[[float, str], None]
"""Called with the share that is done, 0 to 1, and what there is to say."""

_DEFAULT_MINUTES = 60.0


def train_base(
    recipe: Recipe,
    out_dir: Path,
    site_dirs: Sequence[Path],
    minutes: float | None,
    tell: Tell,
    stop: Callable[[], bool],
) -> BaseResult:
    """Train a decoder from installed packages, or go on with one that was cut off."""
    out_dir.mkdir(parents=True, exist_ok=True)
    tell(0.0, "reading installed packages")
    places = list(site_dirs) or [Path(sysconfig.get_path("purelib"))]
    corpus = gather(places, config=recipe.corpus)
    write_manifest(corpus, out_dir / "manifest.json")
    tokenizer = _tokenizer(recipe, corpus, out_dir / "tokenizer", tell)
    config = recipe.base
    if minutes is not None or (config.max_tokens is None and config.deadline_unix_s is None):
        span_s = 60 * (minutes or _DEFAULT_MINUTES)
        config = replace(config, deadline_unix_s=time.time() + span_s)
    return fit_base(
        config,
        out_dir,
        train_files=corpus.train,
        validation_files=corpus.validation,
        tokenizer=tokenizer,
        progress=lambda now: tell(
            now.done_share,
            f"step {now.step}, loss {now.loss:.3f}, {now.tokens_per_s:,.0f} tokens/s",
        ),
        should_stop=stop,
    )


def _tokenizer(recipe: Recipe, corpus: Corpus, folder: Path, tell: Tell) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    tell(0.0, "training the tokenizer")
    texts = _sample(corpus, recipe.tokenizer.max_chars)
    made = train_tokenizer(texts, vocab_size=recipe.base.vocab_size)
    save_tokenizer(made, folder, max_length=recipe.base.max_position_embeddings)
    return made


def _sample(corpus: Corpus, max_chars: int) -> Iterator[str]:
    """Yield files in the order of their paths' hashes, until there are characters enough."""
    n_chars = 0
    for file in sorted(corpus.train, key=lambda f: hashlib.sha256(f.path.encode()).digest()):
        if n_chars >= max_chars:
            return
        n_chars += len(file.text)
        yield file.text
