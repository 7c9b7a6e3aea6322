"""Settings of the trained rows that the hypernetwork is compared with.

What is not here is taken from `fit`: the items, the rank and alpha of adapters, the seed, the
warm-up and the shape of the rates, so that a row differs from the hypernetwork in nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class RepositoryLoraConfig:
    """How the LoRA of one repository is trained on its own past."""

    learning_rate: float = 3e-4
    rows_per_step: int = 8
    warmup_steps: int = 10
    max_steps: int = 400
    """A LoRA that still gets better is stopped here."""
    look_every: int = 20
    """Steps between two looks at the repository's validation rows."""
    patience: int = 3
    """Looks without a better figure after which a LoRA is done."""
    validation_share: float = 0.1
    """Share of the past, its newest commits, that validation rows come from."""
    validation_rows: int = 24
    """Most validation rows."""
    source_share: float = 0.5
    """Share of training rows that are stretches of source files rather than tasks."""
    suites: tuple[str, ...] = ("cross-repo", "in-repo", "out-of-time")
    """Suites of the evaluation whose repositories get a LoRA."""
    repositories_at_once: int = 8
    """LoRAs that are trained in one batch; it changes the speed and not the result."""


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Rates and sizes of every trained row."""

    steps: int | None = None
    """Optimizer steps of the shared rows; None takes as many as the hypernetwork's run."""
    lora_learning_rate: float = 3e-4
    """Peak rate of the shared LoRA."""
    full_learning_rate: float = 3e-5
    """Peak rate of a full fine-tuning."""
    weight_decay: float = 0.01
    watch_every: int = 100
    """Steps between two looks at validation repositories; the best weights are kept."""
    watched_rows: int = 4
    """Rows from files, and as many from commits, of each repository that is looked at."""
    rows_per_pass: int = 8
    """Rows of a full fine-tuning that are held in memory at once."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass: slower, and less memory."""
    context_tokens: int | None = None
    """Of retrieved context in front of an item, at most; None for the chunks that the evaluation
    retrieves. With the item it should fit into what the decoder was trained on."""
    description_lines: int = 24
    """Of the README in the description of a repository."""
    checkpoint_every_s: float = 120.0
    """Seconds between checkpoints."""
    repository: RepositoryLoraConfig = field(default_factory=RepositoryLoraConfig)
