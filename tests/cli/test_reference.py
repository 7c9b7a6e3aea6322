"""The reference is what the commands say, and every command says enough."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from code2lora.cli.app import COMMANDS, cli
from code2lora.cli.reference import render_reference, walk
from tests.cli.conftest import Run

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"
ALL = [(name, ctx) for name, ctx in walk(cli)]


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_reference(cli), (
        "run `python docs/generate_reference.py`"
    )


def test_the_page_has_a_section_for_each_command() -> None:
    page = render_reference(cli)
    assert len(ALL) > 25
    for name, _ in ALL:
        assert f"# {name}\n" in page


@pytest.mark.parametrize(("name", "ctx"), ALL, ids=[name for name, _ in ALL])
def test_every_command_has_a_purpose_and_an_example(name: str, ctx: click.Context) -> None:
    command = ctx.command
    assert command.help and command.get_short_help_str(200).endswith((".", "?"))
    assert command.epilog and command.epilog.startswith("\b\nExamples:\n")
    assert "code2lora" in command.epilog
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_listed_command_is_there(code2lora: Run, name: str) -> None:
    done = code2lora(name, "--help")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith(f"Usage: code2lora {name}")
    assert "Examples:" in done.out


def test_help_lists_every_command(code2lora: Run) -> None:
    out = code2lora("--help").out
    rows = re.findall(r"^  (\w+)  ", out.partition("Commands:\n")[2], re.MULTILINE)
    assert rows[: len(COMMANDS)] == list(COMMANDS)
    assert code2lora("-h").out == out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shells_complete(code2lora: Run, shell: str) -> None:
    done = code2lora("completion", shell)
    assert done.status == 0
    assert "_CODE2LORA_COMPLETE" in done.out
