"""`code2lora models export`: a base model for other programs."""

from __future__ import annotations

from pathlib import Path

import click

from code2lora.adapters.export import GGUF_DTYPES
from code2lora.cli import render
from code2lora.cli.options import examples, json_option


@click.command(
    "export",
    epilog=examples(
        ("code2lora models export mini mini.gguf", "the decoder that mini's adapters are for"),
        ("llama-server -m mini.gguf --lora my.gguf", "run it, with an exported adapter"),
    ),
)
@click.argument("name")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_",
    default="gguf",
    show_default=True,
    type=click.Choice(["gguf"]),
    help="What to write.",
)
@click.option(
    "--dtype",
    default="f16",
    show_default=True,
    type=click.Choice(GGUF_DTYPES),
    help="The numbers of the matrices; vectors are always f32.",
)
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@json_option
def export(
    name: str, destination: Path, format_: str, dtype: str, force: bool, as_json: bool
) -> None:
    """Write a model's base decoder and tokenizer to the file DESTINATION, for llama.cpp and Ollama.

    Adapters go with it as `code2lora adapter export --format gguf` writes them.
    """
    from code2lora.adapters.files import placed_file
    from code2lora.adapters.gguf_base import write_base_gguf
    from code2lora.hypernetwork.models import resolve_model
    from code2lora.settings import load_settings

    model = resolve_model(name, load_settings().models_dir)
    written = destination.absolute()
    with placed_file(written, force=force) as file:
        write_base_gguf(model.base, file, name=model.name, dtype=dtype)
    if as_json:
        render.emit_json({"path": written, "model": model.name, "format": format_, "dtype": dtype})
    else:
        click.echo(written)
