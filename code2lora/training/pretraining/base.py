"""Turn a corpus and a tokenizer into a small base decoder, trained from scratch on a CPU.

Reads   source files held in memory, and its own newest checkpoint when there is one.
Writes  <run>/config.json, <run>/checkpoint-<step>/, <run>/export/, optionally <run>/tensorboard/

A checkpoint folder is renamed into place when complete and only then is its predecessor removed,
so a kill at any line costs at most the steps since the last checkpoint.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from code2lora.training.pretraining.base_config import BaseConfig
from code2lora.training.pretraining.corpus import SourceFile
from code2lora.training.pretraining.decoder import (
    build_model,
    build_optimizers,
    export_model,
    head_loss,
)
from code2lora.training.pretraining.ranks import agreed, n_ranks, rank, sum_gradients, summed
from code2lora.training.pretraining.stream import TokenStream, line_ends, validation_rows
from code2lora.training.pretraining.tokenizer import END_OF_TEXT, token_id

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BaseProgress:
    """What the callback of `fit_base` is told after a step."""

    step: int
    n_tokens: int
    epoch: int
    done_share: float
    loss: float
    """Mean over the step, in nats per token."""
    learning_rate: float
    tokens_per_s: float
    validation_loss: float | None = None
    """Nats per token of plain held-out text; None for steps without validation."""
    bits_per_byte: float | None = None


@dataclass(frozen=True, kw_only=True)
class BaseResult:
    """How a run ended; ``finished`` is false when it was asked to stop."""

    step: int
    n_tokens: int
    finished: bool
    validation_loss: float
    bits_per_byte: float
    lines_matched: float
    """Share of held-out lines that greedy decoding writes exactly, after all that is above them."""
    export_dir: Path


def fit_base(
    config: BaseConfig,
    out_dir: Path,
    *,
    train_files: Sequence[SourceFile],
    validation_files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    progress: Callable[[BaseProgress], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.time,
) -> BaseResult:
    """Train until the budget is spent or ``should_stop()``, then export to ``<out_dir>/export``
    and write ``<out_dir>/figures.json`` for the model card.

    A run folder with a checkpoint is resumed, and then ends as it would have without the break. A
    run that is asked to stop leaves a checkpoint and exports what it has.

    Inside an initialised process group the rows of a step are shared among the ranks, and rank 0
    alone decides when to stop, reports and writes. On a busy CPU two ranks of one thread are much
    faster than one rank of two, because they wait for each other once a step, not at every product.
    """
    run = BaseRun(config, out_dir, train_files, validation_files, tokenizer, clock)
    run.resume()
    while not (run.is_finished() or agreed(float(should_stop()))):
        report = run.step()
        if progress is not None and rank() == 0:
            progress(report)
    loss, bits_per_byte = run.validate()
    lines_matched = run.lines_matched()
    export_dir = out_dir / "export"
    if rank() == 0:
        run.save()
        export_model(run.model, tokenizer, export_dir)
        figures = {
            "n_tokens": run.n_tokens,
            "n_parameters": sum(p.numel() for p in run.model.parameters()),
            "validation_loss": loss,
            "bits_per_byte": bits_per_byte,
            "lines_matched": lines_matched,
        }
        (out_dir / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    run.close()
    return BaseResult(
        step=run.n_steps,
        n_tokens=run.n_tokens,
        finished=run.is_finished(),
        validation_loss=loss,
        bits_per_byte=bits_per_byte,
        lines_matched=lines_matched,
        export_dir=export_dir,
    )


class BaseRun:
    """The state of one run: model, optimizers, stream and counters."""

    def __init__(
        self,
        config: BaseConfig,
        out_dir: Path,
        train_files: Sequence[SourceFile],
        validation_files: Sequence[SourceFile],
        tokenizer: Tokenizer,
        clock: Callable[[], float],
    ) -> None:
        if config.max_tokens is None and config.deadline_unix_s is None:
            raise ValueError("a run needs max_tokens or deadline_unix_s")
        if config.rows_per_step % (config.rows_per_pass * n_ranks()):
            raise ValueError("rows_per_pass times the ranks must divide rows_per_step")
        torch.set_num_threads(config.n_threads)
        self.config = config
        self.out_dir = out_dir
        self.model = build_model(config, end_id=token_id(tokenizer, END_OF_TEXT))
        self.optimizers = build_optimizers(self.model, config)
        self.stream = TokenStream(
            train_files,
            tokenizer,
            row_tokens=config.row_tokens + 1,
            seed=config.seed,
            hole_share=config.hole_share,
            header_share=config.header_share,
            excerpt_chars=config.excerpt_chars,
        )
        self.n_steps = 0
        self.n_tokens = 0
        self._clock = clock
        self._started_unix_s = clock()
        self._saved_unix_s = clock()
        self._line_ends = line_ends(tokenizer)
        self._validation = list(
            validation_rows(
                validation_files,
                tokenizer,
                row_tokens=config.row_tokens + 1,
                n_rows=config.validation_rows,
            )
        )
        self._decoder: Callable[..., Any] = (
            torch.compile(self.model.model) if config.compile else self.model.model
        )
        out_dir.mkdir(parents=True, exist_ok=True)
        self._scalars: Any = None
        if rank() == 0:
            _write_json(out_dir / "config.json", asdict(config))
            if config.tensorboard:
                self._scalars = _scalar_writer(out_dir / "tensorboard")

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one."""
        folder = newest_checkpoint(self.out_dir)
        if folder is None:
            return
        self.model.load_state_dict(_with_head(load_file(folder / "model.safetensors")))
        state = torch.load(folder / "state.pt", weights_only=True)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.stream.load_state_dict(state["stream"])
        self.n_steps = state["n_steps"]
        self.n_tokens = state["n_tokens"]
        self._started_unix_s = state["started_unix_s"]
        logger.info("resumed %s at step %d", folder, self.n_steps)

    def done_share(self) -> float:
        """The share of the budget that is spent, in 0..1."""
        shares = [0.0]
        if self.config.max_tokens is not None:
            shares.append(self.n_tokens / self.config.max_tokens)
        if self.config.deadline_unix_s is not None:
            span_s = self.config.deadline_unix_s - self._started_unix_s
            elapsed_s = self._clock() - self._started_unix_s
            shares.append(elapsed_s / span_s if span_s > 0 else 1.0)
        return agreed(min(1.0, max(shares)))

    def is_finished(self) -> bool:
        """Whether the budget is spent."""
        return self.done_share() >= 1.0

    def step(self) -> BaseProgress:
        """Take one optimizer step, and validate and save where they are due."""
        began_s = self._clock()
        factor = rate_factor(self.config, n_steps=self.n_steps, done_share=self.done_share())
        loss = self._accumulate()
        adamw_parameters = self.optimizers[1].param_groups[0]["params"]
        nn.utils.clip_grad_norm_(adamw_parameters, self.config.max_grad_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.n_steps += 1
        n_new = self.config.rows_per_step * self.config.row_tokens
        self.n_tokens += n_new
        tokens_per_s = n_new / max(self._clock() - began_s, 1e-9)
        validation, bits = None, None
        if self.n_steps % self.config.validate_every_steps == 0:
            validation, bits = self.validate()
        is_due = self._clock() - self._saved_unix_s >= self.config.checkpoint_every_s
        if is_due and rank() == 0:
            self.save()
        report = BaseProgress(
            step=self.n_steps,
            n_tokens=self.n_tokens,
            epoch=self.stream.epoch,
            done_share=self.done_share(),
            loss=loss,
            learning_rate=self.config.muon_lr * factor,
            tokens_per_s=tokens_per_s,
            validation_loss=validation,
            bits_per_byte=bits,
        )
        self._log_scalars(report)
        return report

    def _accumulate(self) -> float:
        """Add the gradients of one step's rows; returns their mean loss."""
        config = self.config
        rows = self.stream.rows(config.rows_per_step)
        n_passes = config.rows_per_step // config.rows_per_pass
        total = 0.0
        # Every rank draws all rows, so that every rank's stream is in the same state.
        for part in rows[rank() :: n_ranks()].split(config.rows_per_pass):
            loss = self._loss(self._decoder, part) / n_passes
            loss.backward()
            total += loss.item()
        if n_ranks() > 1:
            sum_gradients(self.model)
        return summed(total)

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Return nats per token and bits per byte on the held-out rows; NaN when there are none."""
        if not self._validation:
            return math.nan, math.nan
        rows = torch.tensor([ids for ids, _ in self._validation])
        nats = 0.0
        for part in rows[rank() :: n_ranks()].split(self.config.rows_per_pass):
            nats += self._loss(self.model.model, part).item() * part[:, 1:].numel()
        nats = summed(nats)
        size_bytes = sum(size for _, size in self._validation)
        return nats / rows[:, 1:].numel(), nats / math.log(2) / size_bytes

    def lines_matched(self) -> float:
        """Return the share of held-out lines that greedy decoding writes; NaN without any."""
        if not self._validation:
            return math.nan
        n_matched, n_lines = 0, 0
        rows = torch.tensor([ids for ids, _ in self._validation])
        for part in rows[rank() :: n_ranks()].split(self.config.rows_per_pass):
            matched, lines = matched_lines(self.model, part, self._line_ends)
            n_matched, n_lines = n_matched + matched, n_lines + lines
        of_all = summed(n_lines)
        return summed(n_matched) / of_all if of_all else math.nan

    def save(self) -> None:
        """Write a checkpoint, then remove the ones before it."""
        folder = self.out_dir / f"checkpoint-{self.n_steps:08d}"
        self._saved_unix_s = self._clock()
        if folder.exists():
            return
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        weights = dict(self.model.state_dict())
        weights.pop("lm_head.weight", None)  # tied; safetensors refuses shared storage
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        state = {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "stream": self.stream.state_dict(),
            "n_steps": self.n_steps,
            "n_tokens": self.n_tokens,
            "started_unix_s": self._started_unix_s,
        }
        torch.save(state, temporary / "state.pt")
        os.replace(temporary, folder)
        for old in _checkpoints(self.out_dir):
            if old != folder:
                shutil.rmtree(old)

    def close(self) -> None:
        """Flush what was logged."""
        if self._scalars is not None:
            self._scalars.close()

    def _loss(self, decoder: Callable[..., Any], rows: Tensor) -> Tensor:
        """The mean loss of rows, (N, row_tokens + 1), in nats per token."""
        dtype = torch.bfloat16 if self.config.autocast_bf16 else torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.autocast_bf16):
            hidden = decoder(input_ids=rows[:, :-1], use_cache=False)[0]
        # Under autocast the residual stream stays float32, so the head would be taken in it.
        return head_loss(hidden.to(dtype), self.model.lm_head.weight, rows[:, 1:])

    def _log_scalars(self, report: BaseProgress) -> None:
        if self._scalars is None:
            return
        for name in ("loss", "learning_rate", "tokens_per_s", "validation_loss", "bits_per_byte"):
            value = getattr(report, name)
            if value is not None:
                self._scalars.add_scalar(name, value, report.step)


def rate_factor(config: BaseConfig, *, n_steps: int, done_share: float) -> float:
    """The learning rate as a share of its peak: warm-up, plateau, linear to zero."""
    warm = min(1.0, (n_steps + 1) / max(1, config.warmup_steps))
    decay = min(1.0, (1.0 - done_share) / max(1e-9, 1.0 - config.stable_share))
    return warm * decay


def export_checkpoint(run_dir: Path, tokenizer: Tokenizer, out_dir: Path) -> int:
    """Export the newest checkpoint of a run that may still be going on; returns its step."""
    folder = newest_checkpoint(run_dir)
    if folder is None:
        raise FileNotFoundError(f"no checkpoint in {run_dir}")
    saved = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    model = build_model(BaseConfig(**saved), end_id=token_id(tokenizer, END_OF_TEXT))
    model.load_state_dict(_with_head(load_file(folder / "model.safetensors")))
    export_model(model, tokenizer, out_dir)
    return int(folder.name.removeprefix("checkpoint-"))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The folder of the newest complete checkpoint, or None."""
    return max(_checkpoints(run_dir), default=None)


@torch.no_grad()
def matched_lines(decoder: Any, rows: Tensor, ends: Collection[int]) -> tuple[int, int]:
    """Return how many lines of some rows greedy decoding writes exactly, and how many there are.

    It does when each token of a line is the likeliest after the true ones before it. Blank lines do
    not count, nor those that a row shows in part.

    rows: (N, T); ends: tokens that hold a line break
    """
    hits = decoder(input_ids=rows[:, :-1]).logits.argmax(-1) == rows[:, 1:]
    n_matched, n_lines = 0, 0
    for tokens, hit in zip(rows[:, 1:].tolist(), hits.tolist(), strict=True):
        breaks = [i for i, token in enumerate(tokens) if token in ends]
        lines = [(a + 1, b + 1) for a, b in itertools.pairwise(breaks) if b > a + 1]
        n_lines += len(lines)
        n_matched += sum(all(hit[a:b]) for a, b in lines)
    return n_matched, n_lines


def _checkpoints(run_dir: Path) -> list[Path]:
    return [path for path in run_dir.glob("checkpoint-*") if path.suffix != ".tmp"]


def _with_head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}


def _scalar_writer(out_dir: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # an extra, and slow to import

    return SummaryWriter(str(out_dir))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
