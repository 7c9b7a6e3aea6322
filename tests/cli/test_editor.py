"""`editor`: whole outputs, merges that keep the user's settings, and the port."""

from __future__ import annotations

import json
import socket
import stat
import subprocess
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer

from code2lora.cli.editor import public_model_id, served_name
from code2lora.cli.editor_files import merged
from code2lora.cli.editor_texts import EDITORS, Endpoint
from code2lora.cli.place import open_place
from code2lora.hypernetwork.models import resolve_model
from code2lora.serving.model import ControlTokens
from code2lora.serving.names import is_repository, public_id
from code2lora.settings import EDITOR_PORT, Settings, config_file
from tests.cli.conftest import Known, Run
from tests.cli.models import make_model

MODEL = "code2lora/qwen2.5-coder-mini"
ENDPOINT = Endpoint(
    url="http://127.0.0.1:8712",
    model=f"{MODEL}@app",
    repository="app",
    key="the-key",
    key_file=Path("/home/o'hara/http-token"),
)

OUTPUTS = {
    "continue": """\
        name: Code2LoRA
        version: 1.0.0
        schema: v1
        models:
          - name: Code2LoRA
            provider: openai
            model: "code2lora/qwen2.5-coder-mini@app"
            apiBase: "http://127.0.0.1:8712/v1"
            apiKey: "the-key"
            roles:
              - autocomplete
        """,
    "llama.vim": """\
        " before llama.vim is loaded
        let g:llama_config = get(g:, 'llama_config', {})
        let g:llama_config.endpoint_fim = 'http://127.0.0.1:8712/r/app/infill'
        let g:llama_config.model_fim = 'code2lora/qwen2.5-coder-mini@app'
        let g:llama_config.api_key = readfile('/home/o''hara/http-token')[0]
        """,
    "llama.vscode": """\
        {
          "llama-vscode.endpoint": "http://127.0.0.1:8712/r/app",
          "llama-vscode.api_key": "the-key",
          "llama-vscode.ask_install_llamacpp": false
        }
        """,
    "zed": """\
        // the key is not a setting; start Zed with it:
        //   ZED_OPEN_AI_COMPATIBLE_EDIT_PREDICTION_API_KEY="$(cat '/home/o'"'"'hara/http-token')" zed
        {
          "edit_predictions": {
            "provider": "open_ai_compatible_api",
            "open_ai_compatible_api": {
              "api_url": "http://127.0.0.1:8712/v1/completions",
              "model": "code2lora/qwen2.5-coder-mini@app",
              "prompt_format": "qwen",
              "max_output_tokens": 64
            }
          }
        }
        """,  # noqa: E501
    "minuet": """\
        require('minuet').setup {
          provider = 'openai_fim_compatible',
          n_completions = 1,
          context_window = 4000, -- characters
          provider_options = {
            openai_fim_compatible = {
              name = 'Code2LoRA',
              end_point = 'http://127.0.0.1:8712/v1/completions',
              model = 'code2lora/qwen2.5-coder-mini@app',
              api_key = function()
                return vim.fn.readfile('/home/o\\'hara/http-token')[1]
              end,
              stream = true,
              optional = { max_tokens = 64 },
            },
          },
        }
        """,
    "openai": """\
        # model: code2lora/qwen2.5-coder-mini@app
        export OPENAI_BASE_URL=http://127.0.0.1:8712/v1
        export OPENAI_API_KEY="$(cat '/home/o'"'"'hara/http-token')"
        curl -sS "$OPENAI_BASE_URL/completions" \\
          -H "Authorization: Bearer $OPENAI_API_KEY" \\
          -H 'Content-Type: application/json' \\
          -d '{"model": "code2lora/qwen2.5-coder-mini@app", "prompt": "def main(", "max_tokens": 32}'
        """,  # noqa: E501
}
WITHOUT_KEY = {
    "continue": '    apiKey: "none"\n',
    "llama.vim": "let g:llama_config.api_key = ''\n",
    "llama.vscode": '  "llama-vscode.api_key": "",\n',
    "minuet": "      api_key = 'TERM', -- any variable that is set: no key is needed\n",
    "openai": "export OPENAI_API_KEY=none\n",
    "zed": '{\n  "edit_predictions"',
}


def test_every_editor_is_here() -> None:
    assert set(OUTPUTS) == set(EDITORS) == set(WITHOUT_KEY)


@pytest.mark.parametrize("name", EDITORS)
def test_whole_outputs(name: str) -> None:
    assert EDITORS[name].text(ENDPOINT) == textwrap.dedent(OUTPUTS[name])


