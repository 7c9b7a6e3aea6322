"""Every choice of a base decoder's run in one frozen record, saved beside its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """Shape, data and schedule of one run; a budget in tokens, in time, or in both."""

    vocab_size: int = 8192
    """Ids, added tokens included."""
    hidden_size: int = 256
    """Width of the residual stream."""
    n_layers: int = 6
    """Decoder layers."""
    n_heads: int = 4
    """Query heads; a head is ``hidden_size / n_heads`` wide."""
    n_kv_heads: int = 2
    """Key and value heads."""
    intermediate_size: int = 704
    """Width of the gated projections."""
    max_position_embeddings: int = 2048
    """Longest context, in tokens, that the export declares."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""

    row_tokens: int = 512
    """Tokens of a training row."""
    rows_per_step: int = 16
    """Rows that one optimizer step averages over."""
    rows_per_pass: int = 8
    """Rows of one forward and backward pass; divides ``rows_per_step``."""
    hole_share: float = 0.5
    """Share of excerpts with a hole to fill."""
    header_share: float = 0.5
    """Share of excerpts that begin with their path."""
    excerpt_chars: int = 1200
    """Mean length of an excerpt, in characters."""

    max_tokens: int | None = None
    """Stop after so many training tokens."""
    deadline_unix_s: float | None = None
    """Stop at this time, in seconds since 1970, with the learning rate decayed to zero."""
    muon_lr: float = 0.02
    """Peak learning rate of the projections."""
    adamw_lr: float = 3e-3
    """Peak learning rate of embeddings, norms and biases."""
    weight_decay: float = 0.05
    """Decay of the projections per unit of learning rate."""
    warmup_steps: int = 60
    """Steps of linear warm-up."""
    stable_share: float = 0.35
    """Share of the budget at the peak rate, warm-up included; then linear to zero."""
    max_grad_norm: float = 1.0
    """Clip of the gradients that AdamW takes; Muon's updates have a fixed size anyway."""

    autocast_bf16: bool = True
    """Take matrix products in bfloat16; the weights stay float32."""
    compile: bool = False
    """Compile the decoder; needs a C++ compiler."""
    n_threads: int = 2
    """Threads of the tensor library."""
    seed: int = 1
    """Of the initial weights and of everything the stream draws."""
    validation_rows: int = 96
    """Rows of the validation loss."""
    validate_every_steps: int = 100
    """Steps between validations."""
    checkpoint_every_s: float = 120.0
    """Seconds between checkpoints."""
    tensorboard: bool = False
    """Also write scalars for TensorBoard."""
