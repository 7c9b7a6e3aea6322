"""Directories that are damaged, foreign or for another base model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from code2lora.adapters.load import load
from code2lora.adapters.publish import publish
from code2lora.errors import UserError
from tests.adapters.test_publish import METADATA
from tests.hypernetwork import tiny

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return publish(tiny.random_lora(), METADATA, tmp_path, n_layers=2).path


def _message(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return caught.value.message


def _edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def test_another_base_model(adapter: Path) -> None:
    base = tiny.base_config()
    start = "the adapter was made for tiny, but the base model is "

    assert _message(lambda: load(adapter, replace(base, id="big"))) == start + "big"
    deeper = replace(base, n_layers=3)
    assert _message(lambda: load(adapter, deeper)) == start + "tiny with other weights"
    wider = replace(base, dims=base.dims | {"q_proj": (16, 19)})
    assert _message(lambda: load(adapter, wider)) == start + "tiny with other dimensions"


def test_base_model_with_another_fingerprint(tmp_path: Path) -> None:
    metadata = replace(METADATA, base_fingerprint="1" * 64)
    path = publish(tiny.random_lora(), metadata, tmp_path, n_layers=2).path
    base = tiny.base_config()

    load(path, base)
    load(path, replace(base, fingerprint="1" * 64))
    assert _message(lambda: load(path, replace(base, fingerprint="2" * 64))) == (
        "the adapter was made for tiny, but the base model is tiny with other weights"
    )


def test_not_an_adapter_directory(tmp_path: Path, adapter: Path) -> None:
    (tmp_path / "empty").mkdir()

    assert _message(lambda: load(tmp_path / "empty")) == (
        f"{tmp_path / 'empty'} is not an adapter directory: code2lora.json is missing"
    )
    (adapter / WEIGHTS).unlink()
    assert _message(lambda: load(adapter)) == (
        f"{adapter} is not an adapter directory: {WEIGHTS} is missing"
    )
    (adapter / "adapter_config.json").unlink()
    assert _message(lambda: load(adapter)) == (
        f"{adapter} is not an adapter directory: adapter_config.json is missing"
    )


def test_damaged_files(adapter: Path) -> None:
    file = adapter / WEIGHTS
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    assert _message(lambda: load(adapter)).startswith(f"{file} is damaged: ")

    metadata = adapter / "code2lora.json"
    text = metadata.read_text()
    metadata.write_text(text[:30])
    assert _message(lambda: load(adapter)).startswith(f"{metadata} cannot be read: ")
    metadata.write_text("[]")
    assert _message(lambda: load(adapter)) == f"{metadata} holds a list, expected an object"
    metadata.write_text(text)
    _edit(metadata, lambda values: values["origin"].pop("commit"))
    assert _message(lambda: load(adapter)) == f"{metadata} lacks 'commit'"
    _edit(metadata, lambda values: values.update(format=2))
    assert _message(lambda: load(adapter)) == f"{adapter} has adapter format 2, expected 1"


def test_configuration_that_does_not_fit(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    _edit(file, lambda values: values.update(r=6))
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    assert _message(lambda: load(adapter)) == (
        f"{adapter / WEIGHTS}: {name} has shape (5, 20), "
        "which is not of rank 6 or not that of layer 0"
    )
    _edit(file, lambda values: values.update(target_modules=["q_proj"]))
    assert _message(lambda: load(adapter)) == (
        f"{file} adapts ['q_proj'], expected ['down_proj', 'gate_proj', 'k_proj', 'o_proj', "
        "'q_proj', 'up_proj', 'v_proj']"
    )
    _edit(file, lambda values: values.pop("r"))
    assert _message(lambda: load(adapter)) == f"{file} has no usable 'r'"


def test_tensors_that_do_not_fit(adapter: Path) -> None:
    file = adapter / WEIGHTS
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"

    save_file({k: v for k, v in tensors.items() if k != name}, file)
    assert _message(lambda: load(adapter)) == f"{file} lacks the tensor {name}"
    save_file(tensors | {"extra": torch.ones(1)}, file)
    assert _message(lambda: load(adapter)) == f"{file} holds an unknown tensor extra"
    save_file(tensors | {name: torch.ones(17, 5).bfloat16()}, file)
    assert _message(lambda: load(adapter)) == (
        f"{file}: {name} has shape (17, 5), which is not of rank 5 or not that of layer 0"
    )