@pytest.mark.parametrize("name", EDITORS)
def test_without_a_key(name: str) -> None:
    values = {**vars(ENDPOINT), "key": None}
    text = EDITORS[name].text(Endpoint(**values))
    assert WITHOUT_KEY[name] in text
    assert "http-token" not in text and "the-key" not in text
    if name == "zed":
        assert text.startswith("{")


@pytest.mark.parametrize("name", EDITORS)
def test_the_key_is_in_the_text_only_where_it_is_said(name: str) -> None:
    assert ("the-key" in EDITORS[name].text(ENDPOINT)) == EDITORS[name].holds_key


# -- the command ------------------------------------------------------------------------------


def test_the_list(code2lora: Run) -> None:
    done = code2lora("editor")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].split() == ["EDITOR", "WHAT", "USUAL", "FILE"]
    assert [line.split()[0] for line in lines[1:]] == list(EDITORS)
    listed = json.loads(code2lora("editor", "--json").out)
    assert listed[0] == {
        "name": "continue",
        "what": "Continue, for VS Code and JetBrains",
        "usual_file": "~/.continue/config.yaml",
    }
    assert code2lora("editor", "--write", "a").status == 2
    assert code2lora("editor", "emacs").status == 2


def test_the_repository_here_is_named(
    code2lora: Run, known: Known, here: Path, home: Settings
) -> None:
    done = code2lora("editor", "zed")
    assert (done.status, done.out.count(f'"model": "{MODEL}@repo"')) == (0, 1)
    assert done.err == (
        f"no port is open: put `http_port = {EDITOR_PORT}` into {config_file()}, then "
        "`code2lora daemon restart`; `--write` does the first\n"
    )
    assert stat.S_IMODE(home.http_token_file.stat().st_mode) == 0o600
    values = json.loads(code2lora("editor", "continue", "--json").out)
    assert values["text"] == yaml_of(home, f"{MODEL}@repo")
    assert values | {"text": ""} == {
        "editor": "continue",
        "url": f"http://127.0.0.1:{EDITOR_PORT}",
        "model": f"{MODEL}@repo",
        "key_file": str(home.http_token_file),
        "text": "",
        "usual_file": "~/.continue/config.yaml",
    }


def yaml_of(home: Settings, model: str) -> str:
    key = home.http_token_file.read_text().strip()
    text = textwrap.dedent(OUTPUTS["continue"])
    return text.replace("the-key", key).replace(f"{MODEL}@app", model)


def test_two_repositories_of_one_name_are_told_apart_by_id(
    code2lora: Run, known: Known, here: Path, tmp_path: Path
) -> None:
    known.store.add_repository("f" * 32, path=str(tmp_path / "other" / "repo"), name="repo")
    assert f"{MODEL}@{known.repository_id}" in code2lora("editor", "zed").out


