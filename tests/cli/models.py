"""A model directory whose parts can be looked at and never run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from code2lora.cli import audits
from code2lora.hypernetwork.config import (
    AuditRecord,
    AuditTest,
    BaseConfig,
    CheckpointConfig,
    EncoderConfig,
    GruConfig,
    HeadConfig,
    Recipe,
)
from code2lora.hypernetwork.identity import read_config
from code2lora.hypernetwork.models import resolve_model

DIMS = {
    "down_proj": (20, 16),
    "gate_proj": (16, 20),
    "k_proj": (16, 6),
    "o_proj": (18, 16),
    "q_proj": (16, 18),
    "up_proj": (16, 20),
    "v_proj": (16, 6),
}


AUDIT = AuditRecord(
    verdict="failed",
    tests={
        "own_minus_mean": AuditTest(passed=None),
        "own_minus_generic": AuditTest(passed=False, mean=0.0052, low=-0.001, high=0.0121),
        "own_minus_base": AuditTest(passed=True, mean=-0.1154, low=-0.13, high=-0.1),
        "freshness_10": AuditTest(passed=False, mean=0.0, low=-0.5, high=0.25),
    },
    n_repositories=25,
    n_items=582,
    settings="0123456789abcdef",
)
"""An audit of which two tests failed."""


def make_model(path: Path, *, audit: AuditRecord | None = None) -> Path:
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
        audit=audit,
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


def of_mini() -> str:
    """Return what is said of the bundled model's audit, whatever that found."""
    mini = resolve_model("mini", Path("none"))
    config = read_config(mini.hypernetwork)
    return audits.in_a_line(config.audit) + audits.not_written_better(config.metrics)
