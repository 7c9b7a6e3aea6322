"""Find a model by name or path: decoder, encoder, hypernetwork, model card. No torch here."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from code2lora.errors import UserError
from code2lora.hypernetwork.config import GRADIENTS_FILE

_BUNDLED = Path(__file__).parent / "bundled"
_PARTS = {
    "base": ("config.json",),
    "encoder": ("modules.json", GRADIENTS_FILE),
    "hypernetwork": ("config.json",),
}
"""Part -> the files of which one must be there."""
BASE_OF = "base-of"
"""File that names the model beside this one whose base is this one's too."""


@dataclass(frozen=True)
class ModelPaths:
    """The parts of one model directory."""

    name: str
    base: Path
    """A Hugging Face decoder."""
    encoder: Path
    """An encoder of one of the kinds that `load_encoder` knows."""
    hypernetwork: Path
    """A checkpoint directory."""
    card: Path
    """`MODEL_CARD.md`."""


def resolve_model(name_or_path: str, models_dir: Path) -> ModelPaths:
    """Return where a model lies: a path, a bundled name, or a name in `models_dir`, in that order.

    Whatever contains a path separator is a path. Raises UserError when there is no such model or
    when a part of it is missing.
    """
    separators = {os.sep, os.altsep or os.sep}
    if any(mark in name_or_path for mark in separators) or name_or_path in (".", ".."):
        return _parts(Path(name_or_path).expanduser().absolute())
    for root in (_BUNDLED, models_dir):
        if (root / name_or_path).is_dir():
            return _parts(root / name_or_path)
    known = ", ".join(model.name for model in list_models(models_dir)) or "none"
    raise UserError(
        f"there is no model named {name_or_path!r}; known models: {known}",
        hint="`code2lora models` lists them; give a path with a slash for a directory of your own",
    )


def list_models(models_dir: Path) -> list[ModelPaths]:
    """Return the bundled and the downloaded models that are whole, by name."""
    found: dict[str, ModelPaths] = {}
    for root in (models_dir, _BUNDLED):  # a bundled model hides a downloaded one of its name
        for path in sorted(root.iterdir()) if root.is_dir() else []:
            with suppress(UserError):
                found[path.name] = _parts(path)
    return [found[name] for name in sorted(found)]


def _parts(path: Path) -> ModelPaths:
    hint = "fetch or copy the model again"
    if not path.is_dir():
        raise UserError(f"there is no model directory at {path}", hint=hint)
    base = _base_of(path) / "base"
    for part, files in _PARTS.items():
        folder = base if part == "base" else path / part
        if not any((folder / file).is_file() for file in files):
            missing = (folder / files[0]).relative_to(path.parent)
            raise UserError(f"the model at {path} has no {part}: {missing} is missing", hint=hint)
    return ModelPaths(
        name=path.name,
        base=base,
        encoder=path / "encoder",
        hypernetwork=path / "hypernetwork",
        card=path / "MODEL_CARD.md",
    )


def _base_of(path: Path) -> Path:
    """Return the directory of the model whose base a model uses: its own, but for `BASE_OF`."""
    try:
        name = (path / BASE_OF).read_text("utf-8").strip()
    except FileNotFoundError:
        return path
    except (OSError, ValueError) as error:
        raise UserError(f"{path / BASE_OF} cannot be read: {error}") from error
    if name != Path(name).name or name in ("", ".."):
        raise UserError(f"{path / BASE_OF} holds {name!r}, expected the name of a model beside it")
    return path.parent / name
