"""`code2lora adapter`: where adapters lie, taking one along, and checking one."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from code2lora.adapters.export import FORMATS, GGUF_DTYPES
from code2lora.cli import edge, render
from code2lora.cli.options import GuessingGroup, examples, json_option, path_option
from code2lora.errors import UserError

if TYPE_CHECKING:
    from code2lora.cli.place import Place
    from code2lora.state_store.records import Adapter

_AGAIN = "`code2lora refresh` makes it again"

commit_option = click.option(
    "--commit",
    "revision",
    metavar="REV",
    help="The adapter of this commit instead of the live one.",
)


@click.group(
    "adapter",
    cls=GuessingGroup,
    epilog=examples(
        ("code2lora adapter path", "the directory that serves now"),
        ("code2lora adapter export ./my-lora", "a copy that stays"),
        ("code2lora adapter verify", "reload it through PEFT and compare"),
    ),
)
def adapter() -> None:
    """Find, copy and check adapters: ordinary PEFT directories.

    A published adapter never changes; a newer one is a new directory, and old ones are pruned.
    """


@adapter.command(
    "path",
    epilog=examples(
        ("code2lora adapter path", "the live adapter of the worktree here"),
        ("vllm serve BASE --lora-modules me=$(code2lora adapter path)", "hand it to a server"),
    ),
)
@path_option
@commit_option
@json_option
def path_(path: Path, revision: str | None, as_json: bool) -> None:
    """Print the directory of the live adapter.

    Warns on stderr when it is not the adapter of HEAD; `code2lora refresh` waits until it is.
    """
    from code2lora.cli.place import open_place

    with open_place(path) as place:
        found = chosen_adapter(place, revision)
        head = place.history.head().commit
    if as_json:
        render.emit_json(found)
    else:
        click.echo(found.path)
    if revision is None and found.commit != head:
        stale, at = render.short(found.commit), render.short(head or "an unborn branch")
        render.remark(f"it is the adapter of {stale}, HEAD is {at}: `code2lora refresh`")


@adapter.command(
    "list",
    epilog=examples(
        ("code2lora adapter list", "what is on disk, newest first"),
        ("code2lora adapter list --all", "pruned ones too"),
    ),
)
@path_option
@click.option("--all", "include_pruned", is_flag=True, help="List pruned adapters too.")
@json_option
def list_(path: Path, include_pruned: bool, as_json: bool) -> None:
    """List the repository's adapters, newest first; `*` marks the live one."""
    from code2lora.cli.place import open_place

    with open_place(path) as place:
        found = place.store.adapters(place.repository.id, include_pruned=include_pruned)
        live = place.store.live_adapter(place.worktree.id)
    if as_json:
        render.emit_json(found)
        return
    if not found:
        render.remark("no adapter has been published yet: `code2lora status`")
        return
    rows = [
        [
            "*" if live is not None and live.id == item.id else "",
            str(item.generation),
            render.short(item.commit),
            render.age(item.published_at),
            render.size(item.n_bytes),
            "pruned" if item.pruned_at else render.clean(item.path),
        ]
        for item in found
    ]
    headers = ["", "GENERATION", "COMMIT", "AGE", "SIZE", "PATH"]
    right = ["GENERATION", "SIZE"]
    render.emit(render.table(headers, rows, right=right, elastic="PATH"))


@adapter.command(
    "export",
    epilog=examples(
        ("code2lora adapter export ./my-lora", "the live adapter"),
        ("code2lora adapter export ./v1-lora --commit v1.0", "of a tag"),
        ("code2lora adapter export my.gguf --format gguf", "for llama.cpp and Ollama"),
        ("code2lora adapter export ./my-mlx --format mlx", "for mlx_lm"),
    ),
)
@click.argument("destination", type=click.Path(path_type=Path))
@path_option
@commit_option
@click.option(
    "--format",
    "format_",
    default="peft",
    show_default=True,
    type=click.Choice(FORMATS),
    help="The layout of the copy.",
)
@click.option(
    "--dtype",
    default="f16",
    show_default=True,
    type=click.Choice(GGUF_DTYPES),
    help="The numbers of a GGUF file; the other layouts keep the adapter's.",
)
@click.option("--force", is_flag=True, help="Replace an earlier export.")
@json_option
def export(
    destination: Path,
    path: Path,
    revision: str | None,
    format_: str,
    dtype: str,
    force: bool,
    as_json: bool,
) -> None:
    """Copy an adapter to DESTINATION: a directory, or with `--format gguf` a file.

    DESTINATION must not exist yet. The copy is yours: nothing prunes it.
    """
    from code2lora.adapters.export import export as copy
    from code2lora.cli.place import open_place
    from code2lora.hypernetwork.models import resolve_model

    with open_place(path) as place:
        found = chosen_adapter(place, revision)
        settings = place.settings
    _check_digest(found)
    base = resolve_model(settings.model, settings.models_dir).base if format_ == "gguf" else None
    written = copy(
        Path(found.path),
        destination.absolute(),
        format_,
        base_dir=base,
        dtype=dtype,
        force=force,
    )
    if as_json:
        render.emit_json({"path": written, "commit": found.commit, "format": format_})
    else:
        click.echo(written)


