"""Write a base model as the GGUF file that llama.cpp and Ollama run.

Reads   config.json, tokenizer.json, tokenizer_config.json and safetensors weights of one directory.

Vectors (norms, biases) are written in float32, matrices in the dtype that is asked for. Only what
llama.cpp computes as Hugging Face does is written; anything else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from code2lora.adapters.gguf_adapter import BLOCKS
from code2lora.adapters.gguf_format import (
    ARCHITECTURE,
    GgufTensor,
    require_architecture,
    require_gguf,
    write_gguf,
)
from code2lora.adapters.layout import read_json
from code2lora.adapters.tensors import TensorInfo, read_tensors
from code2lora.errors import UserError
from code2lora.hypernetwork.config import block_of

if TYPE_CHECKING:
    from gguf import GGUFWriter

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2's tokenizer splits a text, which is what llama.cpp means by `qwen2`."""

_CONTROL_FIELDS = {
    "tokenizer.ggml.fim_pre_token_id": "<|fim_prefix|>",
    "tokenizer.ggml.fim_suf_token_id": "<|fim_suffix|>",
    "tokenizer.ggml.fim_mid_token_id": "<|fim_middle|>",
    "tokenizer.ggml.fim_pad_token_id": "<|fim_pad|>",
    "tokenizer.ggml.fim_rep_token_id": "<|repo_name|>",
    "tokenizer.ggml.fim_sep_token_id": "<|file_sep|>",
}
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_NORMS = {"input_layernorm.weight": "attn_norm", "post_attention_layernorm.weight": "ffn_norm"}


def write_base_gguf(base_dir: Path, file: Path, *, name: str, dtype: str = "f16") -> None:
    """Write the decoder and its tokenizer.

    Raises UserError when the directory is damaged, the model is of another architecture or has
    features that llama.cpp does not compute the same way, or the package is missing.
    """
    config = require_architecture(base_dir)
    _check_features(base_dir, config)
    tokenizer = _Tokenizer(base_dir, int(config["vocab_size"]))
    tensors = _tensors(base_dir, config, dtype)

    def fields(writer: GGUFWriter) -> None:
        writer.add_type("model")
        writer.add_name(name)
        _add_shape(writer, config)
        tokenizer.add_to(writer)

    write_gguf(file, fields, tensors)


def _add_shape(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    n_heads = int(config["num_attention_heads"])
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or n_heads))
    if config.get("head_dim"):  # else it is the width shared out among the heads
        writer.add_key_length(int(config["head_dim"]))
        writer.add_value_length(int(config["head_dim"]))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_freq_base(_rope_theta(config))


def _rope_theta(config: Mapping[str, Any]) -> float:
    """Return the base of the rotary angles; newer configurations have it one level deeper."""
    rope = config.get("rope_parameters") or {}
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)


def _check_features(base_dir: Path, config: Mapping[str, Any]) -> None:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise UserError(f"{base_dir} scales its rotary angles ({kind}), which is not converted")
    if config.get("use_sliding_window"):
        raise UserError(f"{base_dir} attends in a sliding window, which is not converted")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{base_dir} has the activation {config['hidden_act']!r}, expected 'silu'")


def _tensors(base_dir: Path, config: Mapping[str, Any], dtype: str) -> list[GgufTensor]:
    names = dict(_OUTER)
    if config.get("tie_word_embeddings"):
        del names["lm_head.weight"]  # a copy in the file would be loaded beside the original
    for i in range(int(config["num_hidden_layers"])):
        inner, outer = f"model.layers.{i}", f"blk.{i}"
        names |= {f"{inner}.{norm}": f"{outer}.{theirs}.weight" for norm, theirs in _NORMS.items()}
        for target, theirs in BLOCKS.items():
            names[f"{inner}.{block_of(target)}.{target}.weight"] = f"{outer}.{theirs}.weight"
        for target in ("q_proj", "k_proj", "v_proj"):
            names[f"{inner}.self_attn.{target}.bias"] = f"{outer}.{BLOCKS[target]}.bias"
    found = _weights(base_dir)
    missing = sorted(set(names) - set(found))
    if missing:
        raise UserError(f"{base_dir} lacks the tensor {missing[0]}")
    return [
        GgufTensor(theirs, found[ours], dtype if len(found[ours].shape) > 1 else "f32")
        for ours, theirs in names.items()
    ]


def _weights(base_dir: Path) -> dict[str, TensorInfo]:
    """Return the tensors of all weights files of a model."""
    index = base_dir / "model.safetensors.index.json"
    if not index.is_file():
        return read_tensors(base_dir / "model.safetensors")
    shards = sorted({str(file) for file in read_json(index).get("weight_map", {}).values()})
    found: dict[str, TensorInfo] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise UserError(f"{index} leads out of its directory: {shard!r}")
        found |= read_tensors(base_dir / shard)
    return found


class _Tokenizer:
    """A byte-level BPE tokenizer that splits text as Qwen2's does."""

    def __init__(self, base_dir: Path, vocab_size: int) -> None:
        file = base_dir / "tokenizer.json"
        values = read_json(file)
        settings = base_dir / "tokenizer_config.json"
        self._settings = read_json(settings) if settings.is_file() else {}
        model, splits = values.get("model", {}), values.get("pre_tokenizer", {})
        patterns = [s.get("pattern", {}).get("Regex") for s in splits.get("pretokenizers", [])]
        if model.get("type") != "BPE" or _SPLIT not in patterns:
            raise UserError(f"{file} is no tokenizer of Qwen2's kind, which llama.cpp would need")
        self._ids = dict(model["vocab"])
        self._special = {}
        for added in values.get("added_tokens", []):
            self._ids[added["content"]] = added["id"]
            self._special[added["id"]] = bool(added["special"])
        if max(self._ids.values()) >= vocab_size:
            raise UserError(f"{file} has more tokens than the model, which has {vocab_size}")
        self._vocab_size = vocab_size
        # Files of older versions have each merge in one string.
        self._merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]

    def add_to(self, writer: GGUFWriter) -> None:
        """Add the vocabulary and how it is used."""
        kinds = require_gguf().TokenType
        texts = {i: text for text, i in self._ids.items()}
        tokens, types = [], []
        for i in range(self._vocab_size):
            tokens.append(texts.get(i, f"[PAD{i}]"))
            special = self._special.get(i)
            if i not in texts:
                types.append(kinds.UNUSED)
            elif special is None:
                types.append(kinds.NORMAL)
            else:
                types.append(kinds.CONTROL if special else kinds.USER_DEFINED)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(ARCHITECTURE)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(self._merges)
        writer.add_add_bos_token(False)
        for field, token in _CONTROL_FIELDS.items():
            if token in self._ids:
                writer.add_uint32(field, self._ids[token])
        self._add_ends(writer)
        template = self._settings.get("chat_template")
        if isinstance(template, str):
            writer.add_chat_template(template)

    def _add_ends(self, writer: GGUFWriter) -> None:
        for key, add in (
            ("eos_token", writer.add_eos_token_id),
            ("pad_token", writer.add_pad_token_id),
        ):
            token = self._settings.get(key)
            text = token.get("content") if isinstance(token, dict) else token
            if text in self._ids:
                add(self._ids[text])
