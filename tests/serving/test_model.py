from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from code2lora.errors import UserError
from code2lora.serving.model import BaseModel, resolve_device
from tests.serving.tiny import CONTEXT_TOKENS

AGAIN = "download or copy the model again"


@pytest.fixture
def copy(base_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_dir, tmp_path / "base"))


def change_config(path: Path, **changes: Any) -> None:
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | changes))


def test_a_loaded_model_knows_its_control_tokens(model: BaseModel) -> None:
    c = model.control
    found = (c.fim_prefix, c.fim_middle, c.fim_suffix, c.fim_pad, c.repo_name, c.file_sep)
    assert found == tuple(range(314, 320))
    assert model.end_ids == frozenset(range(311, 320))
    assert model.separator_id == 311
    assert model.begin_ids == ()
    assert model.context_tokens == CONTEXT_TOKENS
    assert not any(p.requires_grad for p in model.module.parameters())
    assert not model.module.training


def test_end_tokens_may_be_named_by_any_of_the_three_files(copy: Path) -> None:
    change_config(copy, eos_token_id=5)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 7]}))
    assert {5, 6, 7, 311} <= BaseModel.load(copy).end_ids


def test_weights_can_be_loaded_in_another_dtype(base_dir: Path) -> None:
    model = BaseModel.load(base_dir, dtype=torch.bfloat16)
    assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:size])


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_text(text)


def drop(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).unlink()


def drop_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (cut("model.safetensors", 1000), "Error while deserializing header: .*"),
        (cut("model.safetensors", 30_000), "Error while deserializing header: .*"),
        (drop("model.safetensors"), "Error no file named model.safetensors found .*"),
        (drop_tensor, "1 tensors are missing, the first is model.layers.1.mlp.up_proj.weight"),
        (write("config.json", "{"), "config.json cannot be read"),
        (write("config.json", "[]"), "config.json is not a JSON object"),
        (drop("tokenizer.json"), "tokenizer.json is missing"),
        (cut("tokenizer.json", 900), "tokenizer.json cannot be read"),
        (
            lambda p: change_config(p, hidden_size=16),
            r".*weight has shape \(.*32.*\), config.json asks for \(.*16.*\)",
        ),
        (lambda p: change_config(p, num_hidden_layers=3), "Class validation error .*"),
        (lambda p: change_config(p, max_position_embeddings=2), "max_position_embeddings is 2"),
        (write("generation_config.json", "7"), "generation_config.json is not a JSON object"),
    ],
)
def test_a_damaged_directory_is_refused_in_one_line(
    copy: Path, spoil: Callable[[Path], object], why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil(copy)
    with pytest.raises(UserError) as caught:
        BaseModel.load(copy)
    expected = rf"the model in {copy} is damaged or incomplete: {why}"
    assert re.fullmatch(expected, caught.value.message), caught.value.message
    assert caught.value.hint == AGAIN
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_of_another_model_is_refused(copy: Path) -> None:
    content = json.loads((copy / "tokenizer.json").read_text())
    last = content["added_tokens"][-1]
    content["added_tokens"].append(last | {"id": 320, "content": "<|one more|>"})
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="its tokenizer counts to id 320, the model knows 320"):
        BaseModel.load(copy)


@pytest.mark.parametrize("name", ["empty", "missing", "file"])
def test_what_is_no_model_directory_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        BaseModel.load(tmp_path / name)
    assert caught.value.message == (
        f"{tmp_path / name} is not a model directory: it has no config.json"
    )


def test_another_kind_of_model_is_refused(copy: Path) -> None:
    change_config(copy, model_type="t5")
    with pytest.raises(UserError) as caught:
        BaseModel.load(copy)
    assert caught.value.message == (
        f"{copy} holds a model of type 't5', not a decoder that is known here"
    )


def test_code_in_a_model_directory_is_never_run(copy: Path, tmp_path: Path) -> None:
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    change_config(
        copy,
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    with pytest.raises(UserError, match="holds a model of type 'evil'"):
        BaseModel.load(copy)
    change_config(copy, model_type="qwen2")
    BaseModel.load(copy)
    assert not (tmp_path / "ran").exists()


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("cuda:63", "warp"):
        with pytest.raises(UserError) as caught:
            resolve_device(name)
        assert caught.value.message == f"this machine has no device {name!r}"
