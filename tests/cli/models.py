"""A model directory whose parts can be looked at and never run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from code2lora.hypernetwork.config import (
    BaseConfig,
    CheckpointConfig,
    EncoderConfig,
    GruConfig,
    HeadConfig,
    Recipe,
)

DIMS = {
    "down_proj": (20, 16),
    "gate_proj": (16, 20),
    "k_proj": (16, 6),
    "o_proj": (18, 16),
    "q_proj": (16, 18),
    "up_proj": (16, 20),
    "v_proj": (16, 6),
}


def make_model(path: Path) -> Path:
    """Write the files by which a model is found, with a checkpoint's configuration."""
    config = CheckpointConfig(
        family="gru",
        base=BaseConfig(id="tiny-base", n_layers=2, dims=DIMS),
        encoder=EncoderConfig(
            id="tiny-encoder",
            width=7,
            recipe=Recipe(diff="lines", snapshot="lines", rules="source"),
        ),
        gru=GruConfig(diff_width=14, snapshot_width=7, hidden_width=11),
        head=HeadConfig(kind="factorized", context_width=11, trunk_width=9, rank=5, alpha=8.0),
        metrics={"bucket_8": {"own_nll": 1.23456, "base_nll": 1.5}, "n_repositories": 12},
    )
    for part in ("base", "encoder", "hypernetwork"):
        (path / part).mkdir(parents=True)
    (path / "base" / "config.json").write_text("{}")
    (path / "base" / "model.safetensors").write_bytes(b"b" * 5998)
    (path / "encoder" / "modules.json").write_text("[]")
    text = json.dumps(dataclasses.asdict(config))
    (path / "hypernetwork" / "config.json").write_text(text)
    (path / "hypernetwork" / "model.safetensors").write_bytes(b"h" * (4000 - len(text)))
    (path / "MODEL_CARD.md").write_text("# tiny\n")
    return path
