"""`code2lora completion`: the script that makes a shell complete our commands."""

from __future__ import annotations

import click

from code2lora.cli.options import examples

_VARIABLE = "_CODE2LORA_COMPLETE"


@click.command(
    "completion",
    epilog=examples(
        ('eval "$(code2lora completion bash)"', "in ~/.bashrc"),
        ('eval "$(code2lora completion zsh)"', "in ~/.zshrc, after compinit"),
        ("code2lora completion fish | source", "in ~/.config/fish/config.fish"),
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script for the TAB key in a shell."""
    from click.shell_completion import get_completion_class

    completer = get_completion_class(shell)
    assert completer is not None
    root = ctx.find_root()
    click.echo(completer(root.command, {}, "code2lora", _VARIABLE).source())
