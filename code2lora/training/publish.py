"""Turn a learner into the files of a model: encoder, checkpoint, figures.

Writes  <out>/encoder/ (sentence-transformers), <out>/hypernetwork/ (checkpoint)
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from code2lora.hypernetwork.checkpoint import save_checkpoint
from code2lora.hypernetwork.config import BaseConfig, EncoderConfig
from code2lora.hypernetwork.encoder_lines import LinesEncoder
from code2lora.hypernetwork.heads import MemoryHead
from code2lora.hypernetwork.identity import base_fingerprint, encoder_fingerprint
from code2lora.hypernetwork.models import ModelPaths
from code2lora.training.data.dataset import RepositoryData
from code2lora.training.fitting.inputs import LexicalInputs
from code2lora.training.fitting.learner import (
    Learner,
    LearnerConfig,
    checkpoint_config,
    told_states,
)


@dataclass(frozen=True)
class FrozenEncoder:
    """What made the features of a learner that does not train its encoder."""

    config: EncoderConfig
    path: Path | None
    """Its directory; None when only its features are here, as with an imported data set."""


@torch.no_grad()
def generic_states(
    learner: Learner, repositories: Sequence[RepositoryData], *, replay_commits: int = 48
) -> Tensor:
    """Return (n, G): states of the training repositories, whose mean is the mean repository.

    From each snapshot on, the first and the last state of a replay: both kinds are met in use.
    """
    found = []
    for data in repositories:
        for anchor in (anchor for anchor in data.anchors if anchor < data.n_train):
            last = min(anchor + replay_commits, data.n_train - 1)
            states = told_states(learner, data, anchor, last)
            found += [states[0], states[-1]]
    return torch.stack(found)


def publish(
    learner: Learner,
    config: LearnerConfig,
    base: BaseConfig,
    out_dir: Path,
    *,
    base_dir: Path | None,
    generic: Tensor,
    metrics: Mapping[str, Any],
    frozen: FrozenEncoder | None = None,
) -> ModelPaths:
    """Write encoder and checkpoint and return where the parts of the model are.

    A trained encoder's table must have been rounded (`Learner.round_table`) before anything was
    measured on it; it is rounded again here, which changes nothing then.
    base_dir: the base decoder's directory, whose fingerprint the checkpoint will insist on
    generic: (n, G) states, whose mean becomes the mean repository
    metrics: the held-out figures at publication
    frozen: the encoder of a learner on frozen features; its directory is copied
    """
    learner.round_table()
    learner.family.recentre(generic)
    if frozen is None:
        encoder = _save_encoder(learner, out_dir / "encoder", name=f"{base.id}-encoder")
    else:
        encoder = frozen.config
        if frozen.path is not None and not (out_dir / "encoder").exists():
            shutil.copytree(frozen.path, out_dir / "encoder")
    if base_dir is not None:
        base = dataclasses.replace(base, fingerprint=base_fingerprint(base_dir))
    head = learner.family.head
    blocks = head.blocks if isinstance(head, MemoryHead) else None
    checkpoint = checkpoint_config(config, base, encoder, blocks, metrics=dict(metrics))
    save_checkpoint(out_dir / "hypernetwork", checkpoint, learner.family.state_dict())
    return ModelPaths(
        name=out_dir.name,
        base=base_dir or out_dir / "base",
        encoder=out_dir / "encoder",
        hypernetwork=out_dir / "hypernetwork",
        card=out_dir / "MODEL_CARD.md",
    )


def _save_encoder(learner: Learner, path: Path, *, name: str) -> EncoderConfig:
    if not isinstance(learner.inputs, LexicalInputs):
        raise AssertionError("a learner on frozen features is published with its encoder")
    encoder, recipe = learner.inputs.encoder, learner.inputs.encoder.recipe
    # The rounded values are exact in bfloat16, so the file can be half the size.
    table = learner.inputs.table.detach().cpu().to(torch.bfloat16)
    LinesEncoder(encoder.tokenizer, table, recipe).save(path)
    return EncoderConfig(
        id=name,
        width=encoder.width,
        recipe=recipe,
        fingerprint=encoder_fingerprint(path, recipe),
    )
