"""The names and JSON files of an adapter directory.

    <root>/<repository>/<commit[:12]>-<sha256 of the weights[:12]>/
        adapter_config.json        what PEFT, vLLM and mistral.rs read
        adapter_model.safetensors  the weights, one pair for each layer and projection
        code2lora.json             where the adapter comes from

All three are byte for byte determined by the adapter and its origin: no time is recorded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from code2lora import __version__
from code2lora.errors import UserError
from code2lora.hypernetwork.config import block_of
from code2lora.hypernetwork.projections import TARGETS

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
METADATA_FILE = "code2lora.json"
FILES = (CONFIG_FILE, WEIGHTS_FILE, METADATA_FILE)
TEMPORARY_PREFIX = ".tmp-"
"""What a kill leaves behind starts with this; nothing published does."""

_FORMAT = 1
_REPOSITORY = re.compile(r"[0-9a-f]{32}")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class AdapterMetadata:
    """Where an adapter comes from."""

    repository: str
    """The repository's id, 32 hex digits."""
    commit: str
    """Full hash."""
    state_sha256: str
    """Of the packed state that the weights were generated from."""
    checkpoint: str
    """Fingerprint of the checkpoint that generated them."""
    base_model: str
    """Name of the base model, as its checkpoint names it."""
    base_revision: str | None = None
    """Commit of the model repository that the base model was published in."""
    base_fingerprint: str | None = None
    """Hex sha256 over the base model's configuration and weights."""
    created_by: str = f"code2lora {__version__}"
    use: str = "own"
    """`own`: the weights are the repository's; `generic`: the mean training repository's; `base`:
    they add nothing. The last two serve where a repository's own were shown to be worse."""


@dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """What `code2lora.json` says of the weights beside it."""

    sha256: str
    """Of the weights file."""
    n_layers: int
    shared_layers: bool
    """All layers hold the same pair."""


def check_identity(metadata: AdapterMetadata) -> None:
    """Raise UserError unless repository id and commit are safe to be parts of a path.

    The id is read from a repository's git configuration, which anyone may have written.
    """
    if not _REPOSITORY.fullmatch(metadata.repository):
        raise UserError(
            f"the repository's id is {metadata.repository!r}, expected 32 hex digits",
            hint="`git config --unset code2lora.id`, then `code2lora init`",
        )
    if not _COMMIT.fullmatch(metadata.commit):
        raise UserError(f"the commit is {metadata.commit!r}, expected a full hash")


def tensor_name(layer: int, target: str, side: str) -> str:
    """Return the name of a tensor in the weights file; side is `A` or `B`."""
    return f"base_model.model.model.layers.{layer}.{block_of(target)}.{target}.lora_{side}.weight"


def peft_config(metadata: AdapterMetadata, rank: int, alpha: float) -> dict[str, Any]:
    """Return `adapter_config.json`. Lists are sorted, so that equal adapters are equal bytes."""
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": metadata.base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        # some servers read this as an integer
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": metadata.base_revision,
        "target_modules": list(TARGETS),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def metadata_json(metadata: AdapterMetadata, weights: WeightsInfo) -> dict[str, Any]:
    """Return `code2lora.json`."""
    return {"format": _FORMAT, "origin": asdict(metadata), "weights": asdict(weights)}


def dump_json(values: Mapping[str, Any]) -> bytes:
    """Return the one text of a JSON file."""
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def read_metadata(path: Path) -> tuple[AdapterMetadata, WeightsInfo]:
    """Return what an adapter directory says of itself.

    Raises UserError when it is not one of ours, is damaged, or is of another format.
    """
    values = read_json(path / METADATA_FILE)
    if values.get("format") != _FORMAT:
        raise UserError(
            f"{path} has adapter format {values.get('format')!r}, expected {_FORMAT}",
            hint="`code2lora refresh` publishes it again",
        )
    try:
        origin, weights = values["origin"], values["weights"]
        named = [f.name for f in fields(AdapterMetadata)]
        # Adapters from before there was a choice are the repositories' own, and do not say so.
        metadata = AdapterMetadata(**{n: origin[n] for n in named if n != "use" or n in origin})
        info = WeightsInfo(**{f.name: weights[f.name] for f in fields(WeightsInfo)})
    except (KeyError, TypeError) as error:
        raise UserError(f"{path / METADATA_FILE} lacks {error}") from error
    return metadata, info


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object. Raises UserError when the file is missing, damaged or no object."""
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"{file.parent} is not an adapter directory: {file.name} is missing"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds a {type(values).__name__}, expected an object")
    return values
