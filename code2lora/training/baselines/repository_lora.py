"""Train a LoRA for each of several repositories at once, each on its own past alone.

Reads   the pasts (`own_past.py`), a frozen base decoder, its own newest checkpoint.
Writes  <out>/checkpoint-<step>/

One forward pass serves all: every row has its repository's adapter. The adapters do not touch each
other, since the losses are summed, gradients are clipped for each adapter and AdamW works on
single numbers; so the result is that of training them one by one. Each stops for itself, when its
repository's validation rows stop getting better, and keeps its best weights; those of the base,
an adapter of zeros, are among the candidates.

N = repositories.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from code2lora.hypernetwork.lora import Lora
from code2lora.training.baselines.config import RepositoryLoraConfig
from code2lora.training.baselines.own_past import Past, draw_rows, validation_rows
from code2lora.training.baselines.shared_lora import LoraBank
from code2lora.training.fitting.items import Item, ItemBuilder, collate
from code2lora.training.fitting.objective import Frozen, row_nll, weighed
from code2lora.training.fitting.run_files import (
    load_training_tensors,
    read_checkpoint,
    training_tensors,
    write_checkpoint,
)

_ROWS_PER_LOOK = 32


@dataclass
class Course:
    """How one repository's training went so far."""

    repository: str
    base_nll: float = 0.0
    """Nats per token of the validation rows without an adapter."""
    best_nll: float = 0.0
    best_step: int = 0
    n_worse: int = 0
    """Looks since the best one."""
    done: bool = False


@dataclass(frozen=True, kw_only=True)
class BankProgress:
    """What the callback is told after a step."""

    step: int
    done_share: float
    loss: float
    """Nats per token, the mean over the repositories that still train."""
    n_done: int


