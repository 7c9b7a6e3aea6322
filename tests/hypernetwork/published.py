"""A tiny published model: three repositories in the layouts of the real ones, random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from code2lora.hypernetwork.catalogue import CATALOGUE, Pullable
from code2lora.hypernetwork.config import GruConfig, HeadConfig
from code2lora.hypernetwork.gru_family import GruFamily
from code2lora.hypernetwork.heads import build_head
from tests.hypernetwork import tiny
from tests.hypernetwork.mirror import Mirror, Repository

WIDTH = 12
HIDDEN = 10
NAME = "qwen2.5-coder-1.5b"
STATIC = "qwen2.5-coder-1.5b-static"


def entry(name: str = NAME) -> Pullable:
    """The catalogue's own entry, without the digests of files that are not so small."""
    real = CATALOGUE[name]
    return replace(
        real,
        base=replace(real.base, n_bytes=100_000),
        encoder=replace(real.encoder, n_bytes=100_000, sha256={}),
        hypernetwork=replace(real.hypernetwork, n_bytes=200_000, sha256={}),
    )


def publish(mirror: Mirror, root: Path) -> None:
    """Put the repositories of both entries on a mirror."""
    made = entry()
    static = entry(STATIC).hypernetwork
    mirror.repositories[static.repository] = Repository(
        static.revision, _released_static(root / "static")
    )
    contents = {
        made.base.repository: _base(root / "base"),
        made.encoder.repository: _encoder(root / "encoder"),
        made.hypernetwork.repository: _released(root / "released"),
    }
    for source in made.parts.values():
        mirror.repositories[source.repository] = Repository(
            source.revision, contents[source.repository], licence="apache-2.0"
        )
    mirror.repositories[made.hypernetwork.repository].licence = None


def _base(path: Path) -> dict[str, bytes]:
    tiny.decoder().save_pretrained(path)
    _wrapped_tokenizer().save_pretrained(path)
    return _files(path) | {
        "README.md": b"# a decoder\n",
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "pytorch_model.bin": b"\x80never fetched",
        "onnx/model.onnx": b"never fetched",
    }


def _encoder(path: Path) -> dict[str, bytes]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    parts = path.with_name("encoder-parts")
    wrapped = _wrapped_tokenizer()
    wrapped.save_pretrained(parts)
    torch.manual_seed(2)
    config = Qwen3Config(
        vocab_size=len(wrapped),
        hidden_size=WIDTH,
        intermediate_size=14,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        max_position_embeddings=4096,
    )
    Qwen3Model(config).save_pretrained(parts)
    pooling = Pooling(WIDTH, pooling_mode="lasttoken")
    modules = [Transformer(str(parts)), pooling, Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(path), create_model_card=False)
    return _files(path) | {"README.md": b"# an encoder\n"}


def _released(path: Path) -> dict[str, bytes]:
    path.mkdir(parents=True)
    torch.manual_seed(4)
    base = tiny.base_config()
    head = HeadConfig(
        kind="paper", context_width=HIDDEN, trunk_width=9, rank=tiny.RANK, alpha=tiny.ALPHA
    )
    gru = GruConfig(diff_width=2 * WIDTH, snapshot_width=2 * WIDTH, hidden_width=HIDDEN)
    state = GruFamily(None, gru, build_head(head, base)).state_dict()  # type: ignore[arg-type]
    head_state = {k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")}
    del head_state["mean_context"]
    sizes = {
        "input_dim": HIDDEN,
        "hidden_dim": 9,
        "rank": tiny.RANK,
        "types": sorted(base.dims),
        "type_dims": base.dims,
        "num_tasks": 0,
        "task_dim": 64,
    }
    archive = {
        "gru_state": {k.removeprefix("gru."): v for k, v in state.items() if k.startswith("gru.")},
        "head_state": head_state,
        "head_config": sizes,
        "gru_config": {
            "diff_input_dim": 2 * WIDTH,
            "repo_state_dim": 2 * WIDTH,
            "hidden_dim": HIDDEN,
        },
        "type_dims": base.dims,
        "args": {"alpha": tiny.ALPHA},
        "per_step_input": "diff",
    }
    torch.save(archive, path / "code2lora_gru.pt")
    return _files(path) | {"metrics.jsonl": b"{}\n", "README.md": b"# a hypernetwork\n"}


def _released_static(path: Path) -> dict[str, bytes]:
    path.mkdir(parents=True)
    torch.manual_seed(5)
    base = tiny.base_config()
    head = HeadConfig(
        kind="paper", context_width=2 * WIDTH, trunk_width=9, rank=tiny.RANK, alpha=tiny.ALPHA
    )
    state = build_head(head, base).state_dict()
    del state["mean_context"]
    sizes = {
        "input_dim": 2 * WIDTH,
        "hidden_dim": 9,
        "rank": tiny.RANK,
        "types": sorted(base.dims),
        "type_dims": base.dims,
    }
    archive = {"state_dict": state, "config": sizes, "type_dims": base.dims, "args": {}}
    torch.save(archive, path / "code2lora_direct.pt")
    return _files(path)


def _wrapped_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny.tokenizer(), pad_token="<end>", eos_token="<end>", padding_side="left"
    )


def _files(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
