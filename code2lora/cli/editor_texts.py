"""The configuration by which each editor finds the completions of this machine.

Editors that can read the key's file are told where it is; the others get the key itself.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

TITLE = "Code2LoRA"
ZED_VARIABLE = "ZED_OPEN_AI_COMPATIBLE_EDIT_PREDICTION_API_KEY"

Syntax = Literal["yaml", "vim", "json", "lua", "shell"]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """What an editor has to know."""

    url: str
    """Of the server, without a path."""
    model: str
    """The model id to ask for, with the repository if there is one."""
    repository: str | None
    """By which the server knows it; None leaves it to the server to tell by file names."""
    key: str | None
    """None where the server asks for none."""
    key_file: Path

    @property
    def native_url(self) -> str:
        """The address for llama.cpp's clients, which can name a repository nowhere else."""
        return f"{self.url}/r/{self.repository}" if self.repository else self.url


@dataclass(frozen=True, kw_only=True)
class Editor:
    """One editor or plug-in."""

    name: str
    what: str
    usual_file: str
    """Where its configuration mostly is."""
    syntax: Syntax
    text: Callable[[Endpoint], str]
    """Returns all that is to be in the file, if it holds nothing else."""
    settings: Callable[[Endpoint], Mapping[tuple[str, ...], Any]] | None = None
    """`json`: returns path -> value of each setting."""
    holds_key: bool = False
    """Whether the key itself is in the text."""


def _continue(endpoint: Endpoint) -> str:
    return f"name: {TITLE}\nversion: 1.0.0\nschema: v1\nmodels:\n" + continue_model(endpoint)


def continue_model(endpoint: Endpoint) -> str:
    """Return the entry of Continue's list of models."""
    # JSON's strings are YAML's too, whatever is in them.
    return (
        f"  - name: {TITLE}\n"
        "    provider: openai\n"
        f"    model: {json.dumps(endpoint.model)}\n"
        f"    apiBase: {json.dumps(endpoint.url + '/v1')}\n"
        f"    apiKey: {json.dumps(endpoint.key or 'none')}\n"
        "    roles:\n"
        "      - autocomplete\n"
    )


def _llama_vim(endpoint: Endpoint) -> str:
    key = f"readfile({_vim(str(endpoint.key_file))})[0]" if endpoint.key else "''"
    return (
        '" before llama.vim is loaded\n'
        "let g:llama_config = get(g:, 'llama_config', {})\n"
        f"let g:llama_config.endpoint_fim = {_vim(endpoint.native_url + '/infill')}\n"
        f"let g:llama_config.model_fim = {_vim(endpoint.model)}\n"
        f"let g:llama_config.api_key = {key}\n"
    )


def _llama_vscode(endpoint: Endpoint) -> Mapping[tuple[str, ...], Any]:
    return {
        ("llama-vscode.endpoint",): endpoint.native_url,
        ("llama-vscode.api_key",): endpoint.key or "",
        ("llama-vscode.ask_install_llamacpp",): False,
    }


def _zed(endpoint: Endpoint) -> Mapping[tuple[str, ...], Any]:
    return {
        ("edit_predictions", "provider"): "open_ai_compatible_api",
        ("edit_predictions", "open_ai_compatible_api"): {
            "api_url": f"{endpoint.url}/v1/completions",
            "model": endpoint.model,
            "prompt_format": "qwen",
            "max_output_tokens": 64,
        },
    }


def _zed_text(endpoint: Endpoint) -> str:
    note = ""
    if endpoint.key is not None:
        command = f'{ZED_VARIABLE}="$(cat {shlex.quote(str(endpoint.key_file))})" zed'
        note = f"// the key is not a setting; start Zed with it:\n//   {command}\n"
    return note + _nested(_zed(endpoint))


def _minuet(endpoint: Endpoint) -> str:
    if endpoint.key is None:
        key = "      api_key = 'TERM', -- any variable that is set: no key is needed\n"
    else:
        key = (
            "      api_key = function()\n"
            f"        return vim.fn.readfile({_lua(str(endpoint.key_file))})[1]\n"
            "      end,\n"
        )
    return (
        "require('minuet').setup {\n"
        "  provider = 'openai_fim_compatible',\n"
        "  n_completions = 1,\n"
        "  context_window = 4000, -- characters\n"
        "  provider_options = {\n"
        "    openai_fim_compatible = {\n"
        f"      name = '{TITLE}',\n"
        f"      end_point = {_lua(endpoint.url + '/v1/completions')},\n"
        f"      model = {_lua(endpoint.model)},\n"
        f"{key}"
        "      stream = true,\n"
        "      optional = { max_tokens = 64 },\n"
        "    },\n"
        "  },\n"
        "}\n"
    )


def _openai(endpoint: Endpoint) -> str:
    key = "none"
    if endpoint.key is not None:
        key = f'"$(cat {shlex.quote(str(endpoint.key_file))})"'
    content = json.dumps({"model": endpoint.model, "prompt": "def main(", "max_tokens": 32})
    return (
        f"# model: {endpoint.model}\n"
        f"export OPENAI_BASE_URL={shlex.quote(endpoint.url + '/v1')}\n"
        f"export OPENAI_API_KEY={key}\n"
        'curl -sS "$OPENAI_BASE_URL/completions" \\\n'
        '  -H "Authorization: Bearer $OPENAI_API_KEY" \\\n'
        "  -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(content)}\n"
    )


EDITORS = {
    editor.name: editor
    for editor in (
        Editor(
            name="continue",
            what="Continue, for VS Code and JetBrains",
            usual_file="~/.continue/config.yaml",
            syntax="yaml",
            text=_continue,
            holds_key=True,
        ),
        Editor(
            name="llama.vim",
            what="llama.vim, for Vim and Neovim",
            usual_file="~/.vimrc",
            syntax="vim",
            text=_llama_vim,
        ),
        Editor(
            name="llama.vscode",
            what="llama.vscode, for VS Code",
            usual_file="~/.config/Code/User/settings.json",
            syntax="json",
            text=lambda endpoint: _nested(_llama_vscode(endpoint)),
            settings=_llama_vscode,
            holds_key=True,
        ),
        Editor(
            name="zed",
            what="Zed's edit predictions",
            usual_file="~/.config/zed/settings.json",
            syntax="json",
            text=_zed_text,
            settings=_zed,
        ),
        Editor(
            name="minuet",
            what="minuet-ai.nvim, for Neovim",
            usual_file="~/.config/nvim/after/plugin/minuet.lua",
            syntax="lua",
            text=_minuet,
        ),
        Editor(
            name="openai",
            what="any client of the OpenAI API, with an example for curl",
            usual_file="a script of yours",
            syntax="shell",
            text=_openai,
        ),
    )
}


def _nested(settings: Mapping[tuple[str, ...], Any]) -> str:
    """Return settings as one JSON object."""
    whole: dict[str, Any] = {}
    for path, value in settings.items():
        inner = whole
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = value
    return json.dumps(whole, indent=2) + "\n"


def _vim(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _lua(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
