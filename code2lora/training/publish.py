"""Turn a learner into the files of a model: encoder, checkpoint, figures.

Writes  <out>/encoder/ (sentence-transformers), <out>/hypernetwork/ (checkpoint)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from code2lora.hypernetwork.checkpoint import save_checkpoint
from code2lora.hypernetwork.config import (
    BaseConfig,
    CheckpointConfig,
    EncoderConfig,
    GruConfig,
)
from code2lora.hypernetwork.encoder_lines import LinesEncoder
from code2lora.hypernetwork.identity import base_fingerprint, encoder_fingerprint
from code2lora.hypernetwork.models import ModelPaths
from code2lora.training.data.dataset import RepositoryData
from code2lora.training.evaluation.evaluate import told_states
from code2lora.training.fitting.learner import Learner, LearnerConfig, head_config


@torch.no_grad()
def generic_states(
    learner: Learner, repositories: Sequence[RepositoryData], *, replay_commits: int = 48
) -> Tensor:
    """Return (n, G): states of the training repositories, whose mean is the mean repository.

    From each snapshot on, the first and the last state of a replay: both kinds are met in use.
    """
    found = []
    for data in repositories:
        for anchor in data.anchors:
            last = min(anchor + replay_commits, data.n_commits - 1)
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
) -> ModelPaths:
    """Write encoder and checkpoint and return where the parts of the model are.

    The encoder's table must have been rounded (`Learner.round_table`) before anything was measured
    on it; it is rounded again here, which changes nothing then.
    base_dir: the base decoder's directory, whose fingerprint the checkpoint will insist on
    generic: (n, G) states, whose mean becomes the mean repository
    metrics: the held-out figures at publication
    """
    learner.round_table()
    learner.family.recentre(generic)
    encoder, recipe = learner.encoder, learner.encoder.recipe
    # The rounded values are exact in bfloat16, so the file can be half the size.
    stored = LinesEncoder(encoder.tokenizer, learner.table.detach().to(torch.bfloat16), recipe)
    stored.save(out_dir / "encoder")
    if base_dir is not None:
        base = dataclasses.replace(base, fingerprint=base_fingerprint(base_dir))
    checkpoint = CheckpointConfig(
        family="gru",
        base=base,
        encoder=EncoderConfig(
            id=f"{base.id}-encoder",
            width=encoder.width,
            recipe=recipe,
            fingerprint=encoder_fingerprint(out_dir / "encoder", recipe),
        ),
        head=head_config(config),
        gru=GruConfig(
            diff_width=recipe.diff_width(encoder.width),
            snapshot_width=recipe.snapshot_width(encoder.width),
            hidden_width=config.hidden_width,
        ),
        metrics=dict(metrics),
    )
    save_checkpoint(out_dir / "hypernetwork", checkpoint, learner.family.state_dict())
    return ModelPaths(
        name=out_dir.name,
        base=base_dir or out_dir / "base",
        encoder=out_dir / "encoder",
        hypernetwork=out_dir / "hypernetwork",
        card=out_dir / "MODEL_CARD.md",
    )
