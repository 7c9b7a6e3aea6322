"""Turn diffs and snapshots into feature vectors with a frozen encoder.

Reads an encoder directory, offline, and runs none of its code. Three kinds of directory are known:
of sentence-transformers a single `StaticEmbedding` (recipe `lines`) and a transformer (recipe
`paper`), and directions through which the base model's own gradients are seen (`gradients`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from code2lora.errors import UserError
from code2lora.history.model import Diff, Snapshot, SourceFile
from code2lora.hypernetwork.config import GRADIENTS_FILE, Reader, Recipe
from code2lora.hypernetwork.family import Reading

_PACKAGE = "sentence_transformers."


class Encoder(Protocol):
    """A frozen encoder with its recipe. Runs without gradients and gives float32 CPU tensors.

    The features of a diff depend on that diff alone, bit for bit, whatever is read with it;
    unless it is read `across`, where speed matters more than the last digits.
    """

    recipe: Recipe
    width: int
    """Length of one text vector."""

    def diff_key(self, diff: Diff) -> str:
        """Return the hex digest of the text that `read_diffs` reads: equal keys, equal features."""

    def read_diffs(self, diffs: Sequence[Diff], *, across: bool = False) -> list[Reading]:
        """Return the features of each diff, `recipe.diff_width(width)` long."""

    def told(self, files: Sequence[SourceFile]) -> Sequence[SourceFile]:
        """Return the files of a snapshot that are read, in path order."""

    def file_key(self, file: SourceFile) -> str:
        """Return the hex sha256 of what `read_files` reads: equal keys, equal features."""

    def read_files(self, files: Sequence[SourceFile], *, across: bool = False) -> list[Reading]:
        """Return the features of each file, `recipe.file_width(width)` long, for `pool_files`."""

    def pool_files(self, vectors: Tensor) -> Tensor:
        """Return the features of a snapshot from those of its files, in path order."""

    def read_snapshot(self, snapshot: Snapshot) -> Reading:
        """Return the features of a snapshot, `recipe.snapshot_width(width)` long."""


def load_encoder(
    path: Path,
    recipe: Recipe,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    base: Path | None = None,
) -> Encoder:
    """Return the encoder in a directory, ready for a recipe.

    dtype: what a transformer computes in; None leaves it to the encoder. States are always computed
        in float32.
    base: the base model's directory, whose gradients the recipe `gradients` takes
    Raises UserError when the directory is missing or damaged, or is not what the recipe needs.
    """
    if recipe.diff != recipe.snapshot:
        raise UserError(
            f"the recipe reads diffs as {recipe.diff!r} and snapshots as {recipe.snapshot!r}, "
            "but one encoder serves one recipe"
        )
    kind = reader_kind(path)
    if kind != recipe.diff:
        raise UserError(
            f"the recipe needs an encoder of the kind {recipe.diff!r}, but {path} is {kind!r}"
        )
    # The imports are late because a transformer takes seconds to import and `lines` needs none.
    if kind == "lines":
        from code2lora.hypernetwork.encoder_lines import LinesEncoder

        return LinesEncoder.load(path, recipe)
    if kind == "gradients":
        from code2lora.hypernetwork.encoder_gradients import GradientsEncoder

        if base is None:
            raise UserError(f"the encoder in {path} needs its base model, and none was given")
        return GradientsEncoder.load(path, base, recipe, device, dtype)
    from code2lora.hypernetwork.encoder_paper import PaperEncoder

    return PaperEncoder.load(path, recipe, device, dtype or torch.float32)


def reader_kind(path: Path) -> Reader:
    """Return which kind of encoder a directory holds. Raises UserError when it holds none."""
    if (path / GRADIENTS_FILE).is_file():
        return "gradients"
    kinds = module_kinds(path)
    if kinds == ["StaticEmbedding"]:
        return "lines"
    if kinds[0] == "Transformer":
        return "paper"
    raise UserError(
        f"the encoder in {path} is {' + '.join(kinds)}",
        hint="use a StaticEmbedding or a transformer of sentence-transformers",
    )


def module_kinds(path: Path) -> list[str]:
    """Return the class names of an encoder's modules, first to last.

    Raises UserError when the directory is no encoder, or needs code of its own.
    """
    listing = path / "modules.json"
    hint = "fetch the model again, or point at a sentence-transformers directory"
    try:
        types = [str(module["type"]) for module in json.loads(listing.read_text("utf-8"))]
    except FileNotFoundError as error:
        raise UserError(f"there is no encoder at {path}: modules.json is missing", hint=hint) from (
            error
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{listing} cannot be read: {error}", hint=hint) from error
    foreign = [kind for kind in types if not kind.startswith(_PACKAGE)]
    if foreign or not types:
        raise UserError(
            f"{listing} asks for {', '.join(foreign) or 'no module'}, "
            "but only sentence-transformers' own modules are loaded",
            hint="use an encoder that needs no code of its own",
        )
    return [kind.rpartition(".")[2] for kind in types]
