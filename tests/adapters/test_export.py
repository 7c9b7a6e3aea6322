"""Copies in other layouts hold the same adapter, appear whole, and replace only what they may."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from code2lora.adapters.export import FORMATS, export
from code2lora.adapters.gguf_adapter import BLOCKS
from code2lora.adapters.gguf_base import write_base_gguf
from code2lora.adapters.load import load
from code2lora.adapters.publish import publish
from code2lora.errors import UserError
from code2lora.hypernetwork.config import block_of
from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.models import resolve_model
from code2lora.hypernetwork.projections import TARGETS
from tests.adapters.test_publish import METADATA
from tests.hypernetwork import tiny

MINI = resolve_model("mini", Path("/nowhere")).base
GGUF_FILE, FILE_DTYPES = "adapter.gguf", (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(params=FILE_DTYPES, ids=str)
def published(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    lora = tiny.random_lora()
    return publish(lora, METADATA, tmp_path / "root", n_layers=2, dtype=request.param).path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return folder


def deltas(lora: Lora) -> Iterator[tuple[int, str, Tensor]]:
    """Yield what the adapter adds to each matrix."""
    for i in range(tiny.N_LAYERS):
        for target in TARGETS:
            a, b = lora.layer(target, i)
            yield i, target, lora.scale * b.float() @ a.float()


def test_peft_is_the_files_themselves(published: Path, tmp_path: Path) -> None:
    written = export(published, tmp_path / "copy")
    for file in published.iterdir():
        assert (written / file.name).read_bytes() == file.read_bytes()


def test_mlx_is_the_transposed_pairs(published: Path, tmp_path: Path) -> None:
    """As mlx_lm computes: y + scale * (x @ lora_a) @ lora_b."""
    written = export(published, tmp_path / "mlx", "mlx")
    assert sorted(p.name for p in written.iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
    ]
    assert json.loads((written / "adapter_config.json").read_text()) == {
        "fine_tune_type": "lora",
        "model": "tiny",
        "num_layers": tiny.N_LAYERS,
        "lora_parameters": {
            "rank": tiny.RANK,
            "scale": tiny.ALPHA / tiny.RANK,
            "dropout": 0.0,
            "keys": [f"{block_of(target)}.{target}" for target in TARGETS],
        },
    }
    tensors = load_file(written / "adapters.safetensors")
    assert len(tensors) == 2 * 7 * tiny.N_LAYERS
    lora, _ = load(published)
    for i, target, delta in deltas(lora):
        module = f"model.layers.{i}.{block_of(target)}.{target}"
        a, b = tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]
        assert a.dtype == b.dtype == lora.a[target].dtype
        x = torch.randn(3, a.shape[0])
        wanted = x @ delta.T
        torch.testing.assert_close(tiny.ALPHA / tiny.RANK * (x @ a.float()) @ b.float(), wanted)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_gguf_is_the_pairs_as_llama_cpp_names_them(
    published: Path, base: Path, tmp_path: Path, dtype: str
) -> None:
    gguf = pytest.importorskip("gguf")
    written = export(published, tmp_path / GGUF_FILE, "gguf", base_dir=base, dtype=dtype)
    reader = gguf.GGUFReader(written)
    fields = {name: _value(field) for name, field in reader.fields.items()}
    assert {k: v for k, v in fields.items() if not k.startswith("GGUF.")} == {
        "general.architecture": "qwen2",
        "general.type": "adapter",
        "general.name": published.name,
        "adapter.type": "lora",
        "adapter.lora.alpha": tiny.ALPHA,
        "code2lora.repository": METADATA.repository,
        "code2lora.commit": METADATA.commit,
        "code2lora.base_model": "tiny",
        "code2lora.weights_sha256": json.loads((published / "code2lora.json").read_text())[
            "weights"
        ]["sha256"],
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * 7 * tiny.N_LAYERS
    lora, _ = load(published)
    tolerance = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8}[dtype]
    for i in range(tiny.N_LAYERS):
        for target in TARGETS:
            for side, wanted in zip("ab", lora.layer(target, i), strict=True):
                tensor = tensors[f"blk.{i}.{BLOCKS[target]}.weight.lora_{side}"]
                assert tensor.tensor_type.name.lower() == dtype
                found = _numbers(tensor)
                torch.testing.assert_close(found, wanted.float(), rtol=tolerance, atol=1e-7)


def test_a_shared_pair_is_written_for_each_layer(base: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = publish(tiny.random_lora(n_layers=1), METADATA, tmp_path / "root", n_layers=2).path
    reader = gguf.GGUFReader(export(path, tmp_path / "a.gguf", "gguf", base_dir=base))
    tensors = {t.name: _numbers(t) for t in reader.tensors}
    assert torch.equal(tensors["blk.0.attn_q.weight.lora_a"], tensors["blk.1.attn_q.weight.lora_a"])


def test_equal_adapters_are_equal_files(published: Path, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    one, two = (
        export(published, tmp_path / f"{n}.gguf", "gguf", base_dir=base).read_bytes() for n in "ab"
    )
    assert one == two


def test_numbers_that_do_not_fit_are_refused(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    lora = tiny.random_lora()
    lora.b["q_proj"][0, 0, 0] = 1e6
    path = publish(lora, METADATA, tmp_path / "root", n_layers=2).path
    with pytest.raises(UserError, match=r"blk\.0\.attn_q\.weight\.lora_b has numbers that f16"):
        export(path, tmp_path / "a.gguf", "gguf", base_dir=base)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "root"]
    export(path, tmp_path / "a.gguf", "gguf", base_dir=base, dtype="f32")


def test_another_architecture_is_refused(published: Path, base: Path, tmp_path: Path) -> None:
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="'llama', but GGUF files are made for 'qwen2' alone"):
        export(published, tmp_path / "a.gguf", "gguf", base_dir=base)


@pytest.mark.parametrize("format_", FORMATS)
def test_what_is_there_is_replaced_only_when_asked(
    published: Path, base: Path, tmp_path: Path, format_: str
) -> None:
    if format_ == "gguf":
        pytest.importorskip("gguf")
    destination = tmp_path / "there"
    export(published, destination, format_, base_dir=base)
    before = _content(destination)
    with pytest.raises(UserError, match="exists already") as refused:
        export(published, destination, format_, base_dir=base)
    assert refused.value.hint is not None and refused.value.hint.endswith("or add `--force`")
    other = publish(tiny.random_lora(seed=8), METADATA, tmp_path / "root", n_layers=2).path
    export(other, destination, format_, base_dir=base, force=True)
    assert _content(destination) != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "root", "there"]


@pytest.mark.parametrize("format_", FORMATS)
def test_force_spares_what_no_export_wrote(
    published: Path, base: Path, tmp_path: Path, format_: str
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    (tmp_path / "link").symlink_to(folder)
    for destination in (folder, tmp_path / "link"):
        with pytest.raises(UserError, match="exists already"):
            export(published, destination, format_, base_dir=base, force=True)
    assert (folder / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("format_", FORMATS)
def test_a_failure_leaves_nothing(
    published: Path, base: Path, tmp_path: Path, format_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if format_ == "gguf":
        pytest.importorskip("gguf")

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        export(published, place / "a", format_, base_dir=base)
    assert list(place.iterdir()) == []


def test_damaged_weights_are_refused(published: Path, base: Path, tmp_path: Path) -> None:
    weights = published / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for damaged, complaint in (
        (whole[:-1], "is damaged: it is cut short"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "has changed since it was published"),
        (b"\xff" * 8 + whole[8:], "is damaged: its header does not fit in it"),
        (b"", "is damaged: its header does not fit in it"),
    ):
        weights.write_bytes(damaged)
        for format_ in ("gguf", "mlx"):
            with pytest.raises(UserError, match=complaint):
                export(published, tmp_path / "copy", format_, base_dir=base)


def test_the_bundled_base_keeps_every_number_and_token(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "mini.gguf"
    write_base_gguf(MINI, file, name="mini", dtype="f32")
    reader = gguf.GGUFReader(file)
    tensors = {tensor.name: _numbers(tensor) for tensor in reader.tensors}
    weights = {k: v.float() for k, v in load_file(MINI / "model.safetensors").items()}
    assert len(tensors) == len(weights)
    assert torch.equal(tensors["token_embd.weight"], weights["model.embed_tokens.weight"])
    assert torch.equal(tensors["output_norm.weight"], weights["model.norm.weight"])
    for ours, theirs in (
        ("mlp.down_proj.weight", "ffn_down.weight"),
        ("self_attn.k_proj.bias", "attn_k.bias"),
        ("self_attn.q_proj.weight", "attn_q.weight"),
        ("post_attention_layernorm.weight", "ffn_norm.weight"),
    ):
        assert torch.equal(tensors[f"blk.3.{theirs}"], weights[f"model.layers.3.{ours}"])
    values = {name: _value(field) for name, field in reader.fields.items()}
    config = json.loads((MINI / "config.json").read_text())
    assert values["qwen2.block_count"] == config["num_hidden_layers"]
    assert values["qwen2.rope.freq_base"] == config["rope_parameters"]["rope_theta"]
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    vocabulary = json.loads((MINI / "tokenizer.json").read_text())
    ids = vocabulary["model"]["vocab"] | {t["content"]: t["id"] for t in vocabulary["added_tokens"]}
    assert values["tokenizer.ggml.tokens"] == sorted(ids, key=lambda token: int(ids[token]))
    assert values["tokenizer.ggml.token_type"][8180:] == [1, 1, 1, 3, 3, 3, 4, 4, 4, 4, 4, 4]
    assert values["tokenizer.ggml.fim_mid_token_id"] == ids["<|fim_middle|>"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"use_sliding_window": True}, "sliding window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"rotary angles \(yarn\)"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"num_hidden_layers": 7}, r"lacks the tensor model\.layers\.6\."),
        ({"vocab_size": 8000}, "has more tokens than the model, which has 8000"),
    ],
)
def test_a_base_that_llama_cpp_would_compute_otherwise(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(MINI, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=complaint):
        write_base_gguf(base, tmp_path / "a.gguf", name="x")


def test_a_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(MINI, base)
    text = (base / "tokenizer.json").read_text().replace("\\\\p{N}|", "\\\\p{N}{1,3}|")
    (base / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="no tokenizer of Qwen2's kind"):
        write_base_gguf(base, tmp_path / "a.gguf", name="x")


def _content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: file.read_bytes() for file in files}


def _value(field: Any) -> Any:
    return field.contents()


def _numbers(tensor: Any) -> Tensor:
    """Return a tensor of a GGUF file in float32."""
    data = np.array(tensor.data)
    if tensor.tensor_type.name == "BF16":
        data = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    shape = tuple(int(n) for n in reversed(tensor.shape))
    return torch.from_numpy(data.astype(np.float32).reshape(shape))
