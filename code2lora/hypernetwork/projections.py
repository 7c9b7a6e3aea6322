"""The names of the modules that adapters adapt. No torch here."""

from __future__ import annotations

TARGETS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
"""The seven projections of a Qwen2/Llama decoder layer, in sorted order (paper, section 3)."""

ATTENTION_TARGETS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
