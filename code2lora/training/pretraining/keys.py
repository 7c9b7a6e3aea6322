"""Find the keys through which a base model's gradients are seen: where repositories differ.

Reads   mined repositories, the base decoder.
Writes  an encoder of the recipe `gradients` (`hypernetwork/encoder_gradients.py`).

For each projection W the gradient of the loss on a repository's files is a matrix G (d_out, d_in).
The keys are the directions at its inputs along which G varies most between repositories: the
leading eigenvectors of the mean of (G - mean)^T (G - mean). They are scaled so that the numbers
of (G - mean) keys^T are about 1 where nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from code2lora.errors import UserError
from code2lora.history.model import SourceFile
from code2lora.hypernetwork.config import BaseConfig, BlockConfig, Recipe
from code2lora.hypernetwork.encoder_gradients import (
    GradientsConfig,
    GradientsEncoder,
    excerpts,
    key_name,
    padded,
    told_files,
)
from code2lora.hypernetwork.inject import projections
from code2lora.training.data.shards import Shard
from code2lora.training.pretraining.keys_config import KeysConfig

if TYPE_CHECKING:
    from code2lora.training.run import Decoder

_ROWS_PER_PASS = 8


class KeySearch:
    """Adds up what repositories' gradients have in common and where they differ."""

    def __init__(
        self, model: Any, tokenizer: Tokenizer, base: BaseConfig, config: KeysConfig
    ) -> None:
        """model: the base decoder; its parameters take no gradients afterwards.

        base: its configuration, with its fingerprint
        """
        first = int(base.n_layers * config.first_layer_share)
        blocks = BlockConfig(
            layers=tuple(range(first, base.n_layers)),
            outputs={target: base.dims[target][1] for target in config.targets},
            n_keys=config.n_keys,
        )
        self.config = GradientsConfig(
            blocks=blocks,
            base_fingerprint=base.fingerprint,
            excerpt_tokens=config.excerpt_tokens,
            file_excerpts=config.file_excerpts,
            snapshot_files=config.snapshot_files,
            diff_files=config.diff_files,
            diff_excerpts=config.diff_excerpts,
        )
        self._files = config.files
        self._model, self._tokenizer = model.train(False).requires_grad_(False), tokenizer
        modules: Any = projections(model)
        self._weights = [modules[place].weight for place in blocks.places]
        self._sums = [torch.zeros_like(weight) for weight in self._weights]
        self._squares = [w.new_zeros(w.shape[1], w.shape[1]) for w in self._weights]
        self.n_repositories = 0

    def add(self, files: Sequence[SourceFile]) -> None:
        """Read a repository's files; one without any text counts for nothing."""
        rows = [
            excerpt
            for file in told_files(files, self._files)
            for excerpt in excerpts(
                self._tokenizer,
                file.path,
                file.text,
                self.config.excerpt_tokens,
                self.config.file_excerpts,
            )
        ]
        if not rows:
            return
        for i, gradient in enumerate(self._mean_gradients(rows)):
            self._sums[i] += gradient
            self._squares[i] += gradient.T @ gradient
        self.n_repositories += 1

    def keys(self) -> dict[str, Tensor]:
        """Return `key_name(...)` -> (R, d_in), float32 on the CPU.

        Raises UserError when fewer than two repositories were read, or all are the same.
        """
        n = self.n_repositories
        if n < 2:
            raise UserError(f"{n} repositories to find keys in, expected at least 2")
        found = {}
        for place, total, square in zip(
            self.config.blocks.places, self._sums, self._squares, strict=True
        ):
            spread = (square - total.T @ total / n) / n  # (d_in, d_in)
            variance = float(spread.trace()) / total.numel()
            if variance <= 0:
                raise UserError("the repositories' gradients do not differ", hint="mine others")
            vectors = torch.linalg.eigh(spread.double()).eigenvectors  # ascending
            leading = vectors[:, -self.config.blocks.n_keys :].flip(1).T
            found[key_name(*place)] = (leading / variance**0.5).float().cpu().contiguous()
        return found

    def _mean_gradients(self, rows: Sequence[tuple[list[int], int]]) -> list[Tensor]:
        """Return dL/dW of each projection, the mean over all asked tokens."""
        total = [torch.zeros_like(weight) for weight in self._weights]
        n_asked = 0
        for weight in self._weights:
            weight.requires_grad_(True)
        try:
            for start in range(0, len(rows), _ROWS_PER_PASS):
                part = rows[start : start + _ROWS_PER_PASS]
                loss, n = self._loss(part)
                n_asked += n
                for summed, one in zip(
                    total, torch.autograd.grad(loss, self._weights), strict=True
                ):
                    summed += one
        finally:
            for weight in self._weights:
                weight.requires_grad_(False)
        return [summed / n_asked for summed in total]

    def _loss(self, rows: Sequence[tuple[list[int], int]]) -> tuple[Tensor, int]:
        """Return the summed loss of some rows, in nats, and how many tokens were asked for."""
        tokens, asked = padded(
            [row for row, _ in rows], [n for _, n in rows], self._weights[0].device
        )
        labels = tokens.masked_fill(~asked, -100)[:, 1:]
        logits = self._model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        return loss, int((labels != -100).sum())


def find_keys(
    shards: Sequence[Shard],
    decoder: Decoder,
    config: KeysConfig,
    out_dir: Path,
    *,
    progress: Callable[[str, float], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> GradientsConfig | None:
    """Read the newest snapshot of each training repository and write the encoder; nothing if asked
    to stop.

    progress: called with the name of each repository before it is read, and the share that is done
    Raises UserError when there are fewer than two, or they do not differ.
    """
    search = KeySearch(decoder.model, decoder.tokenizer, decoder.config, config)
    for i, shard in enumerate(shards):
        if stop is not None and stop():
            return None
        if progress is not None:
            progress(shard.name, i / len(shards))
        search.add(_newest_files(shard))
    keys = search.keys()
    recipe = Recipe(diff="gradients", snapshot="gradients", rules="source")  # of no consequence
    encoder = GradientsEncoder(decoder.model, decoder.tokenizer, keys, search.config, recipe)
    encoder.save(out_dir)
    return search.config


def _newest_files(shard: Shard) -> list[SourceFile]:
    files, snapshots = shard.table("files"), shard.table("snapshots")
    text_of = dict(zip(files["blob"], files["text"], strict=True))
    newest = max(snapshots["index"], default=0)
    rows = zip(snapshots["index"], snapshots["path"], snapshots["blob"], strict=True)
    return [SourceFile(path, blob, text_of[blob]) for index, path, blob in rows if index == newest]