def test_outside_a_repository_none_is_named(
    code2lora: Run, home: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = code2lora("editor", "continue")
    assert (done.status, done.out) == (0, yaml_of(home, MODEL))
    assert done.err.startswith("it holds your key: keep it out of what others can read\n")
    assert not (home.state_dir / "state.db").exists()
    named = code2lora("editor", "continue", "--repo", tmp_path)
    assert named.status == 1 and "error: " in named.err


def test_writing_opens_the_port_and_keeps_the_settings(
    code2lora: Run, home: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_file()
    config.parent.mkdir(parents=True)
    config.write_text("# mine\nidle_exit_s = 60\nhttp_port = 0  # closed\n")
    target = tmp_path / "config.yaml"
    done = code2lora("editor", "continue", "--write", target)
    assert (done.status, done.out) == (0, f"{target}\n")
    assert done.err == (
        f"{config}: http_port = {EDITOR_PORT}\n"
        f"nobody listens on port {EDITOR_PORT} yet: `code2lora daemon start`\n"
    )
    assert config.read_text() == f"# mine\nidle_exit_s = 60\nhttp_port = {EDITOR_PORT}\n"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    again = code2lora("editor", "continue", "--write", target)
    assert again.err.startswith("it says so already\n") and len(list(tmp_path.iterdir())) == 1
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        config.write_text(f"http_port = {port}\n")
        done = code2lora("editor", "continue", "--write", target)
    assert done.err == f"as it was: {target}.1.bak\n"
    assert f"http://127.0.0.1:{port}/v1" in target.read_text()
    assert config.read_text() == f"http_port = {port}\n"


def test_a_new_configuration_file(
    code2lora: Run, home: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert code2lora("editor", "zed", "--write", "settings.json").status == 0
    assert config_file().read_text() == f"http_port = {EDITOR_PORT}\n"
    monkeypatch.setenv("CODE2LORA_HTTP_PORT", "0")
    done = code2lora("editor", "zed", "--write", "other.json")
    assert done.status == 1 and "but the environment closes it" in done.err


def test_no_key_where_none_is_asked_for(
    code2lora: Run, home: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODE2LORA_HTTP_AUTH", "none")
    done = code2lora("editor", "continue")
    assert WITHOUT_KEY["continue"] in done.out and "holds your key" not in done.err
    assert not home.http_token_file.exists()


def test_the_model_is_called_as_the_server_calls_it(tmp_path: Path) -> None:
    mini = resolve_model("mini", tmp_path).base
    control = ControlTokens.find(Tokenizer.from_file(str(mini / "tokenizer.json")))
    assert public_model_id(mini.parent) == public_id("code2lora/mini", control) == MODEL
    for name in ("My-Qwen-Coder", "plain"):
        model = make_model(tmp_path / name)
        (model / "base" / "tokenizer.json").write_text("{}")
        nothing = ControlTokens(None, None, None, None, None, None)
        assert public_model_id(model) == public_id(f"code2lora/{name}", nothing)


@pytest.mark.parametrize("name", ["generic", "a b", "ok-1.2", "-x", "a:b", "ü"])
def test_names_are_what_the_server_takes(name: str, known: Known) -> None:
    with open_place(known.repo.path) as place:
        found = served_name(replace(place, repository=replace(place.repository, name=name)))
    takes = is_repository(name) and ":" not in name  # which would name a worktree
    assert found == (name if takes else known.repository_id)


def test_the_example_for_curl_is_a_script(tmp_path: Path) -> None:
    key = tmp_path / "it's the key"
    key.write_text("abc\n")
    values = {**vars(ENDPOINT), "key_file": key}
    script = "curl() { printf '%s\\n' \"$@\"; }\n" + EDITORS["openai"].text(Endpoint(**values))
    done = subprocess.run(["sh", "-eu"], input=script, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[:4] == [
        "-sS",
        "http://127.0.0.1:8712/v1/completions",
        "-H",
        "Authorization: Bearer abc",
    ]
    assert json.loads(done.stdout.splitlines()[-1])["model"] == ENDPOINT.model


# -- merging ----------------------------------------------------------------------------------


CONTINUE = """\
name: Mine   # a comment
version: 1.0.0
schema: v1
models:  # all of them
  # chat
  - name: Big
    provider: anthropic
    roles: [chat]
rules:
  - be brief
"""


def test_continue_keeps_other_models_and_comments() -> None:
    once = merged(EDITORS["continue"], ENDPOINT, CONTINUE)
    entry = "".join(textwrap.dedent(OUTPUTS["continue"]).splitlines(keepends=True)[4:])
    at = CONTINUE.index("  # chat")
    assert once == CONTINUE[:at] + entry + CONTINUE[at:]
    assert merged(EDITORS["continue"], ENDPOINT, once) == once
    other = Endpoint(**{**vars(ENDPOINT), "model": "code2lora/x"})
    again = merged(EDITORS["continue"], other, once)
    assert again == once.replace(ENDPOINT.model, "code2lora/x")


@pytest.mark.parametrize(
    "text",
    [
        "name: a\nversion: 1.0.0\nschema: v1\n",
        "name: a\nmodels:\n- name: Big\n  provider: x\n",
        "name: a\nmodels:\n",
        "name: a",
    ],
)
def test_other_ways_to_write_the_list(text: str) -> None:
    after = yaml.safe_load(merged(EDITORS["continue"], ENDPOINT, text))
    before = yaml.safe_load(text)
    assert after["models"][0]["model"] == ENDPOINT.model
    assert after["models"][1:] == (before.get("models") or [])


@pytest.mark.parametrize(
    "text", ["models: [{name: Big}]\n", "- a\n", "a: [\n", "models: &m\n  - name: Big\nx: *m\n"]
)
def test_a_list_that_is_not_understood_is_left_alone(
    text: str, code2lora: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(text)
    done = code2lora("editor", "continue", "--write", "config.yaml")
    assert done.status == 1 and "cannot be merged with: it" in done.err
    assert "hint: `code2lora editor continue` prints what to put into it\n" in done.err
    assert Path("config.yaml").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


ZED = """\
// Zed settings
{
  "theme": "One \\"Dark\\", // not a comment",
  /* predictions */
  "edit_predictions": {
    "mode": "subtle", // kept
    "disabled_globs": ["*.env", "}"],
    "provider": "zed",
  },
  "vim_mode": true,
}
"""


def test_zed_keeps_comments_and_neighbours() -> None:
    once = merged(EDITORS["zed"], ENDPOINT, ZED)
    value = json.dumps(
        {
            "api_url": "http://127.0.0.1:8712/v1/completions",
            "model": ENDPOINT.model,
            "prompt_format": "qwen",
            "max_output_tokens": 64,
        },
        indent=2,
    ).replace("\n", "\n    ")
    assert once == ZED.replace('"provider": "zed"', '"provider": "open_ai_compatible_api"').replace(
        '"edit_predictions": {\n',
        f'"edit_predictions": {{\n    "open_ai_compatible_api": {value},\n',
    )
    assert merged(EDITORS["zed"], ENDPOINT, once) == once


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", {}),
        ("{ }\n", {}),
        ('{"a": 1}', {"a": 1}),
        ('{"a": [1, {"b": "}"}], "edit_predictions": null}', {"a": [1, {"b": "}"}]}),
        ('// {\n{"edit_predictions": {}}', {}),
        ('{"edit_predictions": {"open_ai_compatible_api": {"model": "x"}}, "a": {}}', {"a": {}}),
    ],
)
def test_json_in_other_dress(text: str, expected: object) -> None:
    after = merged(EDITORS["zed"], ENDPOINT, text)
    bare = "\n".join(line for line in after.splitlines() if not line.startswith("//"))
    values = json.loads(bare)
    ours = values.pop("edit_predictions")
    assert values == expected
    assert ours["provider"] == "open_ai_compatible_api"
    assert ours["open_ai_compatible_api"]["model"] == ENDPOINT.model
    assert merged(EDITORS["zed"], ENDPOINT, after) == after


def test_vscode_settings(tmp_path: Path) -> None:
    text = (
        '{\n    "editor.fontSize": 12,\n    "llama-vscode.endpoint": "http://x:8012", // old\n}\n'
    )
    after = merged(EDITORS["llama.vscode"], ENDPOINT, text)
    assert after == (
        "{\n"
        '  "llama-vscode.api_key": "the-key",\n'
        '  "llama-vscode.ask_install_llamacpp": false,\n'
        '    "editor.fontSize": 12,\n'
        f'    "llama-vscode.endpoint": "{ENDPOINT.native_url}", // old\n'
        "}\n"
    )


@pytest.mark.parametrize("text", ["[]", "nonsense{", '{"a": 1', '{"a" 1}', "// only a comment"])
def test_json_that_is_not_understood(text: str) -> None:
    with pytest.raises(ValueError):
        merged(EDITORS["zed"], ENDPOINT, text)


@pytest.mark.parametrize(("name", "sign"), [("llama.vim", '"'), ("minuet", "--"), ("openai", "#")])
def test_a_block_of_ours_is_replaced_and_nothing_else(name: str, sign: str) -> None:
    block = f"{sign} code2lora begin\n{EDITORS[name].text(ENDPOINT)}{sign} code2lora end\n"
    assert merged(EDITORS[name], ENDPOINT, "") == block
    once = merged(EDITORS[name], ENDPOINT, "first\nlast")
    assert once == f"first\nlast\n{block}"
    assert merged(EDITORS[name], ENDPOINT, once) == once
    other = Endpoint(**{**vars(ENDPOINT), "model": "code2lora/\\1"})
    again = merged(EDITORS[name], other, once + "after\n")
    assert again == merged(EDITORS[name], other, "first\nlast") + "after\n"


def test_a_second_setup_of_minuet_is_refused() -> None:
    with pytest.raises(ValueError, match="sets minuet up already"):
        merged(EDITORS["minuet"], ENDPOINT, "require('minuet').setup { provider = 'codestral' }\n")


def test_links_modes_and_backups(
    code2lora: Run, home: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    real = tmp_path / "dotfiles.json"
    real.write_text('{"a": 1}')
    real.chmod(0o644)
    Path("settings.json").symlink_to(real)
    for number in (1, 2):
        monkeypatch.setenv("CODE2LORA_HTTP_PORT", str(8712 + number))
        done = code2lora("editor", "llama.vscode", "--write", "settings.json")
        assert done.status == 0
    assert Path("settings.json").is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o600  # it holds the key now
    assert Path("dotfiles.json.1.bak").read_text() == '{"a": 1}'
    assert "8713" in Path("dotfiles.json.2.bak").read_text()
    assert json.loads(real.read_text())["a"] == 1
