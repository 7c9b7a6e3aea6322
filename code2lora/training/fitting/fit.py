"""Turn mined repositories into a hypernetwork and its encoder, by truncated BPTT.

Reads   repositories in memory, a frozen base decoder, its own newest checkpoint when there is one.
Writes  <out>/checkpoint-<step>/, <out>/best/, <out>/tensorboard/

A step takes a window of commits of each of several repositories and asks some of the states along
it; gradients flow through the whole window, and a window that goes on from the last one begins with
its detached state. A checkpoint is renamed into place when complete and only then is its
predecessor removed, so a kill at any line costs at most the steps since the last one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from code2lora.errors import UserError
from code2lora.training.data.dataset import RepositoryData
from code2lora.training.evaluation.evaluate import Case, EvaluateConfig, evaluate
from code2lora.training.evaluation.report import Evaluation
from code2lora.training.fitting.items import ItemBuilder, collate
from code2lora.training.fitting.learner import Learner, statistics_sample
from code2lora.training.fitting.objective import Frozen, margin_loss, row_nll, wrong_adapters
from code2lora.training.fitting.schedule import FitConfig, FitProgress, FitResult
from code2lora.training.fitting.windows import Window, WindowSampler


@dataclass(frozen=True)
class _Losses:
    loss: float
    margin: float
    own_minus_wrong: float


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

        Raises UserError when the budget is missing or there are too few repositories.
        """
        if config.max_steps is None and config.max_seconds is None:
            raise UserError("the fit has no budget", hint="set max_steps or max_seconds")
        if len(repositories) < config.windows.repositories:
            raise UserError(
                f"{len(repositories)} training repositories, "
                f"but a step takes {config.windows.repositories}",
                hint="mine more repositories, or lower windows.repositories",
            )
        self.config = config
        self.out_dir = out_dir
        self.learner = learner
        self.n_steps = 0
        self.seconds = 0.0
        self.best_step = 0
        self.best_gap: float | None = None
        n_vocabulary = learner.table.shape[0]
        self._base = base
        self._names = [data.name for data in repositories]
        self._sampler = WindowSampler(
            repositories, builder, config.windows, n_vocabulary=n_vocabulary, seed=config.seed
        )
        self._sample = statistics_sample(repositories, n_vocabulary)
        self._optimizer = _optimizer(learner, config)
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

    def is_finished(self) -> bool:
        """Whether the budget is spent."""
        return self.done_share >= 1.0

    def step(self) -> FitProgress:
        """Take one optimizer step, and what is due after it: monitoring, a checkpoint."""
        began = self._clock()
        if self.n_steps % self.config.settle_every == 0:
            self.learner.settle(self._sample)
        rate = self._set_rates()
        losses = self._learn(self._sampler.windows(self.n_steps))
        self.n_steps += 1
        seen = self._look() if self.n_steps % self.config.monitor_every == 0 else None
        self.seconds += self._clock() - began
        progress = FitProgress(
            step=self.n_steps,
            done_share=self.done_share,
            seconds=self.seconds,
            loss=losses.loss,
            margin_loss=losses.margin,
            own_minus_wrong=losses.own_minus_wrong,
            learning_rate=rate,
            monitor=seen,
        )
        self._write_log(progress)
        if self._clock() - self._saved_at >= self.config.checkpoint_every_s:
            self.save()
        return progress

    def finish(self) -> FitResult:
        """Save, take back the weights with the widest gap, and tell how it ended.

        A run that is spent is looked at once more; one that was asked to stop is only saved.
        """
        finished = self.is_finished()
        if finished and self.n_steps % self.config.monitor_every:
            self._look()
        self.save()
        if self.best_gap is not None:
            self.learner.load_state_dict(load_file(self.out_dir / "best" / "learner.safetensors"))
        else:
            self.best_step = self.n_steps
        if self._log is not None:
            self._log.close()
            self._log = None
        return FitResult(
            step=self.n_steps,
            finished=finished,
            best_step=self.best_step,
            best_own_minus_wrong=self.best_gap,
        )

    def save(self) -> None:
        """Write a checkpoint and remove the one before it."""
        final = self.out_dir / f"checkpoint-{self.n_steps}"
        temporary = self.out_dir / f".tmp-{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(self._tensors(), temporary / "run.safetensors")
        content = {
            "config": self.config.fixed(),
            "repositories": self._names,
            "step": self.n_steps,
            "seconds": self.seconds,
            "best_step": self.best_step,
            "best_gap": self.best_gap,
            "cursors": self._sampler.state_dict(),
        }
        (temporary / "run.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for older in _checkpoints(self.out_dir):
            if older != final:
                shutil.rmtree(older)
        self._saved_at = self._clock()

    def resume(self) -> bool:
        """Go on from the newest checkpoint; false where there is none.

        Raises UserError when it was made with other settings.
        """
        found = _checkpoints(self.out_dir)
        if not found:
            return False
        content = json.loads((found[-1] / "run.json").read_text(encoding="utf-8"))
        if content["config"] != self.config.fixed():
            raise UserError(
                f"{found[-1]} was made with other settings",
                hint="give another output folder, or remove this one to begin again",
            )
        if content["repositories"] != self._names:
            raise UserError(
                f"{found[-1]} was made with {len(content['repositories'])} repositories, "
                f"but {len(self._names)} are given, or others",
                hint="give the same repositories, or another output folder",
            )
        self._load_tensors(load_file(found[-1] / "run.safetensors"))
        self._sampler.load_state_dict(content["cursors"])
        self.n_steps, self.seconds = content["step"], content["seconds"]
        self.best_step, self.best_gap = content["best_step"], content["best_gap"]
        return True

    def _learn(self, windows: list[Window]) -> _Losses:
        hidden = self.learner.states(windows, self._carried)
        for row, window in enumerate(windows):
            self._carried[window.repository] = hidden[row, len(window.added)].detach()
        asked = sorted({(row, p) for row, w in enumerate(windows) for p in w.positions})
        if not asked:
            return _Losses(0.0, 0.0, 0.0)
        place = {pair: adapter for adapter, pair in enumerate(asked)}
        lora = self.learner.family.lora(torch.stack([hidden[pair] for pair in asked]))
        repository_of = torch.tensor([row for row, _ in asked])
        own = [place[row, p] for row, w in enumerate(windows) for p in w.positions]
        tokens, labels = collate([item for window in windows for item in window.items])
        index = torch.tensor(own)
        compared = self._compared_rows(len(own), len(set(repository_of.tolist())))
        wrong = wrong_adapters(repository_of, index[compared]) if len(compared) else index[:0]
        # The rows to compare ride along a second time, with their wrong adapters.
        nll, n_tokens = row_nll(
            self._base,
            torch.cat([tokens, tokens[compared]]),
            torch.cat([labels, labels[compared]]),
            lora,
            torch.cat([index, wrong]),
        )
        n_own = len(own)
        loss = nll[:n_own].sum() / n_tokens[:n_own].sum()
        own_mean = nll[compared] / n_tokens[compared]
        wrong_mean = nll[n_own:] / n_tokens[n_own:]
        if len(compared):
            margin = margin_loss(own_mean, wrong_mean, self.config.margin)
            gap = (own_mean - wrong_mean).mean()
        else:
            margin = gap = loss.new_zeros(())
        self._descend(loss + self.config.margin_weight * margin)
        return _Losses(loss.item(), margin.item(), gap.item())

    def _descend(self, loss: Tensor) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.learner.parameters(), self.config.max_grad_norm)
        self._optimizer.step()

    def _compared_rows(self, n_rows: int, n_repositories: int) -> Tensor:
        if n_repositories < 2:
            return torch.empty(0, dtype=torch.long)
        rng = random.Random(f"{self.config.seed}/margin/{self.n_steps}")
        chosen = rng.sample(range(n_rows), min(n_rows, self.config.margin_rows))
        return torch.tensor(sorted(chosen), dtype=torch.long)

    def _set_rates(self) -> float:
        """Warm-up, then level, then linear to the final rate; return the rate of GRU and head."""
        config, share = self.config, self.done_share
        decay = max(0.0, share - config.stable_share) / max(1e-9, 1 - config.stable_share)
        factor = 1 - decay * (1 - config.final_rate_share)
        factor *= min(1.0, (self.n_steps + 1) / max(1, config.warmup_steps))
        for group in self._optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        return factor * config.learning_rate

    def _look(self) -> Evaluation | None:
        if not self._monitor:
            return None
        seen = evaluate(self.learner, self._base, self._monitor, self._monitor_config)
        gap = seen.strata["all"].own_minus_wrong.mean
        if self.best_gap is None or gap < self.best_gap:
            self.best_gap, self.best_step = gap, self.n_steps
            folder = self.out_dir / "best"
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / "learner.safetensors.tmp"
            save_file(_contiguous(self.learner.state_dict()), temporary)
            os.replace(temporary, folder / "learner.safetensors")
        return seen

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"learner.{k}": v for k, v in self.learner.state_dict().items()}
        for name, parameter in self.learner.named_parameters():
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        tensors |= {f"carried.{row}": hidden for row, hidden in self._carried.items()}
        return _contiguous(tensors)

    def _load_tensors(self, tensors: dict[str, Tensor]) -> None:
        def below(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        self.learner.load_state_dict(below("learner."))
        self._carried = {int(row): hidden for row, hidden in below("carried.").items()}
        for name, parameter in self.learner.named_parameters():
            state = {
                key: tensors[f"optimizer.{name}.{key}"]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"optimizer.{name}.{key}" in tensors
            }
            if state:
                self._optimizer.state[parameter] = state

    def _write_log(self, progress: FitProgress) -> None:
        if not self.config.tensorboard:
            return
        if self._log is None:
            from torch.utils.tensorboard import SummaryWriter

            self._log = SummaryWriter(str(self.out_dir / "tensorboard"), purge_step=progress.step)
        scalars = {
            "train/loss": progress.loss,
            "train/margin_loss": progress.margin_loss,
            "train/own_minus_wrong": progress.own_minus_wrong,
            "train/learning_rate": progress.learning_rate,
        }
        if progress.monitor is not None:
            scalars |= {f"unseen/{k}": v for k, v in progress.monitor.headline().items()}
        for name, value in scalars.items():
            self._log.add_scalar(name, value, progress.step)


def fit(
    run: FitRun,
    *,
    progress: Callable[[FitProgress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> FitResult:
    """Resume the run, train until its budget is spent or `stop()`, and return how it ended.

    The learner is left with the weights of the step with the widest gap between own and wrong
    adapters on the monitored repositories, or with the last ones where none were given.
    """
    run.resume()
    while not (run.is_finished() or (stop is not None and stop())):
        report = run.step()
        if progress is not None:
            progress(report)
    return run.finish()


def _optimizer(learner: Learner, config: FitConfig) -> torch.optim.AdamW:
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in learner.named_parameters():
        if name != "table":
            (matrices if parameter.dim() > 1 else vectors).append(parameter)
    rate, encoder_rate = config.learning_rate, config.encoder_learning_rate
    groups = [
        {"params": matrices, "peak": rate, "weight_decay": config.weight_decay},
        {"params": vectors, "peak": rate, "weight_decay": 0.0},
        {"params": [learner.table], "peak": encoder_rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate)


def _checkpoints(out_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in out_dir.glob("checkpoint-*") if (path / "run.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
