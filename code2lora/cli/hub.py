"""`code2lora models pull`, `available`, `push` and `remove`: models that come and go."""

from __future__ import annotations

from pathlib import Path

import click

from code2lora.cli import render
from code2lora.cli.options import confirm, examples, json_option, yes_option
from code2lora.cli.progress import progress


@click.command(
    "available",
    epilog=examples(("code2lora models available", "what can be pulled, how large, whose")),
)
@json_option
def available(as_json: bool) -> None:
    """List the published models that `pull` fetches."""
    from code2lora.hypernetwork.catalogue import CATALOGUE

    if as_json:
        render.emit_json(
            [
                {
                    "name": entry.name,
                    "summary": entry.summary,
                    "n_bytes": entry.n_bytes,
                    "parts": {
                        part: {
                            "repository": source.repository,
                            "revision": source.revision,
                            "n_bytes": source.n_bytes,
                            "licence": source.licence,
                        }
                        for part, source in entry.parts.items()
                    },
                }
                for entry in CATALOGUE.values()
            ]
        )
        return
    rows = [[entry.name, render.size(entry.n_bytes), entry.summary] for entry in CATALOGUE.values()]
    render.emit(render.table(["NAME", "SIZE", "WHAT"], rows, right=["SIZE"], elastic="WHAT"))


@click.command(
    "pull",
    epilog=examples(
        ("code2lora models pull qwen2.5-coder-1.5b", "7 GB; goes on where it was cut off"),
        ("HF_ENDPOINT=https://mirror code2lora models pull qwen2.5-coder-1.5b", "from a mirror"),
    ),
)
@click.argument("name")
@json_option
def pull(name: str, as_json: bool) -> None:
    """Fetch a published model: decoder, encoder and hypernetwork.

    Everything is fetched at a fixed commit and checked byte for byte; the hypernetwork is converted
    to safetensors. Works offline afterwards. HF_ENDPOINT, HF_TOKEN and the proxy variables are
    honoured.
    """
    from code2lora.hypernetwork.catalogue import find_pullable
    from code2lora.hypernetwork.pull import pull as pull_model
    from code2lora.settings import load_settings

    settings = load_settings()
    entry = find_pullable(name)
    with progress(f"pulling {entry.name}") as tell:
        pulled = pull_model(entry, settings.models_dir, progress=tell)
    if as_json:
        render.emit_json(pulled)
    else:
        word = "is there already" if pulled.status == "kept" else "is ready"
        render.emit(f"{pulled.name} {word}: {pulled.path}, {render.size(pulled.n_bytes)}")
    if settings.model != entry.name:
        render.remark(f"hint: `CODE2LORA_MODEL={entry.name} code2lora daemon restart` uses it")


@click.command(
    "push",
    epilog=examples(
        ("code2lora models push ./run me/my-model --dry-run", "show what would be uploaded"),
        ("code2lora models push ./run me/my-model", "publish a model that passed its audit"),
    ),
)
@click.argument("name")
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--dry-run", is_flag=True, help="Show what would be uploaded, and send nothing.")
@click.option("--private", is_flag=True, help="Make the repository private, if it is made now.")
@click.option("--licence", metavar="NAME", help="The hub's name of a licence, such as `mit`.")
@click.option(
    "--despite-audit",
    is_flag=True,
    help="Publish what did not pass `train audit`, with a warning on its card.",
)
@yes_option
@json_option
def push(
    name: str,
    repository: str,
    dry_run: bool,
    private: bool,
    licence: str | None,
    despite_audit: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Publish a model that you trained in a repository of the Hugging Face hub.

    It must have passed `code2lora train audit`. Only the model's own files are uploaded: the
    checkpoint, and decoder and encoder unless they are published elsewhere.
    """
    from code2lora.hypernetwork.models import resolve_model
    from code2lora.hypernetwork.push import plan_push
    from code2lora.hypernetwork.push import push as push_plan
    from code2lora.settings import load_settings

    paths = resolve_model(name, load_settings().models_dir)
    plan = plan_push(paths, repository, despite_audit=despite_audit, licence=licence)
    if dry_run:
        if as_json:
            render.emit_json({**vars(plan), "files": sorted(plan.files)})
            return
        rows = [[path, render.size(file.stat().st_size)] for path, file in plan.files.items()]
        rows.append(["README.md", render.size(len(plan.card.encode()))])
        render.emit(render.table(["FILE", "SIZE"], rows, right=["SIZE"]))
        return
    confirm(f"Publish {paths.name}, {render.size(plan.n_bytes)}, as {repository}?", yes=yes)
    pushed = push_plan(plan, private=private)
    if as_json:
        render.emit_json(pushed)
    else:
        render.emit(
            f"{paths.name} is published: {pushed.url}, commit {render.short(pushed.commit)}"
        )


@click.command(
    "remove",
    epilog=examples(("code2lora models remove qwen2.5-coder-1.5b", "delete what was pulled")),
)
@click.argument("name")
@yes_option
def remove(name: str, yes: bool) -> None:
    """Delete a pulled model, or the rest of a pull that was cut off."""
    from code2lora.hypernetwork.pull import find_pulled
    from code2lora.hypernetwork.pull import remove as remove_model
    from code2lora.settings import load_settings

    settings = load_settings()
    pulled = find_pulled(name, settings.models_dir)
    n_bytes = sum(file.lstat().st_size for path in pulled for file in _files(path))
    if settings.model == name:
        render.remark(f"{name} is the model in use; the daemon will not start without it")
    confirm(f"Delete {name}, {render.size(n_bytes)}?", yes=yes)
    remove_model(pulled)
    render.emit(f"{name} is deleted: {render.size(n_bytes)} are free again")


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if not file.is_dir()]
