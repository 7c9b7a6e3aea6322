"""Turn windows of token bags into hidden states: the encoder, GRU and head while they are trained.

The encoder's table is a parameter beside the family's own; both learn from the same loss. Features
are centred with statistics of the training repositories, which follow the table as it moves.

N = windows, K = commits of the longest window, G = hidden width, E = width of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from code2lora.hypernetwork.config import BaseConfig, GruConfig, HeadConfig, Recipe
from code2lora.hypernetwork.encoder_lines import LinesEncoder
from code2lora.hypernetwork.gru_family import GruFamily
from code2lora.hypernetwork.heads import build_head
from code2lora.training.data.bags import (
    FloatArray,
    Weights,
    encode,
    encode_dense,
    inverse_document_frequency,
    random_table,
)
from code2lora.training.data.dataset import RepositoryData
from code2lora.training.fitting.windows import Window


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """Sizes of the encoder, the GRU and the head."""

    encoder_width: int = 256
    hidden_width: int = 512
    head: Literal["factorized", "paper"] = "factorized"
    trunk_width: int = 256
    rank: int = 16
    alpha: float = 16.0
    carry: float = 5.0
    """Added to the bias of the GRU's update gate: a state keeps sigmoid(carry) of itself over a
    commit to begin with, or it would have forgotten the snapshot after a few."""


@dataclass(frozen=True)
class Sample:
    """Fixed inputs of training repositories, on which the statistics are taken."""

    snapshots: FloatArray
    """(n, V)"""
    added: tuple[Weights, ...]
    removed: tuple[Weights, ...]


class Learner(nn.Module):
    """A family whose encoder learns too."""

    def __init__(self, family: GruFamily, encoder: LinesEncoder) -> None:
        """encoder: the family's own; its table becomes a parameter of the learner."""
        super().__init__()
        self.family = family
        self.encoder = encoder
        self.table = nn.Parameter(encoder.table)
        encoder.table = self.table

    def snapshot_features(self, weights: FloatArray) -> Tensor:
        """Return (n, E) for (n, V)."""
        return encode_dense(self.table, weights)

    def diff_features(self, added: Sequence[Weights], removed: Sequence[Weights]) -> Tensor:
        """Return (n, 2 E), [added; removed] of each commit."""
        both = encode(self.table, [*added, *removed])
        return torch.cat([both[: len(added)], both[len(added) :]], dim=1)

    def states(self, windows: Sequence[Window], carried: Mapping[int, Tensor]) -> Tensor:
        """Return (N, K + 1, G), every state of each window.

        A window shorter than K is filled up with empty commits; its states past its end mean
        nothing.
        carried: repository -> (G,), where a window without a snapshot goes on
        """
        fresh = [window.snapshot for window in windows if window.snapshot is not None]
        started = iter(self.start(np.stack(fresh)) if fresh else ())
        start = torch.stack(
            [
                carried[window.repository] if window.snapshot is None else next(started)
                for window in windows
            ]
        )
        features = self.diff_features(
            [weights for window in windows for weights in window.added],
            [weights for window in windows for weights in window.removed],
        )
        parts = list(torch.split(features, [len(window.added) for window in windows]))
        return self.family.advance_states(start, nn.utils.rnn.pad_sequence(parts, batch_first=True))

    def start(self, snapshots: FloatArray) -> Tensor:
        """Return (n, G), the states at snapshots (n, V)."""
        features = self.snapshot_features(snapshots)
        no_diffs = features.new_zeros(len(features), 0, 2 * self.encoder.width)
        return self.family.states(features, no_diffs)[:, 0]

    @torch.no_grad()
    def settle(self, sample: Sample) -> None:
        """Measure on the sample what features are centred on, and where the mean repository lies.

        Features are divided by one number, their spread, and not by one for each dimension:
        whitening would undo the weights that the table gives to words. The head's mean moves
        without changing what it computes, so that what all repositories share is learnt by its
        generic part.
        """
        snapshots = self.snapshot_features(sample.snapshots)
        diffs = self.diff_features(sample.added, sample.removed)
        self.family.set_statistics(
            diff_mean=diffs.mean(0),
            diff_scale=_spread(diffs),
            snapshot_mean=snapshots.mean(0),
            snapshot_scale=_spread(snapshots),
        )
        self.family.recentre(self.start(sample.snapshots))

    @torch.no_grad()
    def round_table(self) -> None:
        """Round the table to what bfloat16 holds, so that a file of half the size loses nothing."""
        self.table.copy_(self.table.to(torch.bfloat16).float())


def build_learner(
    config: LearnerConfig,
    base: BaseConfig,
    tokenizer: Tokenizer,
    recipe: Recipe,
    repositories: Sequence[RepositoryData],
    *,
    seed: int,
) -> Learner:
    """Return a learner with the initial weights that the seed and the repositories determine."""
    n_vocabulary = tokenizer.get_vocab_size()
    idf = inverse_document_frequency([data.file_bags for data in repositories], n_vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        table = random_table(idf, config.encoder_width, torch.default_generator)
        encoder = LinesEncoder(tokenizer, table, recipe)
        gru = GruConfig(
            diff_width=recipe.diff_width(encoder.width),
            snapshot_width=recipe.snapshot_width(encoder.width),
            hidden_width=config.hidden_width,
        )
        family = GruFamily(encoder, gru, build_head(head_config(config), base))
    with torch.no_grad():
        bias: Tensor = family.gru.gru.get_parameter("bias_ih_l0")  # gates r, z, n
        bias[config.hidden_width : 2 * config.hidden_width] += config.carry
    return Learner(family, encoder)


def head_config(config: LearnerConfig) -> HeadConfig:
    """Return the head's part of a checkpoint's configuration."""
    return HeadConfig(
        kind=config.head,
        context_width=config.hidden_width,
        trunk_width=config.trunk_width,
        rank=config.rank,
        alpha=config.alpha,
    )


def statistics_sample(
    repositories: Sequence[RepositoryData], n_vocabulary: int, *, diffs_each: int = 24
) -> Sample:
    """Return every snapshot and evenly spaced commits of the repositories."""
    snapshots, added, removed = [], [], []
    for data in repositories:
        for anchor in data.anchors:
            snapshots.append(data.snapshot_weights(data.files(anchor), n_vocabulary))
        step = max(1, data.n_commits // diffs_each)
        for index in range(1, data.n_commits, step):
            plus, minus = data.diff_weights(index, frozenset())
            added.append(plus)
            removed.append(minus)
    return Sample(np.stack(snapshots), tuple(added), tuple(removed))


def _spread(features: Tensor) -> Tensor:
    """Root mean square distance from the mean, over all dimensions; positive."""
    centred = features - features.mean(0)
    return centred.square().mean().sqrt().clamp(min=1e-6)
