"""Audit a fitted model on repositories that it was not trained on: `code2lora train audit`.

Reads   mined shards, the base decoder, a fitted model, perhaps a LoRA that all repositories share
Writes  <out>/audit.json, and the verdict into the checkpoint's configuration

With the test repositories in place of the validation ones the file is `audit-test.json`, and the
checkpoint is left as it is. Nothing is written before everything is known.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from code2lora.errors import UserError
from code2lora.hypernetwork.checkpoint import LoadedFamily
from code2lora.hypernetwork.config import AuditRecord
from code2lora.hypernetwork.identity import fingerprint, read_config, write_config
from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.models import ModelPaths
from code2lora.training.audit.items import AuditCase, prepare_audit
from code2lora.training.audit.report import Audit
from code2lora.training.audit.scores import Progress, audit, mean_of_training
from code2lora.training.baselines.loading import SHARED_LORA, is_trained, load_baseline
from code2lora.training.data.dataset import RepositoryData, load_embedded, load_repositories
from code2lora.training.data.features import features_file
from code2lora.training.data.leakage import read_leaks
from code2lora.training.data.shards import Shard, read_shards
from code2lora.training.fitted import load_fitted
from code2lora.training.fitting.inputs import LexicalInputs
from code2lora.training.fitting.items import ItemBuilder
from code2lora.training.fitting.learner import Learner
from code2lora.training.fitting.objective import Frozen, freeze
from code2lora.training.split import TEST_BUCKET, VALIDATION_BUCKET

if TYPE_CHECKING:
    from code2lora.training.recipe import Recipe
    from code2lora.training.run import Decoder

TEST_AUDIT = "audit-test.json"
"""What the audit of the test repositories writes."""


@dataclass(frozen=True)
class AuditResult:
    """What was found, and where it was written."""

    audit: Audit
    path: Path
    content: dict[str, Any]
    """What the file holds, as JSON values."""


def audit_model(
    recipe: Recipe,
    mined: Path,
    decoder: Decoder,
    out_dir: Path,
    *,
    shared: Path | None = None,
    test: bool = False,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> AuditResult:
    """Audit the model in a folder, and write what was found.

    shared: a folder with a shared LoRA (`train baselines`) to compare with
    test: ask the repositories of the test bucket, and leave the checkpoint as it is
    progress: called with (rows scored, rows in all)
    Raises UserError when the model is missing, does not fit, or there are too few repositories, and
    `audit.Stopped` when `stop()` is true.
    """
    config = recipe.audit
    loaded = load_fitted(_paths(out_dir, decoder), decoder.model.device)
    learner = Learner(loaded.family)
    split = "cr_test" if test else "cr_val"
    shards = list(read_shards(mined))
    training = [shard for shard in shards if shard.split == "train"]
    # Evenly spaced here already, so that no more is read than is used.
    training = _spaced(training, config.mean_repositories)
    cases = prepare_audit(
        _repositories(learner, loaded, [each for each in shards if each.split == split], decoder),
        ItemBuilder(decoder.tokenizer, recipe.fit.items, end_id=decoder.end_id),
        config,
        holds_out=learner.inputs.holds_out,
        leaked=read_leaks(mined),
    )
    if len(cases) < 2:
        raise UserError(
            f"{len(cases)} repositories to audit on, expected at least 2",
            hint=f"mine repositories of bucket {TEST_BUCKET if test else VALIDATION_BUCKET}",
        )
    mean = mean_of_training(learner, _repositories(learner, loaded, training, decoder), config)
    found = audit(
        learner,
        _frozen(recipe, decoder),
        cases,
        mean,
        config,
        n_layers=decoder.config.n_layers,
        shared=None if shared is None else _shared_lora(shared, decoder, cases[0]),
        progress=progress,
        stop=stop,
    )
    content = {
        **found.to_dict(),
        "mean": None if mean is None else {"repositories": mean.n_adapters, "kept": mean.kept},
        "split": split,
        "repositories": [case.data.name for case in cases],
        "fingerprint": loaded.fingerprint,
        "settings": {"digest": _digest(recipe, split), **dataclasses.asdict(config)},
    }
    path = out_dir / (TEST_AUDIT if test else "audit.json")
    if not test:
        _note_in_checkpoint(out_dir / "hypernetwork", loaded, found.record(_digest(recipe, split)))
    _write(path, content)
    return AuditResult(found, path, content)


def _note_in_checkpoint(path: Path, loaded: LoadedFamily, record: AuditRecord) -> None:
    """Put the verdict into the configuration of the checkpoint that was audited."""
    if fingerprint(path) != loaded.fingerprint:
        raise UserError(
            f"the checkpoint in {path} was replaced while it was audited",
            hint="audit the new one",
        )
    write_config(path, dataclasses.replace(read_config(path), audit=record))


def _frozen(recipe: Recipe, decoder: Decoder) -> Frozen:
    return freeze(
        decoder.model,
        autocast=recipe.fit.autocast_bf16,
        n_lanes=recipe.fit.n_lanes,
        rows_per_pass=recipe.audit.rows_per_pass,
    )


def _repositories(
    learner: Learner, loaded: LoadedFamily, shards: Sequence[Shard], decoder: Decoder
) -> list[RepositoryData]:
    """Return repositories in the form in which the model is told them.

    A data set of the paper's may have come with vectors of the paper's encoder; those are taken
    where this machine made none of its own.
    """
    if isinstance(learner.inputs, LexicalInputs):
        return load_repositories(shards, decoder.tokenizer)
    found = []
    for shard in shards:
        own, imported = (features_file(shard, f) for f in (loaded.encoder_fingerprint, None))
        takes_imported = loaded.config.encoder.recipe.diff == "paper" and not own.is_file()
        released = takes_imported and imported.is_file()
        found += load_embedded([shard], None if released else loaded.encoder_fingerprint)
    return found


def _spaced(shards: Sequence[Shard], most: int) -> list[Shard]:
    n = min(len(shards), most)
    return [shards[i * len(shards) // n] for i in range(n)]


def _shared_lora(folder: Path, decoder: Decoder, case: AuditCase) -> Lora:
    """Return the LoRA in a folder of baselines, or in the folder of that row itself."""
    path = folder if is_trained(folder) else folder / SHARED_LORA
    baseline = load_baseline(path, decoder.config)
    lora = baseline.adapter(case) if baseline.row == SHARED_LORA else None
    if lora is None:
        raise UserError(
            f"{path} holds the row {baseline.row}, expected {SHARED_LORA}",
            hint="give the folder that `code2lora train baselines` filled",
        )
    return lora


def _digest(recipe: Recipe, split: str) -> str:
    """Return a short name for everything that decides what is asked, but the repositories."""
    values = [dataclasses.asdict(recipe.audit), dataclasses.asdict(recipe.fit.items), split]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _paths(out_dir: Path, decoder: Decoder) -> ModelPaths:
    return ModelPaths(
        name=out_dir.name,
        base=decoder.path,
        encoder=out_dir / "encoder",
        hypernetwork=out_dir / "hypernetwork",
        card=out_dir / "MODEL_CARD.md",
    )


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
