"""`code2lora models`: which models there are, and what they say of themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from code2lora.cli import audits, hub, model_export, render
from code2lora.cli.options import GuessingGroup, examples, json_option
from code2lora.errors import UserError

if TYPE_CHECKING:
    from code2lora.hypernetwork.config import CheckpointConfig
    from code2lora.hypernetwork.models import ModelPaths
    from code2lora.settings import Settings

_EXAMPLES = examples(
    ("code2lora models", "list them; `*` marks the one in use"),
    ("code2lora models show mini", "one of them, with its figures"),
    ("code2lora models pull qwen2.5-coder-1.5b", "fetch a published one"),
    ("CODE2LORA_MODEL=mini code2lora daemon restart", "use another one"),
)


@click.group("models", cls=GuessingGroup, invoke_without_command=True, epilog=_EXAMPLES)
@click.pass_context
def models(ctx: click.Context) -> None:
    """List, show, fetch, publish and remove models."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_, as_json=False)


@models.command(
    "list", epilog=examples(("code2lora models list --json", "for programs: paths and sizes"))
)
@json_option
def list_(as_json: bool) -> None:
    """List the models; `*` marks the one in use."""
    from code2lora.hypernetwork.models import list_models
    from code2lora.settings import load_settings

    settings = load_settings()
    found = [_summary(model, settings) for model in list_models(settings.models_dir)]
    if as_json:
        render.emit_json(found)
        return
    if not found:
        render.remark(f"there is no model, neither bundled nor in {settings.models_dir}")
        return
    rows = [
        [
            "*" if model["in_use"] else "",
            model["name"],
            model["base_model"],
            model["audit"],
            render.size(model["n_bytes"]),
            model["path"],
        ]
        for model in found
    ]
    headers = ["", "NAME", "BASE MODEL", "AUDIT", "SIZE", "PATH"]
    render.emit(render.table(headers, rows, right=["SIZE"], elastic="PATH"))


@models.command(
    "show",
    epilog=examples(
        ("code2lora models show mini", "its parts, how well it does, the base path for vLLM"),
        ("code2lora models show ./my-model", "a directory of your own; the slash makes it a path"),
    ),
)
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show one model: parts, sizes, held-out figures, and where its card is."""
    from code2lora.hypernetwork.models import resolve_model
    from code2lora.settings import load_settings

    settings = load_settings()
    paths = resolve_model(name, settings.models_dir)
    config = checkpoint_config(paths)
    summary = _summary(paths, settings)
    parts = {part: size_of(getattr(paths, part)) for part in ("base", "encoder", "hypernetwork")}
    if as_json:
        render.emit_json({**summary, "base_path": paths.base, "parts": parts, "config": config})
        return
    rows = [
        ("name", f"{summary['name']}{' (in use)' if summary['in_use'] else ''}"),
        ("path", summary["path"]),
        *(
            (part, f"{render.size(n_bytes)}, {render.line(_origin(config, part))}")
            for part, n_bytes in parts.items()
        ),
        ("base path", str(paths.base)),
        *((key, _figure(value)) for key, value in _flat(config.metrics)),
        *audits.in_rows(config.audit),
        ("card", str(paths.card) if paths.card.is_file() else "none"),
    ]
    render.emit(render.fields(rows))


for _command in (hub.available, hub.pull, hub.push, hub.remove, model_export.export):
    models.add_command(_command)


def checkpoint_config(paths: ModelPaths) -> CheckpointConfig:
    """Return what a model's checkpoint says of itself. Raises UserError when it is wrong."""
    from code2lora.hypernetwork.config import parse_config

    file = paths.hypernetwork / "config.json"
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read: {error}", hint="fetch or copy the model again"
        ) from error
    return parse_config(values, where=str(file))


def size_of(folder: Path) -> int:
    """Return the bytes of the files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _summary(model: ModelPaths, settings: Settings) -> dict[str, Any]:
    root = model.hypernetwork.parent
    config = checkpoint_config(model)
    return {
        "name": model.name,
        "in_use": settings.model == model.name or Path(settings.model).expanduser() == root,
        "base_model": config.base.id,
        "audit": audits.verdict(config.audit),
        "n_bytes": size_of(root),
        "path": str(root),
    }


def _origin(config: CheckpointConfig, part: str) -> str:
    if part == "base":
        return f"{config.base.id}, {render.count(config.base.n_layers, 'layer')}"
    if part == "encoder":
        return f"{config.encoder.id}, width {config.encoder.width}"
    head = config.head
    return f"family {config.family}, head {head.kind}, rank {head.rank}"


def _flat(values: object, prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested figures as dotted names with values."""
    if not isinstance(values, Mapping):
        return [(prefix, values)]
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found.extend(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return found


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else render.line(str(value))
