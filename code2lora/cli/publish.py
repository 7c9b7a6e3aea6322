"""`code2lora publish`: where every new adapter is pushed to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from code2lora.adapters.publishers.target import KINDS
from code2lora.cli import edge, render
from code2lora.cli.options import GuessingGroup, examples, json_option, path_option
from code2lora.errors import UserError

if TYPE_CHECKING:
    from code2lora.adapters.publishers.target import Target
    from code2lora.cli.place import Place

_KINDS = "\n\n\b\n" + "\n".join(f"  {kind:<10} {what}" for kind, what in KINDS.items())


@click.group(
    "publish",
    cls=GuessingGroup,
    epilog=examples(
        ("code2lora publish add vllm http://127.0.0.1:8000", "from now on, every new adapter"),
        ("code2lora publish list", "where adapters go, and whether they arrived"),
        ("code2lora publish now", "once more, such as after the server's restart"),
    ),
)
def publish() -> None:
    """Push every new adapter to servers and directories.

    The daemon pushes in the background; no commit waits for it, and a push that fails is shown by
    `code2lora status` and tried again with the next adapter. The list is in the repository's git
    configuration (`code2lora.publish`).
    """


@publish.command(
    "add",
    help="Push every new adapter to DESTINATION, a URL or a directory. KIND is one of:" + _KINDS,
    epilog=examples(
        ("code2lora publish add mistralrs http://127.0.0.1:1234", "in place, no restart"),
        (
            "code2lora publish add llamacpp http://127.0.0.1:8080 --preset ~/models.ini",
            "a router's preset",
        ),
        (
            "code2lora publish add ollama http://127.0.0.1:11434 --model qwen2.5-coder:1.5b-base",
            "a model there",
        ),
        ("code2lora publish add directory /srv/adapters --keep 10", "copies, the newest ten"),
    ),
)
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.argument("destination")
@click.option("--name", help="What the adapter is called there.  [default: the repository's name]")
@click.option("--key-env", metavar="VARIABLE", help="The daemon's environment has the key in it.")
@click.option("--key-file", metavar="FILE", help="A file with the key, which only you can read.")
@click.option("--host", help="Allow this host, which is not this machine.")
@click.option("--format", "format_", type=click.Choice(["peft", "gguf"]), help="For a directory.")
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Generations that stay, in a directory and beside a preset.",
)
@click.option("--preset", metavar="FILE", help="The preset file of a llama.cpp router.")
@click.option(
    "--model",
    metavar="BASE",
    help="The base: for llamacpp a GGUF file, for a section that is not there yet; for ollama its "
    "name there.",
)
@path_option
@json_option
def add(
    kind: str,
    destination: str,
    name: str | None,
    key_env: str | None,
    key_file: str | None,
    host: str | None,
    format_: str | None,
    keep: int,
    preset: str | None,
    model: str | None,
    path: Path,
    as_json: bool,
) -> None:
    from code2lora.adapters.publishers.target import Target
    from code2lora.cli.place import open_place
    from code2lora.daemon.publishing import confirm_publisher
    from code2lora.history.gitconfig import add_publisher

    with open_place(path) as place:
        target = Target(
            kind=kind,
            destination=_full(destination) if kind == "directory" else destination,
            name=name or _default_name(place.repository.name),
            key_env=key_env,
            key_file=_full(key_file),
            host=host,
            format=format_,
            keep=keep,
            preset=_full(preset),
            model=_full(model) if kind == "llamacpp" else model,
        )
        add_publisher(place.history, target.text)
        confirm_publisher(place.settings, place.repository.id, target.text)
    if as_json:
        render.emit_json({"publisher": target.text, "name": target.name})
    else:
        click.echo(target.text)
        render.remark("the next adapter goes there; `code2lora publish now` pushes the live one")


@publish.command(
    "list", epilog=examples(("code2lora publish list --json", "for programs, with last errors"))
)
@path_option
@json_option
def list_(path: Path, as_json: bool) -> None:
    """List where adapters are pushed to, what each has, and why not if it has none."""
    from code2lora.cli.place import open_place

    with open_place(path) as place:
        found = _listed(place)
    if as_json:
        render.emit_json(found)
        return
    if not found:
        render.remark("adapters are pushed nowhere: `code2lora publish add --help`")
        return
    rows = [
        [
            str(number),
            render.clean(str(item["label"])),
            render.clean(str(item["name"] or "-")),
            str(item["generation"] or "-"),
            render.age(item["pushed_at"]) if item["pushed_at"] else "never",
            render.styled(render.line(item["error"]), "red") if item["error"] else "ok",
        ]
        for number, item in enumerate(found, 1)
    ]
    headers = ["", "DESTINATION", "NAME", "GENERATION", "PUSHED", "STATE"]
    render.emit(render.table(headers, rows, right=["GENERATION"], elastic="STATE"))


@publish.command(
    "remove",
    epilog=examples(
        ("code2lora publish remove 1", "by its number in the list"),
        ("code2lora publish remove http://127.0.0.1:8000", "by its destination"),
    ),
)
@click.argument("which")
@path_option
@json_option
def remove(which: str, path: Path, as_json: bool) -> None:
    """Stop pushing to WHICH, a number in the list or a destination.

    What has been pushed stays where it is.
    """
    from code2lora.cli.place import open_place
    from code2lora.daemon.publishing import forget_publisher, stage_of
    from code2lora.history.gitconfig import publishers, remove_publisher

    with open_place(path) as place:
        gone = _chosen(publishers(place.history), which)
        for line in gone:
            remove_publisher(place.history, line)
            forget_publisher(place.settings, place.repository.id, line)
            place.store.resolve_failures(place.repository.id, stage=stage_of(line))
    if as_json:
        render.emit_json({"removed": gone})
    else:
        click.echo("\n".join(render.clean(line) for line in gone))


@publish.command(
    "now",
    epilog=examples(
        ("code2lora publish now", "to all of them"),
        ("code2lora publish now 2", "to the second in the list"),
    ),
)
@click.argument("which", required=False)
@path_option
@json_option
@click.pass_context
def now(ctx: click.Context, which: str | None, path: Path, as_json: bool) -> None:
    """Push the live adapter now, and wait for it: to all, or to WHICH.

    Needs no daemon. Exits with 1 when a push fails.
    """
    import os

    from code2lora.cli.place import open_place
    from code2lora.daemon.publishing import push_worktree
    from code2lora.history.gitconfig import publishers

    with open_place(path) as place:
        lines = publishers(place.history)
        if not lines:
            raise UserError("adapters are pushed nowhere", hint="`code2lora publish add --help`")
        chosen = lines if which is None else _chosen(lines, which)
        if place.store.live_adapter(place.worktree.id) is None:
            raise UserError(
                f"{place.path} has no adapter yet", hint=f"`code2lora refresh {place.path}`"
            )
        done = push_worktree(
            place.settings,
            place.store,
            place.worktree,
            os.environ,
            chosen=lambda line: line in chosen,
            again=True,
        )
    if as_json:
        render.emit_json(done)
    else:
        for push in done:
            label = render.clean(push.label)
            if push.error is None:
                click.echo(f"{label} has generation {push.generation} as {push.name}")
            else:
                edge.complain(render.line(push.error), push.hint)
    if any(push.error is not None for push in done):
        ctx.exit(edge.USER_ERROR)


def _listed(place: Place) -> list[dict[str, Any]]:
    """Return the publishers in order, with what is known of each."""
    from code2lora.daemon.publishing import (
        confirmed_publishers,
        label_of,
        last_pushes,
        stage_of,
    )
    from code2lora.history.gitconfig import publishers

    pushed = last_pushes(place.store, place.worktree)
    confirmed = confirmed_publishers(place.settings, place.repository.id)
    failures = {f.stage: f for f in reversed(place.store.failures(place.repository.id))}
    found = []
    for line in publishers(place.history):
        last: Mapping[str, Any] = pushed.get(line, {})
        failure = failures.get(stage_of(line))
        found.append(
            {
                "publisher": line,
                "label": label_of(line),
                "confirmed": line in confirmed,
                "name": last.get("name"),
                "generation": last.get("generation"),
                "commit": last.get("commit"),
                "pushed_at": last.get("at"),
                "error": failure.message if failure else _complaint(line, line in confirmed),
                "hint": failure.hint if failure else None,
            }
        )
    return found


def _complaint(line: str, is_confirmed: bool) -> str | None:
    from code2lora.adapters.publishers.target import parse

    if not is_confirmed:
        return "not confirmed: `code2lora publish add` it here"
    try:
        parse(line)
    except UserError as error:
        return error.message
    return None


def _chosen(lines: Sequence[str], which: str) -> list[str]:
    """Return the publishers that a number or a destination means. Raises UserError for none."""
    if which.isdecimal() and 1 <= int(which) <= len(lines):
        return [lines[int(which) - 1]]
    found = [line for line in lines if which == line or which in _names(line)]
    if not found:
        raise UserError(
            f"{which!r} is neither a number of the list nor a destination in it",
            hint="`code2lora publish list`",
        )
    return found


def _names(line: str) -> tuple[str, ...]:
    from code2lora.adapters.publishers.target import parse

    try:
        target: Target = parse(line)
    except UserError:
        return ()
    return (target.destination, target.label)


def _full(path: str | None) -> Any:
    """Return an absolute path, since the daemon's current directory is not the user's."""
    return None if path is None else str(Path(path).expanduser().absolute())


def _default_name(repository: str) -> str:
    """Return a repository's name as servers take it."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in repository)
    return kept.lstrip("._-")[:100] or "repository"
