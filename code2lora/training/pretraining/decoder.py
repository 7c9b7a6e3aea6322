"""Turn a base configuration into a decoder, its optimizers, its loss, and a served directory.

Writes  the export directory, as a whole: a reader sees the old one, none, or the new one.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from code2lora.training.pretraining.base_config import BaseConfig
from code2lora.training.pretraining.tokenizer import END_OF_TEXT, save_tokenizer, token_id

_CHUNK_TARGETS = 512


def build_model(config: BaseConfig, *, end_id: int) -> Qwen2ForCausalLM:
    """Return a decoder with the initial weights that the seed determines, in float32."""
    model_config = Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=end_id,
        use_cache=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Qwen2ForCausalLM(model_config)
    nn.Module.float(model).train()
    return model


def build_optimizers(model: nn.Module, config: BaseConfig) -> list[torch.optim.Optimizer]:
    """Return Muon for the projections and AdamW for embeddings, norms and biases."""
    projections: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        is_projection = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (projections if is_projection else others).append(parameter)
    muon = torch.optim.Muon(
        projections, lr=config.muon_lr, momentum=0.95, weight_decay=config.weight_decay
    )
    adamw = torch.optim.AdamW(others, lr=config.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return [muon, adamw]


def export_model(model: Qwen2ForCausalLM, tokenizer: Tokenizer, out_dir: Path) -> None:
    """Write a directory that Transformers and the servers can load, weights in bfloat16.

    An export that is there already is replaced as a whole.
    """
    end_id = token_id(tokenizer, END_OF_TEXT)
    temporary = out_dir.with_name(out_dir.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    copy = Qwen2ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    nn.Module.to(copy, torch.bfloat16).eval()
    copy.generation_config = GenerationConfig.from_dict(
        {"eos_token_id": end_id, "pad_token_id": end_id}
    )
    copy.save_pretrained(temporary)
    # safetensors writes for the owner only, but a bundled model is package data, for every user
    (temporary / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, temporary, max_length=model.config.max_position_embeddings)
    saved = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
    # Transformers 5 writes rope_parameters only; mistral.rs and older readers look here.
    saved["rope_theta"] = saved["rope_parameters"]["rope_theta"]
    content = json.dumps(saved, indent=2) + "\n"
    (temporary / "config.json").write_text(content, encoding="utf-8")
    shutil.rmtree(out_dir, ignore_errors=True)
    os.replace(temporary, out_dir)


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy of a tied output head, a few rows of logits at a time.

    The logits of a whole pass would be the largest tensor by far, and going through memory for them
    costs more than their products. So the gradients are taken in the forward pass, chunk by chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, factors: Tensor | None
    ) -> Tensor:
        low = weight.to(hidden.dtype)  # (V, D)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        total = hidden.new_zeros((), dtype=torch.float32)
        n_targets = targets.numel()
        for start in range(0, n_targets, _CHUNK_TARGETS):
            part = hidden[start : start + _CHUNK_TARGETS]  # (C, D)
            wanted = targets[start : start + _CHUNK_TARGETS, None]  # (C, 1)
            shares = torch.softmax((part @ low.T).float(), dim=-1)  # (C, V)
            nll = shares.gather(1, wanted).clamp_min(1e-30).log().neg()  # (C, 1)
            shares.scatter_add_(1, wanted, shares.new_full(wanted.shape, -1.0))
            if factors is not None:
                factor = factors[start : start + _CHUNK_TARGETS, None]  # (C, 1)
                nll *= factor
                shares *= factor
            total += nll.sum()
            grad_logits = shares.to(hidden.dtype)
            grad_hidden[start : start + _CHUNK_TARGETS] = grad_logits @ low
            grad_weight += grad_logits.T @ part
        ctx.save_for_backward(grad_hidden.div_(n_targets), grad_weight.div_(n_targets))
        return total / n_targets

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad, None, None


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, factors: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy, in nats, of ``hidden @ weight.T`` against ``targets``.

    hidden: (..., D)   weight: (V, D)   targets: (...) of int64
    factors: (...) float32, by which each target's cross-entropy is multiplied before the mean
    returns a float32 scalar; the products are taken in hidden.dtype
    """
    loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1),
        None if factors is None else factors.reshape(-1),
    )
    return loss