@adapter.command(
    "verify",
    epilog=examples(
        ("code2lora adapter verify", "the live adapter"),
        ("code2lora adapter verify --directory ./my-lora", "a copy"),
    ),
)
@path_option
@commit_option
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="An adapter directory instead of one of the repository's.",
)
@json_option
@click.pass_context
def verify(
    ctx: click.Context, path: Path, revision: str | None, directory: Path | None, as_json: bool
) -> None:
    """Reload an adapter through PEFT and compare its logits with ours.

    Takes seconds and loads the base model. Exits with 1 when the file has changed since it was
    published or the two disagree.
    """
    from code2lora.adapters.verify import TOLERANCE
    from code2lora.adapters.verify import verify as check
    from code2lora.cli.place import open_place
    from code2lora.hypernetwork.models import resolve_model
    from code2lora.settings import load_settings

    _hush_progress_bars()
    settings = load_settings()
    is_copy = directory is not None
    if directory is None:
        with open_place(path) as place:
            directory = Path(chosen_adapter(place, revision).path)
    base = resolve_model(settings.model, settings.models_dir).base
    report = check(directory, base)
    values: dict[str, Any] = {
        "path": directory,
        "ok": report.ok,
        "n_tensors": report.n_tensors,
        "digest_matches": report.digest_matches,
        "max_abs_difference": report.max_abs_difference,
        "max_abs_effect": report.max_abs_effect,
    }
    if as_json:
        render.emit_json(values)
    else:
        digest = "as published" if report.digest_matches else "changed since it was published"
        rows = [
            ("adapter", render.clean(str(directory))),
            ("weights", f"{render.count(report.n_tensors, 'tensor')}, {digest}"),
            ("PEFT", f"logits differ by {report.max_abs_difference:.2g}, allowed {TOLERANCE:g}"),
            ("effect", f"changes the base model's logits by up to {report.max_abs_effect:.2g}"),
            ("verdict", "ok" if report.ok else "not ok"),
        ]
        render.emit(render.fields(rows))
    if not report.ok:
        again = "`code2lora adapter export` makes a new copy" if is_copy else _AGAIN
        render.remark(f"hint: {again}")
        ctx.exit(edge.USER_ERROR)


def _check_digest(found: Adapter) -> None:
    """Raise UserError unless the weights are the bytes that were published."""
    from code2lora.adapters.layout import WEIGHTS_FILE

    with (Path(found.path) / WEIGHTS_FILE).open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != found.sha256:
        raise UserError(f"{found.path} has changed since it was published", hint=_AGAIN)


def _hush_progress_bars() -> None:
    """Keep the loading of weights from drawing over our output."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def chosen_adapter(place: Place, revision: str | None) -> Adapter:
    """Return the live adapter, or the newest one on disk of a commit.

    Raises UserError when there is none, or when its weights are not on disk any more.
    """
    from code2lora.adapters.prune import is_whole
    from code2lora.cli.place import require_commit

    if revision is None:
        live = place.store.live_adapter(place.worktree.id)
        if live is None:
            require_commit(place)
            raise UserError(
                f"{place.path} has no adapter yet", hint=f"`code2lora refresh {place.path}`"
            )
        if not is_whole(Path(live.path), live.n_bytes):
            raise UserError(f"the live adapter {live.path} is gone", hint=_AGAIN)
        return live
    commit = place.resolve(revision)
    for found in place.store.adapters(place.repository.id):
        if found.commit == commit and is_whole(Path(found.path), found.n_bytes):
            return found
    raise UserError(
        f"no adapter of commit {render.short(commit)} is on disk",
        hint=f"`git switch --detach {shlex.quote(revision)}` and `code2lora refresh` make one",
    )
