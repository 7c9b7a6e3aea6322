"""Read back the trained rows that the hypernetwork is compared with; the stage writes them.

    <out>/shared_lora/          one LoRA, trained on the items that the hypernetwork was trained on
    <out>/text_lora/            a head of the same size that is told a description, not the code
    <out>/full_tuning/          all weights of the decoder, trained on the same items
    <out>/full_tuning_rag/      the same, with retrieved context in front of every item
    <out>/repository_lora/      one LoRA for each evaluated repository, trained on its own past

Each folder is complete once it holds `baseline.json`. An evaluation uses them so:

    baseline = load_baseline(out / "shared_lora")
    lora = baseline.adapter(case)             # None: the row adds nothing to the base here
    decoder = baseline.decoder()              # of a fully tuned row; then adapter() is None

or, one at a time, `baseline_adapter(path, case)` and `tuned_decoder(path)`. A case is anything with
`data`, `anchor`, `told_up_to` and `held_out`, such as the cases of the evaluation.
A LoRA of a repository that was trained on what the case asks about is refused, not used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from code2lora.errors import UserError
from code2lora.hypernetwork.config import BaseConfig
from code2lora.hypernetwork.lora import Lora
from code2lora.training.baselines.lora_files import read_lora
from code2lora.training.baselines.own_past import Asked
from code2lora.training.baselines.text_head import TextHead, load_text_head
from code2lora.training.data.dataset import RepositoryData
from code2lora.training.data.shards import folder_name

SHARED_LORA = "shared_lora"
REPOSITORY_LORA = "repository_lora"
FULL_TUNING = "full_tuning"
FULL_TUNING_RAG = "full_tuning_rag"
TEXT_LORA = "text_lora"
ROWS = (SHARED_LORA, TEXT_LORA, FULL_TUNING, FULL_TUNING_RAG, REPOSITORY_LORA)
"""Names of the trained rows, in the order in which they are trained."""
TUNED_ROWS = frozenset({FULL_TUNING, FULL_TUNING_RAG})
"""Rows that are a decoder of their own rather than an adapter."""

_MANIFEST = "baseline.json"
RUN = "run"
"""Below a row's folder: what its training goes on from; no part of the row."""
_TRAIN_AGAIN = "remove its folder and run `code2lora train baselines` again"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a row's folder says of itself."""

    row: str
    base: str
    """Name of the decoder that it was trained on."""
    base_fingerprint: str | None
    steps: int
    """Optimizer steps; of the LoRAs of repositories, the most that any of them took."""
    best_step: int
    watched_nll: float | None
    """Nats per token of the validation repositories' rows at the best step."""
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class OwnManifest:
    """What the LoRA of one repository says of itself."""

    repository: str
    n_commits: int
    """Of the repository when it was mined: numbers of commits mean nothing in another mining."""
    told_up_to: int
    """The last commit that it was trained on."""
    hidden: list[str]
    """Every name of the files that it was not trained on."""
    n_tasks: int
    n_sources: int
    best_step: int
    base_nll: float
    """Nats per token of its own validation rows without it."""
    best_nll: float
    settings: dict[str, Any]


_M = TypeVar("_M", Manifest, OwnManifest)


class Baseline:
    """One trained row."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """path: the row's folder."""
        self.path = path
        self.manifest = manifest
        self._shared: Lora | None = None
        self._head: TextHead | None = None

    @property
    def row(self) -> str:
        """One of ROWS."""
        return self.manifest.row

    def fingerprint(self) -> str:
        """Return a digest of the row's files: equal digests, equal answers."""
        digest = hashlib.sha256()
        for file in sorted(self.path.rglob("*")):
            relative = file.relative_to(self.path)
            if file.is_file() and relative.parts[0] != RUN:
                digest.update(f"{relative.as_posix()}\0".encode())
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def adapter(self, asked: Asked) -> Lora | None:
        """Return the adapter for a case, without a batch axis; None where the row has none.

        Raises UserError when a repository's LoRA was trained on what the case asks about.
        """
        if self.row == SHARED_LORA:
            self._shared = self._shared or read_lora(self.path / "adapter")
            return self._shared
        if self.row == TEXT_LORA:
            lines = int(self.manifest.settings["description_lines"])
            self._head = self._head or load_text_head(self.path, description_lines=lines)
            return self._head.adapter(asked)
        if self.row == REPOSITORY_LORA:
            return own_lora(self.path, asked)
        return None

    def decoder(self, device: torch.device | str = "cpu") -> PreTrainedModel | None:
        """Return the decoder of a fully tuned row, else None."""
        return tuned_decoder(self.path, device) if self.row in TUNED_ROWS else None


