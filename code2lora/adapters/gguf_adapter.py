"""Write an adapter as the GGUF file that llama.cpp and Ollama load beside a base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from code2lora.adapters.arrays import AdapterArrays
from code2lora.adapters.gguf_format import GgufTensor, require_gguf, write_gguf

if TYPE_CHECKING:
    from gguf import GGUFWriter

BLOCKS = {
    "down_proj": "ffn_down",
    "gate_proj": "ffn_gate",
    "k_proj": "attn_k",
    "o_proj": "attn_output",
    "q_proj": "attn_q",
    "up_proj": "ffn_up",
    "v_proj": "attn_v",
}
"""Projection -> what llama.cpp calls it."""


def write_adapter_gguf(adapter: AdapterArrays, file: Path, *, dtype: str = "f16") -> None:
    """Write an adapter; llama.cpp applies it with scale alpha / R.

    Raises UserError when the package is missing or a number does not fit the dtype.
    """
    kind = str(require_gguf().GGUFType.ADAPTER)

    def fields(writer: GGUFWriter) -> None:
        writer.add_type(kind)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", adapter.alpha)
        writer.add_name(f"{adapter.metadata.commit[:12]}-{adapter.sha256[:12]}")
        writer.add_string("code2lora.repository", adapter.metadata.repository)
        writer.add_string("code2lora.commit", adapter.metadata.commit)
        writer.add_string("code2lora.base_model", adapter.metadata.base_model)
        writer.add_string("code2lora.weights_sha256", adapter.sha256)

    tensors = []
    for pair in adapter:
        name = f"blk.{pair.layer}.{BLOCKS[pair.target]}.weight"
        tensors += [
            GgufTensor(f"{name}.lora_a", pair.a, dtype),
            GgufTensor(f"{name}.lora_b", pair.b, dtype),
        ]
    write_gguf(file, fields, tensors)