class BankRun:
    """The state of one run: the adapters, their optimizer, and the course of each repository."""

    def __init__(
        self,
        pasts: Sequence[Past],
        config: RepositoryLoraConfig,
        out_dir: Path,
        *,
        bank: LoraBank,
        base: Frozen,
        builder: ItemBuilder,
        length_power: float,
        max_grad_norm: float,
        weight_decay: float,
        seed: int,
        identity: Mapping[str, Any],
        checkpoint_every_s: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """bank: an adapter for each past. identity: JSON values that must not change.

        length_power: see `FitConfig`
        """
        self.n_steps = 0
        self.courses = [Course(past.data.name) for past in pasts]
        self._pasts = pasts
        self._config = config
        self._out_dir = out_dir
        self._bank = bank
        self._base = base
        self._builder = builder
        self._length_power = length_power
        self._max_grad_norm = max_grad_norm
        self._seed = seed
        self._identity = {**identity, "repositories": [past.data.name for past in pasts]}
        self._checkpoint_every_s = checkpoint_every_s
        self._clock = clock
        self._saved_at = clock()
        self._validation = [validation_rows(past, builder, seed=seed) for past in pasts]
        self._trained = dict(bank.named_parameters())
        self._best = {name: tensor.detach().clone() for name, tensor in self._trained.items()}
        self._optimizer = torch.optim.AdamW(
            self._trained.values(), lr=config.learning_rate, weight_decay=weight_decay
        )

    def is_finished(self) -> bool:
        """Whether every repository's LoRA has stopped."""
        return all(course.done for course in self.courses)

    def run(
        self,
        *,
        progress: Callable[[BankProgress], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> bool:
        """Resume, and train until every LoRA has stopped or `stop()`; return whether all have.

        The bank is left with the best weights of each then. Raises UserError when a run of other
        settings is in the way.
        """
        if not self._resume():
            self._look()
        while not self.is_finished() and not (stop is not None and stop()):
            loss = self._step()
            if progress is not None:
                progress(self._progress(loss))
        self._save()
        if self.is_finished():
            self._take_best()
        return self.is_finished()

    def lora(self, index: int) -> Lora:
        """Return one repository's adapter, without a batch axis."""
        return self._bank.one(index).detach()

    def _step(self) -> float:
        warm = min(1.0, (self.n_steps + 1) / max(1, self._config.warmup_steps))
        for group in self._optimizer.param_groups:
            group["lr"] = warm * self._config.learning_rate
        rows: list[Item] = []
        owners: list[int] = []
        for owner, course in enumerate(self.courses):
            if not course.done:
                rng = random.Random(f"{self._seed}/{course.repository}/{self.n_steps}")
                found = draw_rows(self._pasts[owner], self._builder, self._config, rng)
                rows += found
                owners += [owner] * len(found)
        loss = self._descend(rows, owners) if rows else 0.0
        self.n_steps += 1
        if self.n_steps % self._config.look_every == 0 or self.n_steps >= self._config.max_steps:
            self._look()
        if self._clock() - self._saved_at >= self._checkpoint_every_s:
            self._save()
        return loss

    def _descend(self, rows: list[Item], owners: list[int]) -> float:
        index = torch.tensor(owners)
        nll, n_tokens = row_nll(self._base, *collate(rows), self._bank.lora(), index)
        target, weight = weighed(nll, n_tokens, self._length_power)
        losses = _per_owner(target, weight, index, len(self.courses))
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses.sum())
        _clip_each(self._trained.values(), self._max_grad_norm)
        self._optimizer.step()
        return losses.detach().sum().item() / len(set(owners))

    @torch.no_grad()
    def _look(self) -> None:
        """Measure the validation rows, note who got better, and stop who has not for long."""
        for owner, course in enumerate(self.courses):
            if course.done:
                continue
            seen = self._validation_nll(owner)
            first = self.n_steps == 0
            if first:
                course.base_nll = seen
            if first or seen < course.best_nll:
                course.best_nll, course.best_step, course.n_worse = seen, self.n_steps, 0
                for name, tensor in self._trained.items():
                    self._best[name][owner] = tensor[owner]
            else:
                course.n_worse += 1
            late = self.n_steps >= self._config.max_steps
            course.done = late or course.n_worse >= self._config.patience

    def _validation_nll(self, owner: int) -> float:
        rows, lora = self._validation[owner], self.lora(owner)
        total, n_tokens = 0.0, 0
        for start in range(0, len(rows), _ROWS_PER_LOOK):
            part = collate(rows[start : start + _ROWS_PER_LOOK])
            nll, n = row_nll(self._base, *part, lora, None)
            total += float(nll.double().sum())
            n_tokens += int(n.sum())
        return total / max(1, n_tokens)

    def _progress(self, loss: float) -> BankProgress:
        n_done = sum(course.done for course in self.courses)
        share = self.n_steps / self._config.max_steps
        done_share = 1.0 if self.is_finished() else min(1.0, share)
        return BankProgress(step=self.n_steps, done_share=done_share, loss=loss, n_done=n_done)

    def _save(self) -> None:
        tensors = training_tensors(self._trained, self._optimizer)
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        content = {
            "identity": self._identity,
            "step": self.n_steps,
            "courses": [asdict(course) for course in self.courses],
        }
        write_checkpoint(self._out_dir, self.n_steps, tensors, content)
        self._saved_at = self._clock()

    def _resume(self) -> bool:
        found = read_checkpoint(self._out_dir, identity=self._identity)
        if found is None:
            return False
        tensors, content = found
        load_training_tensors(tensors, self._trained, self._optimizer)
        for name, tensor in self._best.items():
            tensor.copy_(tensors[f"best.{name}"])
        self.n_steps = content["step"]
        self.courses = [Course(**course) for course in content["courses"]]
        return True

    @torch.no_grad()
    def _take_best(self) -> None:
        for name, parameter in self._trained.items():
            parameter.copy_(self._best[name])


def _per_owner(target: Tensor, weight: Tensor, index: Tensor, n_owners: int) -> Tensor:
    """Return (N,): each repository's nats per token; zero for one without rows."""
    index = index.to(target.device)
    total = target.new_zeros(n_owners).index_add(0, index, target)
    weights = weight.new_zeros(n_owners).index_add(0, index, weight)
    return total / torch.where(weights > 0, weights, 1.0)


@torch.no_grad()
def _clip_each(parameters: Any, max_norm: float) -> None:
    """Clip each adapter's gradient for itself; the adapters lie along the first axis."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients])
    factor = (max_norm / squares.sum(0).sqrt().clamp(min=1e-12)).clamp(max=1)  # (N,)
    for gradient in gradients:
        gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))
