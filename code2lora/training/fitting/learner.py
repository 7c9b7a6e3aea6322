"""Turn windows into states and states into adapters: inputs, family and head while they learn.

A family is behind one of two kinds of inputs (`inputs.py`): with the `lines` encoder the encoder's
table is a parameter beside the family's own, and statistics of the training repositories follow the
table as it moves; frozen features only lend themselves.

N = windows, K = commits of the longest window, G = width of a state: the GRU's hidden width, or
the length of a snapshot's features in the static family, which has no recurrence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from code2lora.hypernetwork.checkpoint import AnyFamily
from code2lora.hypernetwork.config import (
    BaseConfig,
    BlockConfig,
    CheckpointConfig,
    EncoderConfig,
    GruConfig,
    HeadConfig,
    MemoryConfig,
    Recipe,
)
from code2lora.hypernetwork.encoder import Encoder
from code2lora.hypernetwork.encoder_gradients import GradientsEncoder, key_name
from code2lora.hypernetwork.encoder_lines import LinesEncoder
from code2lora.hypernetwork.gru_family import GruFamily
from code2lora.hypernetwork.heads import MemoryHead, build_head
from code2lora.hypernetwork.memory_family import MemoryFamily
from code2lora.hypernetwork.static_family import StaticFamily
from code2lora.training.data.bags import inverse_document_frequency, random_table
from code2lora.training.data.dataset import RepositoryData
from code2lora.training.fitting.inputs import (
    DiffInput,
    FrozenInputs,
    LexicalInputs,
    PartInputs,
    Sample,
    SnapshotInput,
    opening,
)
from code2lora.training.fitting.windows import Window


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """Kinds and sizes of the encoder, the family and the head."""

    family: Literal["gru", "static", "memory"] = "gru"
    """`gru` and `memory` follow the commits; `static` reads a snapshot alone."""
    encoder: Literal["lines", "frozen"] = "lines"
    """`lines` is trained with the rest; the features of a `frozen` one are given."""
    encoder_width: int = 256
    """Of the trainable encoder; frozen features have widths of their own."""
    hidden_width: int = 512
    """Of the GRU."""
    head: Literal["factorized", "paper"] = "factorized"
    trunk_width: int = 256
    rank: int = 16
    alpha: float = 16.0
    carry: float = 5.0
    """Added to the bias of the GRU's update gate: a state keeps sigmoid(carry) of itself over a
    commit to begin with, or it would have forgotten the snapshot after a few."""
    half_life: float = 16.0
    """Of what a memory takes for recent, in commits. Its keys, its rank and its head are those of
    the gradients that it was told."""
    recency: float = 0.4
    """How much a memory's adapter follows what is recent. Set and not learned: a fit asks for
    what was not told, so it would never be paid for remembering the last commits."""
    horizon: float = 2.7
    """Thousands of characters written lately at which it follows half as much."""
    centre: bool = True
    """Take features relative to the mean of the training repositories, in units of their spread."""


class Learner(nn.Module):
    """A family and what it is told through, differentiable from end to end."""

    def __init__(self, family: AnyFamily, *, centre: bool = True) -> None:
        """family: a `lines` encoder behind it is trained too; any other stays as it is."""
        super().__init__()
        self.family = family
        self.inputs: LexicalInputs | FrozenInputs | PartInputs
        if isinstance(family.encoder, LinesEncoder):
            self.inputs = LexicalInputs(family.encoder)
        elif isinstance(family, MemoryFamily):
            assert isinstance(family.encoder, GradientsEncoder), "build_family saw to it"
            self.inputs = PartInputs(family.encoder.config.diff_files)
        else:
            diff_width = family.diff_mean.shape[0] if isinstance(family, GruFamily) else 0
            self.inputs = FrozenInputs(family.snapshot_mean.shape[0], diff_width)
        self._centre = centre

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return next(self.family.head.parameters()).device

    def states(self, windows: Sequence[Window], carried: Mapping[int, Tensor]) -> Tensor:
        """Return (N, K + 1, G), every state of each window.

        A window shorter than K is filled up with empty commits; its states past its end mean
        nothing.
        carried: repository -> (G,), where a window without a snapshot goes on
        """
        fresh = [window for window in windows if window.snapshot is not None]
        started = iter(
            self.start([w.snapshot for w in fresh], [w.opening for w in fresh]) if fresh else ()
        )
        start = torch.stack(
            [
                carried[window.repository] if window.snapshot is None else next(started)
                for window in windows
            ]
        )
        if isinstance(self.family, StaticFamily):
            return start[:, None]
        features = self.inputs.diff_features([diff for window in windows for diff in window.diffs])
        parts = list(torch.split(features, [len(window.diffs) for window in windows]))
        return self.family.advance_states(start, nn.utils.rnn.pad_sequence(parts, batch_first=True))

    def start(
        self, snapshots: Sequence[SnapshotInput], openings: Sequence[DiffInput | None] = ()
    ) -> Tensor:
        """Return (n, G), the states at snapshots, each as `inputs.snapshot` returned it.

        openings: for each snapshot, as `inputs.opening` returned it; empty where none opens
        """
        states = self.family.start_states(self.inputs.snapshot_features(snapshots))
        told = [(row, diff) for row, diff in enumerate(openings) if diff is not None]
        if isinstance(self.family, StaticFamily) or not told:
            return states
        rows = torch.tensor([row for row, _ in told], device=states.device)
        diffs = self.inputs.diff_features([diff for _, diff in told])
        advanced = self.family.advance_states(states[rows], diffs[:, None])[:, 1]
        return states.index_copy(0, rows, advanced)

    @torch.no_grad()
    def settle(self, sample: Sample) -> None:
        """Measure on the sample what features are centred on, and where the mean repository lies.

        Features are divided by one number, their spread, and not by one for each dimension:
        whitening would undo the weights that the table gives to words. The head's mean moves
        without changing what it computes, so that what all repositories share is learnt by its
        generic part.
        """
        # A memory is centred by its head alone: its features have the scale of the keys.
        if self._centre and not isinstance(self.family, MemoryFamily):
            snapshots = self.inputs.snapshot_features(sample.snapshots)
            self.family.snapshot_mean.copy_(snapshots.mean(0))
            self.family.snapshot_scale.copy_(_spread(snapshots))
            if isinstance(self.family, GruFamily) and sample.diffs:
                diffs = self.inputs.diff_features(sample.diffs)
                self.family.diff_mean.copy_(diffs.mean(0))
                self.family.diff_scale.copy_(_spread(diffs))
        self.family.recentre(self.start(sample.snapshots, sample.openings))

    @torch.no_grad()
    def round_table(self) -> None:
        """Round a table that is trained to what bfloat16 holds: half the file, and nothing lost."""
        if isinstance(self.inputs, LexicalInputs):
            table = self.inputs.table
            table.copy_(table.to(torch.bfloat16).float())


def build_learner(
    config: LearnerConfig,
    base: BaseConfig,
    tokenizer: Tokenizer,
    recipe: Recipe,
    repositories: Sequence[RepositoryData],
    *,
    seed: int,
) -> Learner:
    """Return a learner whose encoder learns too, on the CPU.

    Its initial weights are determined by the seed and by the repositories' words.
    """
    n_vocabulary = tokenizer.get_vocab_size()
    idf = inverse_document_frequency([data.file_bags for data in repositories], n_vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        table = random_table(idf, config.encoder_width, torch.default_generator)
        encoder = LinesEncoder(tokenizer, table, recipe)
        widths = (recipe.snapshot_width(encoder.width), recipe.diff_width(encoder.width))
        family = _family(config, base, encoder, *widths)
    return Learner(family, centre=config.centre)


def build_frozen_learner(
    config: LearnerConfig, base: BaseConfig, snapshot_width: int, diff_width: int, *, seed: int
) -> Learner:
    """Return a learner on frozen features, with the initial weights of the seed, on the CPU.

    snapshot_width, diff_width: D_s and D_d, the lengths of the features
    """
    no_encoder: Any = None  # whatever made the features is not needed again
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        family = _family(config, base, no_encoder, snapshot_width, diff_width)
    return Learner(family, centre=config.centre)


def build_memory_learner(
    config: LearnerConfig, base: BaseConfig, encoder: GradientsEncoder, *, seed: int
) -> Learner:
    """Return a learner on the gradients that an encoder takes, at a plain gradient step."""
    blocks = encoder.config.blocks
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = build_head(_memory_head(config, blocks), base)
    assert isinstance(head, MemoryHead)
    head.begin_at({place: encoder.keys[key_name(*place)] for place in blocks.places})
    memory = _memory(config, encoder.width)
    return Learner(MemoryFamily(encoder, memory, head), centre=config.centre)


def checkpoint_config(
    config: LearnerConfig,
    base: BaseConfig,
    encoder: EncoderConfig,
    blocks: BlockConfig | None = None,
    **more: Any,
) -> CheckpointConfig:
    """Return what a checkpoint of such a learner says about itself.

    blocks: of a memory's gradients
    more: further fields of `CheckpointConfig`
    """
    recipe = encoder.recipe
    if blocks is not None:
        return CheckpointConfig(
            family="memory",
            base=base,
            encoder=encoder,
            head=_memory_head(config, blocks),
            memory=_memory(config, encoder.width),
            **more,
        )
    snapshot_width = recipe.snapshot_width(encoder.width)
    return CheckpointConfig(
        family=config.family,
        base=base,
        encoder=encoder,
        head=head_config(config, snapshot_width),
        gru=gru_config(config, snapshot_width, recipe.diff_width(encoder.width)),
        **more,
    )


def head_config(config: LearnerConfig, snapshot_width: int) -> HeadConfig:
    """Return the head's part of a checkpoint's configuration."""
    return HeadConfig(
        kind=config.head,
        context_width=config.hidden_width if config.family == "gru" else snapshot_width,
        trunk_width=config.trunk_width,
        rank=config.rank,
        alpha=config.alpha,
    )


def gru_config(config: LearnerConfig, snapshot_width: int, diff_width: int) -> GruConfig | None:
    """Return the GRU's part of a checkpoint's configuration; None in the static family."""
    if config.family == "static":
        return None
    return GruConfig(
        diff_width=diff_width, snapshot_width=snapshot_width, hidden_width=config.hidden_width
    )


def told_states(
    learner: Learner,
    data: RepositoryData,
    anchor: int,
    last: int,
    held_out: frozenset[str] = frozenset(),
) -> Tensor:
    """Return (last - anchor + 1, G): the states from a snapshot to a commit.

    They are what the daemon stores for the same commits. In the static family a commit's state is
    that of the newest snapshot that is not after it.
    held_out: paths of the snapshot that are not told, under whatever name they get later
    Raises UserError when something is held out from frozen features.
    """
    snapshots = [learner.inputs.snapshot(data, anchor, held_out)]
    follows = not isinstance(learner.family, StaticFamily)
    opened = opening(learner.inputs, data, anchor, held_out) if follows else None
    diffs, snapshot_of = [], [0]
    for index in range(anchor + 1, last + 1):
        held_out = data.follow(index, held_out)
        if follows:
            diffs.append(learner.inputs.diff(data, index, held_out))
        elif index in data.anchors:
            snapshots.append(learner.inputs.snapshot(data, index, held_out))
        snapshot_of.append(len(snapshots) - 1)
    start = learner.start(snapshots, [opened] if follows else ())
    if isinstance(learner.family, StaticFamily):
        return start[torch.tensor(snapshot_of, device=start.device)]
    return learner.family.advance_states(start, learner.inputs.diff_features(diffs)[None])[0]


def _memory(config: LearnerConfig, width: int) -> MemoryConfig:
    return MemoryConfig(
        width=width,
        half_life=config.half_life,
        recency=config.recency,
        horizon=config.horizon,
    )


def _memory_head(config: LearnerConfig, blocks: BlockConfig) -> HeadConfig:
    return HeadConfig(
        kind="memory",
        context_width=blocks.width,
        trunk_width=0,
        rank=blocks.n_keys,
        alpha=float(blocks.n_keys),
        blocks=blocks,
    )


def _family(
    config: LearnerConfig, base: BaseConfig, encoder: Encoder, snapshot_width: int, diff_width: int
) -> AnyFamily:
    gru = gru_config(config, snapshot_width, diff_width)
    if gru is None:
        head = build_head(head_config(config, snapshot_width), base)
        return StaticFamily(encoder, head, snapshot_width)
    family = GruFamily(encoder, gru, build_head(head_config(config, snapshot_width), base))
    with torch.no_grad():
        bias: Tensor = family.gru.gru.get_parameter("bias_ih_l0")  # gates r, z, n
        bias[config.hidden_width : 2 * config.hidden_width] += config.carry
    return family


def _spread(features: Tensor) -> Tensor:
    """Root mean square distance from the mean, over all dimensions; positive."""
    centred = features - features.mean(0)
    return centred.square().mean().sqrt().clamp(min=1e-6)
