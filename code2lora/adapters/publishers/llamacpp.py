"""Push to llama-server in router mode: a new GGUF file, its path in the preset, and a reload.

The server has no request that loads a file. In router mode it reads a preset file with a section
for each model; a changed section restarts that model's process, which is a gap of a model's
loading, and only for that model.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from code2lora.adapters.files import placed_file
from code2lora.adapters.publishers.http import Server
from code2lora.adapters.publishers.places import Generation, place, prune_copies
from code2lora.errors import UserError

_HEADER = re.compile(r"\s*\[\s*([^\]]*?)\s*\]\s*(?:[;#].*)?")
_LORA = re.compile(r"\s*(?:lora|LLAMA_ARG_LORA)\s*=")


def push_llamacpp(server: Server, name: str, generation: Generation) -> None:
    """Have the router's model of this name run with a generation.

    The GGUF files lie in `code2lora-adapters` beside the preset. Raises UserError when the preset
    has no such section and no base is named, or the server does not answer; the preset is then
    written all the same, so that the server's next start takes it.
    """
    target = server.target
    assert target.preset is not None
    preset = Path(target.preset).resolve()  # a link stays a link
    copy = place(generation, preset.parent / "code2lora-adapters", name, "gguf")
    before = _read(preset)
    after = with_adapter(before, name, copy, target.model)
    if after is None:
        raise UserError(
            f"{preset} has no section [{name}]",
            hint="`--model FILE.gguf` of `code2lora publish add` names the base for a new one; "
            "`code2lora models export` writes one",
        )
    if after != before:
        with placed_file(preset, force=True) as file:
            file.write_text(after, encoding="utf-8", newline="")
            if preset.exists():
                shutil.copymode(preset, file)
    answer = server.get("/models?reload=1")
    if answer.status != 200:
        raise UserError(
            f"{target.label} did not reload its presets: {answer.status}, {answer.message}",
            hint=f"start it with `llama-server --models-preset {preset}` and no model",
        )
    prune_copies(copy.parent, name, keep=target.keep, current=copy)


def with_adapter(text: str, name: str, lora: Path, model: str | None) -> str | None:
    """Return a preset file's text with an adapter in the section of this name.

    Everything else stays as it is. A section that is missing is added where `model`, the base's
    file, is given; else the result is None.
    """
    setting = f"lora = {lora}"
    lines = text.splitlines(keepends=True)
    begin = next((i for i, line in enumerate(lines) if _section(line) == name), None)
    if begin is None:
        if model is None:
            return None
        apart = "" if not text else "\n" if text.endswith("\n") else "\n\n"
        return f"{text}{apart}[{name}]\nmodel = {model}\n{setting}\n"
    body = range(begin + 1, len(lines))
    end = next((i for i in body if _section(lines[i]) is not None), len(lines))
    ending = "\r\n" if lines[begin].endswith("\r\n") else "\n"
    kept = [line for line in lines[begin + 1 : end] if not _LORA.match(line)]
    head = lines[begin] if lines[begin].endswith("\n") else lines[begin] + ending
    return "".join([*lines[:begin], head, setting + ending, *kept, *lines[end:]])


def _section(line: str) -> str | None:
    found = _HEADER.fullmatch(line.rstrip("\r\n"))
    return found[1] if found else None


def _read(preset: Path) -> str:
    try:
        with preset.open(encoding="utf-8", newline="") as stream:
            return stream.read()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{preset} cannot be read: {error}", hint="mend it, or name another with `--preset`"
        ) from error
