"""What a fit is given and what it tells: settings, progress, result."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from code2lora.training.evaluation.report import Evaluation
from code2lora.training.fitting.items import ItemConfig
from code2lora.training.fitting.learner import LearnerConfig
from code2lora.training.fitting.objective import ROWS_PER_PASS
from code2lora.training.fitting.windows import WindowConfig

_FREE = frozenset(
    {"max_steps", "max_seconds", "patience", "monitor_every", "monitor_items"}
    | {"n_lanes", "rows_per_pass", "checkpointing", "checkpoint_every_s", "tensorboard"}
)
"""Settings that may change when a run goes on: how long it lasts and what is looked at."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Sizes, data and schedule of one run; a budget in steps, in seconds, or in both."""

    learner: LearnerConfig = field(default_factory=LearnerConfig)
    windows: WindowConfig = field(default_factory=WindowConfig)
    items: ItemConfig = field(default_factory=ItemConfig)

    max_steps: int | None = None
    """Stop after so many steps."""
    max_seconds: float | None = None
    """Stop after so much time spent in steps and looks, over all resumptions."""
    patience: int | None = None
    """Stop after so many looks in a row that are not the best so far (`fit.gain`)."""
    learning_rate: float = 1e-3
    """Peak rate of GRU and head."""
    encoder_learning_rate: float = 1e-3
    """Peak rate of the encoder's table."""
    weight_decay: float = 0.01
    """Of the matrices of GRU and head."""
    warmup_steps: int = 40
    """Steps of linear warm-up."""
    stable_share: float = 0.4
    """Share of the budget at the peak rate; then linear to `final_rate_share` of it."""
    final_rate_share: float = 0.05
    max_grad_norm: float = 1.0

    target_weight: float = 1.0
    """Of the cross-entropy of what is asked."""
    length_power: float = 1.0
    """A row of n tokens weighs n ** length_power in it. Below 1, short answers are not drowned out
    by whole stretches of files. The same holds for whatever it is compared with."""
    margin: float = 0.1
    """Nats per token by which the own adapter should be better than another repository's."""
    margin_weight: float = 0.5
    margin_rows: int = 8
    """Rows of a step that are also scored under another repository's adapter; 0 for none."""

    distillation_weight: float = 0.0
    """Of the divergence from the base that is shown the code which the adapter was told; 0 leaves
    the teacher out. See also `windows.taught_share`."""
    teacher_tokens: int = 512
    """Of the code that the teacher is shown, at most."""

    settle_every: int = 20
    """Steps between two measurements of what features are centred on (`Learner.settle`)."""
    monitor_every: int = 150
    """Steps between two looks at unseen repositories."""
    monitor_items: int = 2
    """Rows from files, and as many from commits, of each repository that is looked at."""
    checkpoint_every_s: float = 120.0
    """Seconds between checkpoints."""
    n_lanes: int = 1
    """Threads among which the rows of a step are divided; on the CPU alone."""
    rows_per_pass: int = ROWS_PER_PASS
    """Rows that go through the base decoder together."""
    checkpointing: bool = False
    """Keep only each layer's input for the backward pass: less memory, a third more time."""
    autocast_bf16: bool = True
    """Take the base decoder's matrix products in bfloat16."""
    tensorboard: bool = True
    """Write scalars for TensorBoard."""
    seed: int = 1

    def fixed(self) -> dict[str, Any]:
        """Return, as JSON values, the settings that must be the same for a run to go on."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {key: value for key, value in values.items() if key not in _FREE}


@dataclass(frozen=True, kw_only=True)
class FitProgress:
    """What the callback of `fit` is told after a step."""

    step: int
    done_share: float
    seconds: float
    """Spent in steps and looks so far, over all resumptions."""
    loss: float
    """Nats per token under the own adapters."""
    margin_loss: float
    own_minus_wrong: float
    """Nats per token on the rows that were scored under both."""
    learning_rate: float
    distillation: float = 0.0
    """Nats per token from the teacher to the adapter, on the rows that were taught."""
    tasks_per_s: float = 0.0
    """Rows asked per second of this step, looks left out."""
    memory_bytes: int = 0
    """Most memory that the process has taken: the accelerator's where there is one."""
    monitor: Evaluation | None = None
    """Figures on unseen repositories; None for steps without a look."""

    def scalars(self) -> dict[str, float]:
        """Return what a chart shows, by name."""
        found = {
            "train/loss": self.loss,
            "train/margin_loss": self.margin_loss,
            "train/own_minus_wrong": self.own_minus_wrong,
            "train/distillation": self.distillation,
            "train/learning_rate": self.learning_rate,
            "train/tasks_per_s": self.tasks_per_s,
        }
        if self.monitor is not None:
            found |= {f"unseen/{k}": v for k, v in self.monitor.headline().items()}
        return found


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a run ended; `finished` is false when it was asked to stop."""

    step: int
    finished: bool
    best_step: int
    """The step whose weights the learner now has."""
    best_own_minus_wrong: float | None
    """On the unseen repositories that chose it; None when there were none."""
    stopped_early: bool = False
    """Whether the gap stopped getting wider before the budget was spent."""
