"""A hypernetwork that is told a description of the repository, and none of its code.

Writes  <path>/encoder/ (sentence-transformers), <path>/hypernetwork/ (a static checkpoint)

The head, the items, the losses and the budget are those of the hypernetwork on code, so what is
left between the two is what they are told. The state is a frozen encoder's vector of the text.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from code2lora.history.model import Snapshot, SourceFile
from code2lora.hypernetwork.checkpoint import build_family, save_checkpoint
from code2lora.hypernetwork.config import BaseConfig, EncoderConfig
from code2lora.hypernetwork.encoder import Encoder, load_encoder
from code2lora.hypernetwork.encoder_lines import LinesEncoder
from code2lora.hypernetwork.heads import first
from code2lora.hypernetwork.identity import WEIGHTS_FILE, encoder_fingerprint, read_config
from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.static_family import StaticFamily
from code2lora.training.baselines.descriptions import Describer
from code2lora.training.baselines.own_past import Asked
from code2lora.training.data.bags import count_tokens, inverse_document_frequency
from code2lora.training.data.dataset import LINES, RepositoryData
from code2lora.training.fitting.inputs import FrozenInputs
from code2lora.training.fitting.learner import (
    Learner,
    LearnerConfig,
    build_frozen_learner,
    checkpoint_config,
    told_states,
)
from code2lora.training.fitting.windows import Window

_DESCRIPTION = "description"
"""The name of the one file that the encoder reads."""


class TextInputs(FrozenInputs):
    """What the learner is told: the vector of a description of the told files, and no diffs."""

    def __init__(self, encoder: Encoder, describer: Describer, *, holds_out: bool) -> None:
        """holds_out: as for the hypernetwork on code, so that both are asked the same."""
        super().__init__(encoder.recipe.snapshot_width(encoder.width), 0)
        self.holds_out = holds_out
        self._encoder = encoder
        self._describer = describer
        self._vectors: dict[str, Tensor] = {}

    def snapshot(self, data: RepositoryData, anchor: int, held_out: Collection[str]) -> Tensor:
        """Return (D,), the vector of the description of a snapshot's told files."""
        text = self._describer.describe(data, anchor, held_out)
        if text not in self._vectors:
            file = SourceFile(_DESCRIPTION, "", text)
            reading = self._encoder.read_snapshot(Snapshot("", (file,), ()))
            self._vectors[text] = reading.features.float().cpu()
        return self._vectors[text]

    def diff(self, data: RepositoryData, index: int, held_out: Collection[str]) -> Any:
        """Return (0,): a description does not follow the commits."""
        return torch.zeros(0)


class TextLearner(Learner):
    """A learner whose state stays the same over a window: a description follows no commits."""

    def states(self, windows: Sequence[Window], carried: Mapping[int, Tensor]) -> Tensor:
        """Return (N, K + 1, D), every state of each window; see `Learner.states`."""
        longest = max(len(window.diffs) for window in windows)
        return super().states(windows, carried).expand(-1, longest + 1, -1)


def build_text_learner(
    config: LearnerConfig,
    base: BaseConfig,
    encoder: Encoder,
    *,
    description_lines: int,
    holds_out: bool,
    seed: int,
) -> TextLearner:
    """Return a learner whose adapters depend on descriptions alone, on the CPU.

    config: that of the hypernetwork on code, for the kind and the sizes of its head.
    """
    width = encoder.recipe.snapshot_width(encoder.width)
    static = dataclasses.replace(config, family="static")
    family = build_frozen_learner(static, base, width, 0, seed=seed).family
    learner = TextLearner(family, centre=config.centre)
    describer = Describer(lines=description_lines)
    learner.inputs = TextInputs(encoder, describer, holds_out=holds_out)
    return learner


def description_encoder(
    tokenizer: Tokenizer,
    embeddings: Tensor,
    repositories: Sequence[RepositoryData],
    *,
    description_lines: int,
) -> LinesEncoder:
    """Return a frozen encoder that needs no model of its own: the decoder's input embeddings.

    embeddings: (V, D). Each token's vector is weighted by how few of the training repositories'
    descriptions have the token, so that what all share says nothing.
    """
    describer = Describer(lines=description_lines)
    texts = [
        describer.describe(data, anchor, frozenset())
        for data in repositories
        for anchor in data.anchors[:1]
    ]
    table = embeddings.detach().float().cpu().clone()
    plain = LinesEncoder(tokenizer, table, LINES)
    idf = inverse_document_frequency([count_tokens(plain, texts)], len(table))
    return LinesEncoder(tokenizer, table * torch.from_numpy(idf)[:, None], LINES)


@dataclass(frozen=True)
class TextHead:
    """A trained one, read back."""

    learner: Learner

    @torch.no_grad()
    def adapter(self, asked: Asked) -> Lora:
        """Return the adapter of what may be told of a repository, without a batch axis."""
        every = told_states(
            self.learner, asked.data, asked.anchor, asked.told_up_to, asked.held_out
        )
        return first(self.learner.family.lora(every[-1:]))


def save_text_head(
    path: Path,
    learner: Learner,
    config: LearnerConfig,
    base: BaseConfig,
    encoder: Encoder,
    encoder_dir: Path | None,
) -> None:
    """Write the encoder and the checkpoint below a folder.

    encoder_dir: where the encoder was read from; None for one that was made here
    """
    if isinstance(encoder, LinesEncoder):
        encoder.save(path / "encoder")
    elif encoder_dir is None:
        raise AssertionError("an encoder without a directory cannot be kept")
    else:
        shutil.copytree(encoder_dir, path / "encoder", dirs_exist_ok=True)
    of_encoder = EncoderConfig(
        id=f"{base.id}-descriptions",
        width=encoder.width,
        recipe=encoder.recipe,
        fingerprint=encoder_fingerprint(path / "encoder", encoder.recipe),
    )
    static = dataclasses.replace(config, family="static")
    checkpoint = checkpoint_config(static, base, of_encoder)
    save_checkpoint(path / "hypernetwork", checkpoint, learner.family.state_dict())


def load_text_head(path: Path, *, description_lines: int) -> TextHead:
    """Return the head below a folder. Raises UserError when a part is missing or damaged."""
    config = read_config(path / "hypernetwork")
    encoder = load_encoder(path / "encoder", config.encoder.recipe)
    family = build_family(config, encoder)
    if not isinstance(family, StaticFamily):
        raise AssertionError(f"{path} holds no static head")
    family.load_state_dict(load_file(path / "hypernetwork" / WEIGHTS_FILE))
    family.train(False).requires_grad_(False)
    learner = Learner(family)
    describer = Describer(lines=description_lines)
    learner.inputs = TextInputs(encoder, describer, holds_out=True)
    return TextHead(learner)
