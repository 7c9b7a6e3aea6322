"""The written-out pass against the module's own, for every kind of decoder that is known."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from code2lora.errors import UserError
from code2lora.hypernetwork.inject import LoraSlots
from code2lora.hypernetwork.lora import Lora
from code2lora.serving.decoder import Decoder, Segment
from code2lora.serving.kvcache import KvCache
from code2lora.serving.model import BaseModel
from code2lora.serving.packing import pack
from tests.serving.tiny import save_base

SIZES = {
    "vocab_size": 90,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama, one pair": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1}),
    "mistral, wide heads": (MistralForCausalLM, MistralConfig, {"head_dim": 8}),
    "qwen2, tied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2, scaled": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"rope_parameters": {"rope_theta": 10000.0, **SCALED}},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
}


def build(kind: str, dtype: torch.dtype) -> Any:
    model, config, changes = KINDS[kind]
    torch.manual_seed(3)
    module = model(config(**(SIZES | changes))).to(dtype).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if name.endswith("norm.weight") or name.endswith("bias"):
            parameter.data = torch.randn_like(parameter)
    return module


def decoder_of(module: Any, *, merged_bytes: int = 0) -> Decoder:
    return Decoder(
        module, context_tokens=128, device=torch.device("cpu"), merged_bytes=merged_bytes
    )


def draw_lora(decoder: Decoder, seed: int, *, targets: frozenset[str], shared: bool) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    n, rank = 1 if shared else decoder.n_layers, 4
    dims = {target: decoder.dims[target] for target in decoder.dims if target in targets}
    return Lora(
        a={t: torch.randn(n, rank, d, generator=generator) * 0.2 for t, (d, _) in dims.items()},
        b={t: torch.randn(n, d, rank, generator=generator) * 0.2 for t, (_, d) in dims.items()},
        rank=rank,
        alpha=6.0,
    )


@pytest.mark.parametrize("merged_bytes", [0, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_several_sequences_equal_whole_passes(
    kind: str, dtype: torch.dtype, merged_bytes: int
) -> None:
    module = build(kind, dtype)
    decoder = decoder_of(module, merged_bytes=merged_bytes)
    every = frozenset(decoder.dims)
    few = frozenset({"k_proj", "up_proj", "down_proj"})
    loras = [
        None,
        draw_lora(decoder, 1, targets=every, shared=False),
        draw_lora(decoder, 2, targets=few, shared=True),
    ]
    cpu = torch.device("cpu")
    packed = [x and pack(x, decoder.dims, decoder.n_layers, cpu, dtype) for x in loras]
    choose = random.Random(0)
    sequences = [
        ([choose.randrange(90) for _ in range(choose.randrange(2, 60))], i % 3) for i in range(7)
    ]
    caches = [KvCache(decoder.shape, 8) for _ in sequences]
    found: list[dict[int, torch.Tensor]] = [{} for _ in sequences]
    with torch.inference_mode():
        while any(len(ids) > caches[i].length for i, (ids, _) in enumerate(sequences)):
            segments, places = [], []
            for i, (ids, which) in enumerate(sequences):
                at = caches[i].length
                piece = ids[at : at + choose.choice([1, 1, 3, 20])]
                if piece and choose.random() < 0.7:
                    n = choose.randrange(len(piece) + 1)
                    segments.append(Segment(piece, caches[i], packed[which], n_logits=n))
                    end = at + len(piece)
                    places += [(i, place) for place in range(end - n, end)]
            if segments:
                for (i, place), row in zip(places, decoder.read(segments), strict=True):
                    found[i][place] = row
    slots = LoraSlots(module)
    for (ids, which), rows_of in zip(sequences, found, strict=True):
        lora = loras[which]
        slots.set(None if lora is None else lora.to("cpu", dtype))
        with torch.no_grad():
            expected = module(torch.tensor([ids])).logits[0]
        close = (1e-5 if dtype == torch.float64 else 2e-4) * expected.abs().max()
        for place, row in rows_of.items():
            assert (expected[place] - row).abs().max() <= close
        assert rows_of
    slots.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_close(kind: str) -> None:
    decoder_of(build(kind, torch.bfloat16))  # it compares with the module's own pass


def test_a_merged_copy_is_not_made_where_it_would_be_rounded() -> None:
    module = build("qwen2, tied", torch.bfloat16)
    decoder = decoder_of(module, merged_bytes=10**9)
    lora = draw_lora(decoder, 1, targets=frozenset(decoder.dims), shared=False)
    packed = pack(lora, decoder.dims, decoder.n_layers, torch.device("cpu"), torch.bfloat16)
    with torch.inference_mode():
        decoder.read([Segment([1, 2, 3], KvCache(decoder.shape, 8), packed)])
    assert decoder.merged_bytes == 0


def test_decoders_of_other_kinds_are_refused() -> None:
    gemma = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=4)).eval()
    with pytest.raises(UserError, match="Gemma2ForCausalLM is not a decoder that can be served"):
        decoder_of(gemma)
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9)).eval()
    with pytest.raises(UserError, match=r"it has no `model.layers`"):
        decoder_of(gpt)


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    save_base(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    whole = BaseModel.load(tmp_path).context_tokens
    config.write_text(
        text.replace('"sliding_window": null', '"sliding_window": 32')
        .replace('"use_sliding_window": false', '"use_sliding_window": true')
        .replace('"full_attention"', '"sliding_attention"')
    )
    assert BaseModel.load(tmp_path).context_tokens == min(whole, 32)
