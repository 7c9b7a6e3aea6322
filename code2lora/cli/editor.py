"""`code2lora editor`: how editors find the completions of this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from code2lora.cli import render
from code2lora.cli.editor_texts import EDITORS, Editor, Endpoint
from code2lora.cli.options import examples, json_option, path_option
from code2lora.errors import UserError

if TYPE_CHECKING:
    from code2lora.cli.place import Place
    from code2lora.settings import Settings

_PORT_LINE = re.compile(r"^[ \t]*http_port[ \t]*=.*$", re.MULTILINE)
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_RESERVED = ("base", "generic")


@click.command(
    "editor",
    epilog=examples(
        ("code2lora editor", "list the editors"),
        ("code2lora editor zed", "print what to put into its settings"),
        ("code2lora editor continue --write ~/.continue/config.yaml", "put it there"),
        ("code2lora editor openai | sh", "ask for a completion with curl"),
    ),
)
@click.argument("name", required=False, type=click.Choice(list(EDITORS)))
@click.option(
    "--write",
    "file",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Merge it into this file and keep the file as it was beside it; opens the port if need "
    "be.",
)
@path_option
@json_option
@click.pass_context
def editor(
    ctx: click.Context, name: str | None, file: Path | None, path: Path, as_json: bool
) -> None:
    """Print or write the configuration of an editor.

    In a registered repository its adapter is asked for by name; elsewhere the server tells the
    repository by the files that the editor sends. Editors ask over TCP, on 127.0.0.1 alone, with
    the key in the file that the output names.
    """
    if name is None:
        if file is not None:
            raise click.UsageError("--write needs the name of an editor")
        _list(as_json)
        return
    from click.core import ParameterSource

    from code2lora.settings import load_settings

    settings = load_settings()
    is_asked_for = ctx.get_parameter_source("path") is not ParameterSource.DEFAULT
    repository = _repository(path, settings, must=is_asked_for)
    if file is not None and settings.http_port == 0:
        settings = _open_port(settings)
    endpoint = _endpoint(settings, repository)
    if file is None:
        _print(EDITORS[name], endpoint, as_json)
    else:
        _write(EDITORS[name], endpoint, file, as_json)
    _remark_on_port(settings)


def _list(as_json: bool) -> None:
    known = [
        {"name": each.name, "what": each.what, "usual_file": each.usual_file}
        for each in EDITORS.values()
    ]
    if as_json:
        render.emit_json(known)
        return
    rows = [[each["name"], each["what"], each["usual_file"]] for each in known]
    render.emit(render.table(["EDITOR", "WHAT", "USUAL FILE"], rows, elastic="USUAL FILE"))


def _print(chosen: Editor, endpoint: Endpoint, as_json: bool) -> None:
    text = chosen.text(endpoint)
    if as_json:
        values = _facts(chosen, endpoint)
        render.emit_json({**values, "text": text, "usual_file": chosen.usual_file})
        return
    click.echo(text, nl=False)
    if chosen.holds_key and endpoint.key is not None:
        render.remark("it holds your key: keep it out of what others can read")


def _write(chosen: Editor, endpoint: Endpoint, file: Path, as_json: bool) -> None:
    from code2lora.cli.editor_files import write

    done = write(chosen, endpoint, file)
    if as_json:
        values = _facts(chosen, endpoint)
        render.emit_json(
            {**values, "path": done.path, "changed": done.changed, "backup": done.backup}
        )
        return
    click.echo(done.path)
    if not done.changed:
        render.remark("it says so already")
    elif done.backup is not None:
        render.remark(f"as it was: {done.backup}")


def _facts(chosen: Editor, endpoint: Endpoint) -> dict[str, object]:
    return {
        "editor": chosen.name,
        "url": endpoint.url,
        "model": endpoint.model,
        "key_file": endpoint.key_file if endpoint.key is not None else None,
    }


def _endpoint(settings: Settings, repository: str | None) -> Endpoint:
    from code2lora.daemon.listening import ensure_token
    from code2lora.hypernetwork.models import resolve_model
    from code2lora.settings import EDITOR_PORT, LOOPBACK_ADDRESS

    model = public_model_id(resolve_model(settings.model, settings.models_dir).base.parent)
    key = None
    if settings.http_auth == "token":
        settings.prepare()
        key = ensure_token(settings)
    return Endpoint(
        url=f"http://{LOOPBACK_ADDRESS}:{settings.http_port or EDITOR_PORT}",
        model=f"{model}@{repository}" if repository else model,
        repository=repository,
        key=key,
        key_file=settings.http_token_file,
    )


def public_model_id(model: Path) -> str:
    """Return the id by which the server knows a model directory, which it derives with torch."""
    name = model.name
    fills = b'"<|fim_prefix|>"' in (model / "base" / "tokenizer.json").read_bytes()
    known = "qwen" in name.lower() and "coder" in name.lower()
    return f"code2lora/{name}" if known or not fills else f"code2lora/qwen2.5-coder-{name}"


def _repository(path: Path, settings: Settings, *, must: bool) -> str | None:
    """Return what the server calls the repository at a path; None where there is none.

    Raises UserError when there `must` be one.
    """
    from code2lora.cli.place import has_database, open_place

    if not must and not has_database(settings):
        return None
    try:
        with open_place(path) as place:
            return served_name(place)
    except UserError:
        if must:
            raise
        return None


def served_name(place: Place) -> str:
    """Return a repository's name, or its id where the name is not its alone."""
    repository = place.repository
    name, known = repository.name, place.store.repositories()
    is_shared = any(other.name == name and other.id != repository.id for other in known)
    # what follows a colon would name a worktree
    fits = _REPOSITORY.fullmatch(name) and ":" not in name and name not in _RESERVED
    return name if fits and not is_shared else repository.id


def _open_port(settings: Settings) -> Settings:
    """Set the port in `config.toml`, and return the settings with it.

    Raises UserError when the file cannot be written or the environment says otherwise.
    """
    from code2lora.adapters.files import placed_file
    from code2lora.settings import EDITOR_PORT, config_file, load_settings

    file = config_file()
    line = f"http_port = {EDITOR_PORT}"
    try:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {file}: {error.strerror}",
            hint=f"set CODE2LORA_HTTP_PORT={EDITOR_PORT} where the daemon starts and here",
        ) from error
    text, n_found = _PORT_LINE.subn(line, text, count=1)
    with placed_file(file.resolve(), force=True) as temporary:
        temporary.write_text(text if n_found else f"{line}\n{text}", encoding="utf-8")
    opened = load_settings()
    if opened.http_port == 0:
        raise UserError(
            f"{file} opens port {EDITOR_PORT}, but the environment closes it",
            hint="unset CODE2LORA_HTTP_PORT",
        )
    render.remark(f"{file}: {line}")
    return opened


def _remark_on_port(settings: Settings) -> None:
    """Say what is still to be done before the editor is answered."""
    import socket

    from code2lora.daemon.control import supervisor_status
    from code2lora.settings import EDITOR_PORT, LOOPBACK_ADDRESS, config_file

    if settings.http_port == 0:
        render.remark(
            f"no port is open: put `http_port = {EDITOR_PORT}` into {config_file()}, then "
            "`code2lora daemon restart`; `--write` does the first"
        )
        return
    with socket.socket() as probe:
        probe.settimeout(1.0)
        if probe.connect_ex((LOOPBACK_ADDRESS, settings.http_port)) == 0:
            return
    verb = "restart" if supervisor_status(settings).running else "start"
    render.remark(f"nobody listens on port {settings.http_port} yet: `code2lora daemon {verb}`")
