"""Turn mined repositories into a hypernetwork and its encoder, by truncated BPTT.

Reads   repositories in memory, a frozen base decoder, its own newest checkpoint when there is one.
Writes  <out>/checkpoint-<step>/, <out>/best/, <out>/tensorboard/

A step takes a window of commits of each of several repositories and asks some of the states along
it; gradients flow through the whole window, and a window that goes on from the last one begins with
its detached state. Several processes share the windows of a step (`step.py`); the first of them
looks, decides and writes. A checkpoint is renamed into place when complete and only then is its
predecessor removed, so a kill at any line costs at most the steps since the last one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from code2lora.errors import UserError
from code2lora.training.data.dataset import RepositoryData
from code2lora.training.evaluation.evaluate import Case, EvaluateConfig, evaluate
from code2lora.training.evaluation.report import Evaluation
from code2lora.training.fitting.inputs import statistics_sample
from code2lora.training.fitting.items import ItemBuilder
from code2lora.training.fitting.learner import Learner
from code2lora.training.fitting.margin import partners
from code2lora.training.fitting.memory import peak_bytes
from code2lora.training.fitting.objective import Frozen
from code2lora.training.fitting.optimizer import build_optimizer, set_rates
from code2lora.training.fitting.run_files import (
    load_training_tensors,
    read_checkpoint,
    training_tensors,
    write_checkpoint,
    write_tensors,
)
from code2lora.training.fitting.schedule import FitConfig, FitProgress, FitResult
from code2lora.training.fitting.step import StepLosses, learn, places_of_rank, share_ends
from code2lora.training.fitting.teacher import Teacher
from code2lora.training.fitting.windows import WindowSampler
from code2lora.training.pretraining.ranks import agreed, n_ranks, rank


class FitRun:
    """The state of one run: learner, optimizer, sampler, carried states and counters."""

    def __init__(
        self,
        config: FitConfig,
        out_dir: Path,
        *,
        learner: Learner,
        base: Frozen,
        builder: ItemBuilder,
        repositories: Sequence[RepositoryData],
        monitor: Sequence[Case] = (),
        monitor_config: EvaluateConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """monitor: unseen repositories; fewer than two are not looked at.

        Raises UserError when the budget is missing, when there are too few repositories, or when
        the windows do not suit the family.
        """
        _check(config, len(repositories))
        self.config = config
        self.out_dir = out_dir
        self.learner = learner
        self.n_steps = 0
        self.seconds = 0.0
        self.best_step = 0
        self.best_gain: float | None = None
        """Of the look whose weights are kept; see `gain`."""
        self.best_gap: float | None = None
        """Its own - wrong."""
        self.looks_since_best = 0
        self._base = base
        self._names = [data.name for data in repositories]
        teacher = None
        if config.distillation_weight:
            teacher = Teacher(builder, n_tokens=config.teacher_tokens)
        self._sampler = WindowSampler(
            repositories,
            builder,
            config.windows,
            inputs=learner.inputs,
            seed=config.seed,
            teacher=teacher,
        )
        self._sample = statistics_sample(learner.inputs, repositories)
        self._optimizer = build_optimizer(learner, config)
        self._carried: dict[int, Tensor] = {}
        self._monitor = monitor if len(monitor) > 1 else ()
        self._monitor_config = monitor_config or EvaluateConfig()
        self._clock = clock
        self._saved_at = clock()
        self._log: Any = None

    @property
    def done_share(self) -> float:
        """How much of the budget is spent, 0 to 1."""
        shares = [0.0]
        if self.config.max_steps is not None:
            shares.append(self.n_steps / self.config.max_steps)
        if self.config.max_seconds is not None:
            shares.append(self.seconds / self.config.max_seconds)
        return min(1.0, max(shares))

    @property
    def stopped_early(self) -> bool:
        """Whether looks have stopped getting better."""
        patience = self.config.patience
        return patience is not None and self.looks_since_best >= patience

    def is_finished(self) -> bool:
        """Whether the budget is spent, or nothing is won any more."""
        return self.done_share >= 1.0 or self.stopped_early

    def step(self) -> FitProgress:
        """Take one optimizer step, and what is due after it: monitoring, a checkpoint."""
        began = self._clock()
        if self.n_steps % self.config.settle_every == 0:
            self.learner.settle(self._sample)
        rate = set_rates(self._optimizer, self.config, self.n_steps, self.done_share)
        losses = self._learn()
        self.n_steps += 1
        step_seconds = self._clock() - began
        seen = self._look() if self.n_steps % self.config.monitor_every == 0 else None
        self.seconds += agreed(self._clock() - began)
        progress = FitProgress(
            step=self.n_steps,
            done_share=self.done_share,
            seconds=self.seconds,
            loss=losses.loss,
            margin_loss=losses.margin,
            own_minus_wrong=losses.own_minus_wrong,
            learning_rate=rate,
            distillation=losses.distillation,
            tasks_per_s=losses.n_rows / max(1e-9, step_seconds),
            memory_bytes=peak_bytes(self.learner.device),
            monitor=seen,
        )
        self._write_log(progress)
        if self._clock() - self._saved_at >= self.config.checkpoint_every_s:
            self.save()
        return progress

    def finish(self) -> FitResult:
        """Save, take back the weights of the best look, and tell how it ended.

        A run that is spent is looked at once more; one that was asked to stop is only saved.
        """
        finished = self.is_finished()
        if finished and self.n_steps % self.config.monitor_every:
            self._look()
        self.save()
        if self.best_gap is not None:
            agreed(0.0)  # the file is there once the first process has come this far
            best = load_file(self.out_dir / "best" / "learner.safetensors")
            self.learner.load_state_dict(best)
        else:
            self.best_step = self.n_steps
        if self._log is not None:
            self._log.close()
            self._log = None
        return FitResult(
            step=self.n_steps,
            finished=finished,
            best_step=self.best_step,
            stopped_early=self.stopped_early,
            best_own_minus_wrong=self.best_gap,
        )

    def save(self) -> None:
        """Write a checkpoint and remove the one before it; only the first process does."""
        self._saved_at = self._clock()
        if rank():
            return
        content = {
            "config": self.config.fixed(),
            "repositories": self._names,
            "step": self.n_steps,
            "seconds": self.seconds,
            "best_step": self.best_step,
            "best_gain": self.best_gain,
            "best_gap": self.best_gap,
            "looks_since_best": self.looks_since_best,
            "cursors": self._sampler.state_dict(),
        }
        write_checkpoint(self.out_dir, self.n_steps, self._tensors(), content)

    def resume(self) -> bool:
        """Go on from the newest checkpoint; false where there is none.

        Raises UserError when it was made with other settings.
        """
        found = read_checkpoint(self.out_dir)
        if found is None:
            return False
        tensors, content = found
        if content["config"] != self.config.fixed():
            raise UserError(
                f"{self.out_dir} was made with other settings",
                hint="give another output folder, or remove this one to begin again",
            )
        if content["repositories"] != self._names:
            raise UserError(
                f"{self.out_dir} was made with {len(content['repositories'])} repositories, "
                f"but {len(self._names)} are given, or others",
                hint="give the same repositories, or another output folder",
            )
        self._load_tensors(tensors)
        self._sampler.load_state_dict(content["cursors"])
        self.n_steps, self.seconds = content["step"], content["seconds"]
        self.best_step = content["best_step"]
        self.best_gain, self.best_gap = content["best_gain"], content["best_gap"]
        self.looks_since_best = content["looks_since_best"]
        return True

    def _learn(self) -> StepLosses:
        config, step = self.config, self.n_steps
        windows = self._sampler.windows(step, places_of_rank(config.windows.repositories))
        losses, ends = learn(self.learner, self._base, windows, self._carried, config, step)
        self._carried |= share_ends(ends, self._sampler.chosen(step), self.learner.device)
        nn.utils.clip_grad_norm_(self.learner.parameters(), config.max_grad_norm)
        self._optimizer.step()
        return losses

    def _look(self) -> Evaluation | None:
        """Look at the unseen repositories and keep the weights if they are the best so far."""
        if not self._monitor:
            return None
        seen = None
        if rank() == 0:
            seen = evaluate(self.learner, self._base, self._monitor, self._monitor_config)
        found = agreed(gain(seen) if seen else 0.0)
        gap = agreed(seen.strata["all"].own_minus_wrong.mean if seen else 0.0)
        self.looks_since_best += 1
        if self.best_gain is None or found < self.best_gain:
            self.best_gain, self.best_gap, self.best_step = found, gap, self.n_steps
            self.looks_since_best = 0
            if rank() == 0:
                path = self.out_dir / "best" / "learner.safetensors"
                write_tensors(path, self.learner.state_dict())
        return seen

    def _tensors(self) -> dict[str, Tensor]:
        tensors = training_tensors(dict(self.learner.named_parameters()), self._optimizer)
        tensors |= {f"buffers.{name}": each for name, each in self._buffers().items()}
        return tensors | {f"carried.{row}": state for row, state in self._carried.items()}

    @torch.no_grad()
    def _load_tensors(self, tensors: dict[str, Tensor]) -> None:
        load_training_tensors(tensors, dict(self.learner.named_parameters()), self._optimizer)
        for name, buffer in self._buffers().items():
            buffer.copy_(tensors[f"buffers.{name}"])
        self._carried = {
            int(name.removeprefix("carried.")): state.to(self.learner.device)
            for name, state in tensors.items()
            if name.startswith("carried.")
        }

    def _buffers(self) -> dict[str, Tensor]:
        parameters = dict(self.learner.named_parameters())
        state = self.learner.state_dict(keep_vars=True)
        return {name: each for name, each in state.items() if name not in parameters}

    def _write_log(self, progress: FitProgress) -> None:
        if not self.config.tensorboard or rank():
            return
        if self._log is None:
            from torch.utils.tensorboard import SummaryWriter

            self._log = SummaryWriter(str(self.out_dir / "tensorboard"), purge_step=progress.step)
        for name, value in progress.scalars().items():
            self._log.add_scalar(name, value, progress.step)


def fit(
    run: FitRun,
    *,
    progress: Callable[[FitProgress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> FitResult:
    """Resume the run, train until its budget is spent or `stop()`, and return how it ended.

    The learner is left with the weights of the best look at the monitored repositories (`gain`), or
    with the last ones where none were given.
    """
    run.resume()
    while not run.is_finished() and not agreed(float(stop is not None and stop())):
        report = run.step()
        if progress is not None:
            progress(report)
    return run.finish()


def gain(seen: Evaluation) -> float:
    """Return what a look is judged by, in nats a token, lower is better.

    What the own adapter gains over the base, and what of it another repository's does not: the
    first alone would keep a generic adapter, the second alone one that writes worse.
    """
    every = seen.strata["all"]
    return every.own_minus_base.mean + every.own_minus_wrong.mean


def _check(config: FitConfig, n_repositories: int) -> None:
    """Raise UserError when a run could not begin."""
    if config.max_steps is None and config.max_seconds is None:
        raise UserError("the fit has no budget", hint="set max_steps or max_seconds")
    wanted = config.windows.repositories
    if n_repositories < wanted:
        raise UserError(
            f"{n_repositories} training repositories, but a step takes {wanted}",
            hint="mine more repositories, or lower windows.repositories",
        )
    if len(partners(wanted)) < n_ranks():
        raise UserError(
            f"{n_ranks()} processes share {wanted} repositories a step, expected 2 for each",
            hint="start fewer processes, or raise windows.repositories",
        )
    if config.learner.family == "static" and config.windows.commits:
        raise UserError(
            "a static family cannot follow commits, but windows.commits is "
            f"{config.windows.commits}",
            hint="set fit.windows.commits = 0 in the recipe",
        )
