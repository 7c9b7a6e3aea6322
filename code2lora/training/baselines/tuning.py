"""Train a set of weights on the items that the hypernetwork is trained on, step by step.

Reads   a source of items, its own newest checkpoint when there is one.
Writes  <out>/checkpoint-<step>/, <out>/best/

What is trained is a `Trainee`: a LoRA, or the whole decoder. The weights that write the watched
rows best are the ones that are kept, as the hypernetwork keeps those of its best look.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from code2lora.training.data.dataset import RepositoryData
from code2lora.training.fitting.items import Item
from code2lora.training.fitting.run_files import (
    load_training_tensors,
    read_checkpoint,
    training_tensors,
    write_checkpoint,
    write_tensors,
)
from code2lora.training.fitting.windows import WindowSampler

_ROWS_PER_LOOK = 16


class Trainee(Protocol):
    """What a row trains."""

    trained: Mapping[str, nn.Parameter]
    """Everything that learns, by name."""

    def learn(self, items: Sequence[Item]) -> float:
        """Leave the gradients of the rows' mean NLL of a token in `trained`; return it, in nats."""

    def nll(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """Return each row's summed NLL in nats and its number of tokens, without gradients."""


class ItemSource(Protocol):
    """Where a run gets the items of its steps from; steps are asked for in order."""

    def items(self, step: int) -> list[Item]:
        """Return the rows of a step."""

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on from here, as JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken."""


class NothingTold:
    """`Inputs` for a sampler whose windows are only asked for their items."""

    def __init__(self, *, holds_out: bool) -> None:
        """holds_out: as for the hypernetwork, whose items are to be the same."""
        self.holds_out = holds_out

    def snapshot(self, data: RepositoryData, anchor: int, held_out: Collection[str]) -> None:
        """Return nothing."""

    def diff(self, data: RepositoryData, index: int, held_out: Collection[str]) -> None:
        """Return nothing."""

    def snapshot_features(self, snapshots: Sequence[Any]) -> Tensor:
        """Return (n, 0)."""
        return torch.zeros(len(snapshots), 0)

    def diff_features(self, diffs: Sequence[Any]) -> Tensor:
        """Return (n, 0)."""
        return torch.zeros(len(diffs), 0)


class SampledItems:
    """The items of the hypernetwork's own windows; what the windows tell is not used."""

    def __init__(self, sampler: WindowSampler) -> None:
        self._sampler = sampler

    def items(self, step: int) -> list[Item]:
        """See `ItemSource`."""
        return [item for window in self._sampler.windows(step) for item in window.items]

    def state_dict(self) -> dict[str, Any]:
        """See `ItemSource`."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `ItemSource`."""
        self._sampler.load_state_dict(state)


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """The schedule of one run."""

    steps: int
    learning_rate: float
    weight_decay: float = 0.01
    warmup_steps: int = 40
    stable_share: float = 0.4
    """Share of the steps at the peak rate; then linear to `final_rate_share` of it."""
    final_rate_share: float = 0.05
    max_grad_norm: float = 1.0
    watch_every: int = 100
    checkpoint_every_s: float = 120.0

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from zero."""
        share = step / max(1, self.steps)
        decay = max(0.0, share - self.stable_share) / max(1e-9, 1 - self.stable_share)
        factor = (1 - decay * (1 - self.final_rate_share)) * self.learning_rate
        return factor * min(1.0, (step + 1) / max(1, self.warmup_steps))


@dataclass(frozen=True, kw_only=True)
class TuneProgress:
    """What the callback is told after a step."""

    step: int
    done_share: float
    loss: float
    """Nats per token of the step's rows."""
    watched: float | None = None
    """Nats per token of the watched rows; None for steps without a look."""


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """How a run ended; `finished` is false when it was asked to stop."""

    step: int
    finished: bool
    best_step: int
    """The step whose weights are kept."""
    best_watched: float | None
    """Nats per token of the watched rows then; None when there were none."""


class TuneRun:
    """The state of one run: what is trained, its optimizer, its items and counters."""

    def __init__(
        self,
        config: TuneConfig,
        out_dir: Path,
        *,
        trainee: Trainee,
        source: ItemSource,
        watched: Sequence[Item] = (),
        identity: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """identity: JSON values; a run goes on only where they are the same."""
        self.n_steps = 0
        self.best_step = 0
        self.best_watched: float | None = None
        self._config = config
        self._out_dir = out_dir
        self._trainee = trainee
        self._source = source
        self._watched = watched
        self._identity = dict(identity)
        self._clock = clock
        self._saved_at = clock()
        self._optimizer = _optimizer(trainee.trained, config)

    def run(
        self,
        *,
        progress: Callable[[TuneProgress], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> TuneResult:
        """Resume, train until the steps are done or `stop()`, and return how it ended.

        What is trained is left with the weights that are kept. Raises UserError when a run of
        other settings is in the way.
        """
        self.resume()
        while self.n_steps < self._config.steps and not (stop is not None and stop()):
            report = self.step()
            if progress is not None:
                progress(report)
        return self._finish()

    def step(self) -> TuneProgress:
        """Take one optimizer step, and what is due after it: a look, a checkpoint."""
        rate = self._config.rate(self.n_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        items = self._source.items(self.n_steps)
        loss = self._descend(items) if items else 0.0
        self.n_steps += 1
        due = self.n_steps % self._config.watch_every == 0 or self.n_steps == self._config.steps
        seen = self._look() if due else None
        if self._clock() - self._saved_at >= self._config.checkpoint_every_s:
            self.save()
        return TuneProgress(
            step=self.n_steps,
            done_share=self.n_steps / self._config.steps,
            loss=loss,
            watched=seen,
        )

    def save(self) -> None:
        """Write a checkpoint and remove the one before it."""
        content = {
            "identity": self._identity,
            "step": self.n_steps,
            "best_step": self.best_step,
            "best_watched": self.best_watched,
            "source": self._source.state_dict(),
        }
        tensors = training_tensors(self._trainee.trained, self._optimizer)
        write_checkpoint(self._out_dir, self.n_steps, tensors, content)
        self._saved_at = self._clock()

    def resume(self) -> bool:
        """Go on from the newest checkpoint; false where there is none."""
        found = read_checkpoint(self._out_dir, identity=self._identity)
        if found is None:
            return False
        tensors, content = found
        load_training_tensors(tensors, self._trainee.trained, self._optimizer)
        self._source.load_state_dict(content["source"])
        self.n_steps = content["step"]
        self.best_step, self.best_watched = content["best_step"], content["best_watched"]
        return True

    def _descend(self, items: Sequence[Item]) -> float:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._trainee.learn(items)
        parameters = self._trainee.trained.values()
        nn.utils.clip_grad_norm_(parameters, self._config.max_grad_norm)
        self._optimizer.step()
        return loss

    def _look(self) -> float | None:
        if not self._watched:
            return None
        seen = mean_nll(self._trainee, self._watched)
        if self.best_watched is None or seen < self.best_watched:
            self.best_watched, self.best_step = seen, self.n_steps
            weights = {name: tensor.detach() for name, tensor in self._trainee.trained.items()}
            write_tensors(self._out_dir / "best" / "weights.safetensors", weights)
        return seen

    @torch.no_grad()
    def _finish(self) -> TuneResult:
        """Save, and take back the best weights of a run that is done."""
        finished = self.n_steps >= self._config.steps
        self.save()
        if self.best_watched is None:
            self.best_step = self.n_steps
        elif finished:
            best = load_file(self._out_dir / "best" / "weights.safetensors")
            for name, parameter in self._trainee.trained.items():
                parameter.copy_(best[name])
        return TuneResult(
            step=self.n_steps,
            finished=finished,
            best_step=self.best_step,
            best_watched=self.best_watched,
        )


def mean_nll(trainee: Trainee, items: Sequence[Item]) -> float:
    """Return nats per token over rows."""
    total, n_tokens = 0.0, 0
    for start in range(0, len(items), _ROWS_PER_LOOK):
        nll, n = trainee.nll(items[start : start + _ROWS_PER_LOOK])
        total += float(nll.double().sum())
        n_tokens += int(n.sum())
    return total / max(1, n_tokens)


def _optimizer(trained: Mapping[str, nn.Parameter], config: TuneConfig) -> torch.optim.AdamW:
    """Decay the matrices alone, as for the hypernetwork."""
    matrices = [parameter for parameter in trained.values() if parameter.dim() > 1]
    vectors = [parameter for parameter in trained.values() if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate)
