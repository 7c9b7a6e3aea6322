"""Publish a model of ours in a repository of the Hugging Face hub, if it passed its audit.

Reads   a model directory.
Writes  one commit: the checkpoint, the parts that are published nowhere else, and the card.

Only files that a model is known to have are uploaded, and none through a symbolic link. No torch
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from code2lora.errors import UserError
from code2lora.hypernetwork.catalogue import DECODER_FILES, ENCODER_FILES
from code2lora.hypernetwork.config import GRADIENTS_FILE, KEYS_FILE, CheckpointConfig
from code2lora.hypernetwork.hub import explained
from code2lora.hypernetwork.identity import CONFIG_FILE, WEIGHTS_FILE, read_config
from code2lora.hypernetwork.models import ModelPaths
from code2lora.hypernetwork.pull import read_sources

CARD = "README.md"
_ENCODER_FILES = (*ENCODER_FILES, GRADIENTS_FILE, KEYS_FILE)
"""What the hub calls a model card."""


@dataclass(frozen=True)
class Plan:
    """What is uploaded where."""

    repository: str
    files: Mapping[str, Path]
    """Path in the repository -> file."""
    card: str
    message: str
    n_bytes: int
    """Of the files, without the card."""


@dataclass(frozen=True)
class Pushed:
    """A publication."""

    url: str
    commit: str
    """The commit that was made."""


def plan_push(
    paths: ModelPaths, repository: str, *, despite_audit: bool = False, licence: str | None = None
) -> Plan:
    """Return what would be uploaded. Nothing is sent.

    despite_audit: publish a model that did not pass, with a warning on top of its card
    licence: the hub's name of a licence, for the card
    Raises UserError when the model did not pass its audit, was published by others, or lacks a
    file.
    """
    config = read_config(paths.hypernetwork)
    _check_audit(config, paths.name, despite_audit)
    sources = read_sources(paths.hypernetwork.parent)
    if "hypernetwork" in sources:
        origin = sources["hypernetwork"].get("repository", "elsewhere")
        raise UserError(
            f"{paths.name} was pulled from {origin}; others published it",
            hint="push a model that you trained",
        )
    files = {
        f"hypernetwork/{name}": paths.hypernetwork / name for name in (CONFIG_FILE, WEIGHTS_FILE)
    }
    if "base" not in sources and config.base.revision is None:
        files |= _known_files(paths.base, "base", DECODER_FILES)
    if "encoder" not in sources and config.encoder.recipe.diff != "paper":
        files |= _known_files(paths.encoder, "encoder", _ENCODER_FILES)
    for path, file in files.items():
        part = getattr(paths, path.partition("/")[0]).resolve()
        if not file.is_file():
            raise UserError(f"{file} is missing", hint="push a whole model, as it was trained")
        if file.resolve() != part / path.partition("/")[2]:
            raise UserError(f"{file} is a symbolic link", hint="put the file itself there")
    return Plan(
        repository,
        files,
        _card(config, paths, licence),
        f"Publish {paths.name}",
        sum(file.stat().st_size for file in files.values()),
    )


def push(plan: Plan, *, private: bool = False, endpoint: str | None = None) -> Pushed:
    """Upload a plan's files as one commit; the repository is made when there is none.

    private: of a repository that is made now
    endpoint: the hub's address; None for HF_ENDPOINT, or else huggingface.co
    Raises UserError when the hub cannot be reached or does not let the user write.
    """
    api = HfApi(endpoint=endpoint)
    operations = [CommitOperationAdd(path, str(file)) for path, file in sorted(plan.files.items())]
    operations.append(CommitOperationAdd(CARD, plan.card.encode()))
    with explained(plan.repository, str(api.endpoint), "published on"):
        api.create_repo(plan.repository, private=private, exist_ok=True)
        made = api.create_commit(plan.repository, operations, commit_message=plan.message)
    return Pushed(f"{api.endpoint}/{plan.repository}", made.oid)


def _check_audit(config: CheckpointConfig, name: str, despite_audit: bool) -> None:
    if despite_audit or (config.audit is not None and config.audit.verdict == "passed"):
        return
    why = "was not audited" if config.audit is None else "did not pass its audit"
    raise UserError(
        f"{name} {why}: nothing shows that its adapters know their repositories",
        hint="`code2lora train audit` asks that; `--despite-audit` publishes it with a warning",
    )


def _known_files(folder: Path, part: str, patterns: tuple[str, ...]) -> dict[str, Path]:
    """Return the files of a part that a model is known to have."""
    found = {file for pattern in patterns for file in folder.glob(pattern)}
    return {f"{part}/{file.relative_to(folder).as_posix()}": file for file in sorted(found)}


def _card(config: CheckpointConfig, paths: ModelPaths, licence: str | None) -> str:
    """Return the card: what the hub reads, what the audit found, and the model's own card."""
    own = paths.card.read_text(encoding="utf-8") if paths.card.is_file() else f"# {paths.name}\n"
    head = [f"license: {licence}"] if licence else []
    head += [f"base_model: {config.base.id}"] if "/" in config.base.id else []
    head += ["tags:", "- code2lora", "- lora"]
    return "\n".join(["---", *head, "---", "", _audit_note(config), "", own])


def _audit_note(config: CheckpointConfig) -> str:
    audit = config.audit
    if audit is None:
        found = "**WARNING: this model was not audited.**"
    elif audit.verdict == "passed":
        return (
            f"> Conditioning audit passed: {audit.n_repositories} repositories, "
            f"{audit.n_items} items, settings `{audit.settings[:12]}`."
        )
    else:
        failed = sorted(name for name, test in audit.tests.items() if test.passed is not True)
        found = f"**WARNING: the audit of this model is {audit.verdict}**: {', '.join(failed)}."
    return (
        f"> {found} Nothing shows that its adapters know the repository that they are made for, "
        "rather than code in general."
    )