def load_baseline(path: Path, base: BaseConfig | None = None) -> Baseline:
    """Return the row in a folder.

    base: the decoder to use it with; a row that was trained on another one is refused.
    Raises UserError when it is not there, not complete, or not for this decoder.
    """
    manifest = _read(path / _MANIFEST, Manifest)
    if manifest is None:
        raise UserError(
            f"there is no trained row at {path}: {_MANIFEST} is missing",
            hint="train it with `code2lora train baselines`",
        )
    known = {manifest.base_fingerprint, base.fingerprint if base else None} - {None}
    if len(known) > 1:
        raise UserError(
            f"{path} was trained on {manifest.base} with other weights",
            hint=_TRAIN_AGAIN,
        )
    return Baseline(path, manifest)


def baseline_adapter(path: Path, asked: Asked) -> Lora | None:
    """Return a row's adapter for a case; see `Baseline.adapter`."""
    return load_baseline(path).adapter(asked)


def tuned_decoder(path: Path, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Return a fully tuned row's decoder: float32, on a device, in evaluation mode.

    Raises UserError when there is none.
    """
    if load_baseline(path).row not in TUNED_ROWS:
        raise UserError(f"{path} holds an adapter, expected a fully tuned decoder")
    # Attention is computed as for the base decoder of the other rows.
    on_cpu = torch.device(device).type == "cpu"
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path / "model",
        dtype=torch.float32,
        attn_implementation="eager" if on_cpu else "sdpa",
        local_files_only=True,
    )
    nn.Module.to(model, device).train(False)
    return model


def is_trained(path: Path) -> bool:
    """Tell whether a row's folder is complete."""
    return (path / _MANIFEST).is_file()


def write_manifest(path: Path, manifest: Manifest | OwnManifest) -> None:
    """Write a folder's manifest, which says that the folder is complete."""
    temporary = path / f".tmp-{_MANIFEST}"
    content = json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n"
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path / _MANIFEST)


def own_folder(path: Path, data: RepositoryData, told_up_to: int) -> Path:
    """Return where the LoRA of a repository lies that knows it up to a commit."""
    return path / folder_name(data.name) / f"up-to-{told_up_to}"


def read_own_manifest(folder: Path) -> OwnManifest | None:
    """Return the manifest of a repository's LoRA; None where there is no complete one."""
    return _read(folder / _MANIFEST, OwnManifest)


def own_lora(path: Path, asked: Asked) -> Lora | None:
    """Return the LoRA of a repository for a case; None where there was nothing to train on.

    The newest one that was trained on nothing that the case asks about. Raises UserError when
    there are only others, or when the repository was mined differently since.
    """
    found = [
        (manifest, folder)
        for folder in (path / folder_name(asked.data.name)).glob("up-to-*")
        if (manifest := read_own_manifest(folder)) is not None
    ]
    if not found:
        return None
    name = asked.data.name
    if any(manifest.n_commits != asked.data.n_commits for manifest, _ in found):
        raise UserError(f"{name} was mined again since its LoRA was trained", hint=_TRAIN_AGAIN)
    fair = [
        (manifest.told_up_to, folder)
        for manifest, folder in found
        if manifest.told_up_to <= asked.told_up_to and asked.held_out <= set(manifest.hidden)
    ]
    if not fair:
        last = min(manifest.told_up_to for manifest, _ in found)
        raise UserError(
            f"the LoRA of {name} was trained up to its commit {last} or on files that are asked "
            f"about, but may know commits up to {asked.told_up_to} only",
            hint=_TRAIN_AGAIN,
        )
    return read_lora(max(fair)[1] / "adapter")


def _read(file: Path, kind: type[_M]) -> _M | None:
    try:
        values: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return kind(**values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read: {error}", hint=_TRAIN_AGAIN) from error
