"""`code2lora deinit`: let a repository go, and leave nothing of ours in it."""

from __future__ import annotations

from pathlib import Path

import click

from code2lora.cli import render
from code2lora.cli.options import Folder, confirm, examples, json_option, yes_option


@click.command(
    "deinit",
    epilog=examples(
        ("code2lora deinit", "asks first"),
        ("code2lora deinit ~/src/project --yes", "does not; the folder may be gone already"),
    ),
)
@click.argument("path", default=".", type=Folder(exists=False))
@yes_option
@json_option
def deinit(path: Path, yes: bool, as_json: bool) -> None:
    """Remove a repository's hooks, states and adapters.

    Your own hooks stay byte for byte as they were. Nothing is lost for good: `code2lora init`
    makes everything again from the commits.
    """
    from code2lora.cli.place import open_store
    from code2lora.daemon.registration import deregister, find_registered
    from code2lora.settings import load_settings

    path = path.absolute()
    settings = load_settings()
    with open_store(settings) as store:
        repository = find_registered(store, path)
        sizes = store.sizes(repository.id)
        holds = (
            f"{render.count(sizes.n_states, 'state')} and "
            f"{render.count(sizes.n_adapters, 'adapter')} "
            f"({render.size(sizes.state_bytes + sizes.adapter_bytes)})"
        )
        confirm(f"Remove the hooks, {holds} of {render.clean(repository.path)}?", yes=yes)
        gone = deregister(settings, store, path)
    if as_json:
        render.emit_json(
            {
                "repository_id": gone.repository_id,
                "path": gone.path,
                "hooks_removed": gone.hooks.removed,
                "hooks_left": gone.hooks.left,
                "n_states": sizes.n_states,
                "n_adapters": sizes.n_adapters,
            }
        )
        return
    for state in gone.hooks.left:
        where = f" in {state.path}" if state.path else ""
        render.remark(f"left: {state.event}{where}: {render.line(state.reason or state.how or '')}")
        if state.hint:
            render.remark(f"  {render.clean(state.hint)}")
    n_hooks = render.count(len(gone.hooks.removed), "hook")
    render.emit(f"removed {n_hooks}, {holds}")
