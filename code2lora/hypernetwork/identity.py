"""What identifies a checkpoint, a base model and an encoder: digests of their files. No torch here.

States and adapters are keyed by the checkpoint's fingerprint, cached features by the encoder's.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

from code2lora.errors import UserError
from code2lora.hypernetwork.config import CheckpointConfig, Recipe, parse_config, recipe_values

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

_FETCH_AGAIN = "fetch or copy the model again"


def read_config(path: Path) -> CheckpointConfig:
    """Return the configuration of a checkpoint directory. Raises UserError when it is wrong."""
    file = path / CONFIG_FILE
    try:
        values = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint at {path}", hint=_FETCH_AGAIN) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}", hint=_FETCH_AGAIN) from error
    return parse_config(values, where=str(file))


def write_config(path: Path, config: CheckpointConfig) -> None:
    """Write the configuration of a checkpoint directory whose weights are in place.

    Raises UserError when the directory cannot be written.
    """
    file = path / CONFIG_FILE
    temporary = file.with_name(CONFIG_FILE + ".tmp")
    text = json.dumps(json.loads(config.canonical()), indent=2, sort_keys=True) + "\n"
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from error


def fingerprint(path: Path) -> str:
    """Return the hex sha256 over what a checkpoint is: its configuration and its weights' bytes.

    What was measured on it does not count.
    """
    digest = hashlib.sha256(read_config(path).identity().encode())
    digest.update(_file_sha256(path / WEIGHTS_FILE).encode())
    return digest.hexdigest()


def base_fingerprint(path: Path) -> str:
    """Return the hex sha256 over a decoder directory's configuration and weights."""
    digest = hashlib.sha256()
    files = [path / "config.json", *sorted(path.glob("*.safetensors"))]
    for file in files:
        digest.update(f"{file.name}\0{_file_sha256(file)}\0".encode())
    return digest.hexdigest()


def encoder_fingerprint(path: Path, recipe: Recipe) -> str:
    """Return the hex sha256 over the recipe and the encoder's files, but not its documentation.

    It keys cached features: what was encoded with another encoder or recipe is never reused.
    """
    # Which commits are steps does not change what is read of a diff.
    values = recipe_values(asdict(replace(recipe, stream="commits")))
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path).as_posix()
        if file.suffix == ".md" or relative.startswith(".") or not file.is_file():
            continue
        digest.update(f"\0{relative}\0{_file_sha256(file)}".encode())
    return digest.hexdigest()


def _file_sha256(file: Path) -> str:
    """Return a file's hex sha256. Raises UserError when it is missing or unreadable."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}", hint=_FETCH_AGAIN) from error
