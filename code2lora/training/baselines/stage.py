"""Train the rows that the hypernetwork is compared with: what `code2lora train baselines` runs.

    mined, base, a fitted model  -> <out>/<row>/, a folder for each row (see `fitting.baselines`)

Every shared row takes the items of the hypernetwork's own sampler, with its seed, for as many
steps. A row goes on where it was cut off, and one that is complete is left alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from code2lora.errors import UserError
from code2lora.training.baselines.full_tuning import FullTuning
from code2lora.training.baselines.loading import (
    REPOSITORY_LORA,
    ROWS,
    RUN,
    SHARED_LORA,
    TEXT_LORA,
    Manifest,
    is_trained,
    load_baseline,
    write_manifest,
)
from code2lora.training.baselines.lora_files import write_lora
from code2lora.training.baselines.material import BaselineMaterial, Compared
from code2lora.training.baselines.own_past import pasts_of
from code2lora.training.baselines.repository_loras import OwnLoras, Tell
from code2lora.training.baselines.shared_lora import LoraBank, SharedLora
from code2lora.training.baselines.text_head import build_text_learner, save_text_head
from code2lora.training.baselines.tuning import Trainee, TuneRun
from code2lora.training.evaluation.evaluate import prepare
from code2lora.training.fitting.fit import FitRun
from code2lora.training.fitting.fit import fit as fit_run
from code2lora.training.fitting.material import monitor_settings
from code2lora.training.recipe import Recipe
from code2lora.training.run import Decoder

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt")

Stop = Callable[[], bool] | None


@dataclass(frozen=True, kw_only=True)
class BaselineResult:
    """How the training of one row ended; `finished` is false when it was asked to stop."""

    row: str
    path: Path
    finished: bool
    steps: int
    best_step: int
    """The step whose weights are kept; of the LoRAs of repositories, the latest."""
    watched_nll: float | None = None
    """Nats per token of validation rows with those weights; of the LoRAs of repositories, the
    mean over their own. None where the row is chosen by something else."""


def train_baselines(
    recipe: Recipe,
    mined: Path,
    decoder: Decoder,
    out_dir: Path,
    rows: Sequence[str] = ROWS,
    compared: Compared | None = None,
    *,
    progress: Tell | None = None,
    stop: Stop = None,
) -> list[BaselineResult]:
    """Train rows one after the other and return how each ended, up to the first that was stopped.

    progress: called with the share that is done, 0 to 1, and what is being done
    Raises UserError when a row is unknown, when nothing says how many steps to take, or when a run
    or a row of other settings is in the way.
    """
    for row in rows:
        if row not in ROWS:
            raise UserError(f"there is no row {row!r}", hint=f"one of: {', '.join(ROWS)}")
    stage = _Stage(BaselineMaterial(recipe, mined, decoder, compared or Compared()), out_dir)
    results: list[BaselineResult] = []
    for number, row in enumerate(rows):

        def tell(share: float, said: str, number: int = number, row: str = row) -> None:
            if progress is not None:
                progress((number + share) / len(rows), f"{row}: {said}")

        results.append(stage.train(row, tell, stop))
        if not results[-1].finished:
            break
    return results


class _Stage:
    """One call of `train_baselines`."""

    def __init__(self, material: BaselineMaterial, out_dir: Path) -> None:
        self._material = material
        self._config = material.recipe.baselines
        self._fit = material.recipe.fit
        self._decoder = material.decoder
        self._out_dir = out_dir

    def train(self, row: str, tell: Tell, stop: Stop) -> BaselineResult:
        """Train a row, or say how it ended when it is complete."""
        path = self._out_dir / row
        path.mkdir(parents=True, exist_ok=True)
        if row == REPOSITORY_LORA:
            result = self._repository_lora(path, tell, stop)
        elif is_trained(path):
            return self._earlier(row, path)
        elif row == TEXT_LORA:
            result = self._text_lora(path, tell, stop)
        elif row == SHARED_LORA:
            result = self._shared_lora(path, tell, stop)
        else:
            result = self._full_tuning(row, path, tell, stop)
        if result.finished:
            self._complete(result)
        return result

    def _shared_lora(self, path: Path, tell: Tell, stop: Stop) -> BaselineResult:
        learner, base = self._fit.learner, self._material.base
        bank = LoraBank(
            self._decoder.config, rank=learner.rank, alpha=learner.alpha, seed=self._fit.seed
        )
        nn.Module.to(bank, base.device)
        trainee = SharedLora(bank, base, length_power=self._fit.length_power)
        result = self._tune(SHARED_LORA, path, trainee, tell, stop)
        if result.finished:
            write_lora(path / "adapter", bank.one(0), self._decoder.config)
        return result

    def _full_tuning(self, row: str, path: Path, tell: Tell, stop: Stop) -> BaselineResult:
        full = FullTuning(
            self._decoder.model,
            rows_per_pass=self._config.rows_per_pass,
            autocast=self._fit.autocast_bf16,
            checkpoint_activations=self._config.checkpoint_activations,
            length_power=self._fit.length_power,
        )
        result = self._tune(row, path, full, tell, stop)
        if result.finished:
            self._save_decoder(full, path / "model")
        return result

    def _tune(
        self, row: str, path: Path, trainee: Trainee, tell: Tell, stop: Stop
    ) -> BaselineResult:
        """Train on the hypernetwork's items, behind contexts in the row that has them."""
        run = TuneRun(
            self._material.schedule(row),
            path / RUN,
            trainee=trainee,
            source=self._material.source(row),
            watched=self._material.watched(row),
            identity=self._material.settings(row),
        )
        result = run.run(
            progress=lambda now: tell(now.done_share, f"step {now.step}, loss {now.loss:.3f}"),
            stop=stop,
        )
        return BaselineResult(
            row=row,
            path=path,
            finished=result.finished,
            steps=result.step,
            best_step=result.best_step,
            watched_nll=result.best_watched,
        )

    def _text_lora(self, path: Path, tell: Tell, stop: Stop) -> BaselineResult:
        """Train a head on descriptions by the hypernetwork's own loop, with its losses."""
        material = self._material
        encoder = material.encoder()
        learner = build_text_learner(
            self._fit.learner,
            self._decoder.config,
            encoder,
            description_lines=self._config.description_lines,
            holds_out=material.holds_out,
            seed=self._fit.seed,
        )
        nn.Module.to(learner, material.base.device)
        looks = monitor_settings(material.recipe)
        run = FitRun(
            replace(self._fit, max_steps=material.steps, max_seconds=None, patience=None),
            path / RUN,
            learner=learner,
            base=material.base,
            builder=material.builder,
            repositories=material.training,
            monitor=prepare(material.validation, material.builder, looks),
            monitor_config=looks,
        )
        result = fit_run(
            run,
            progress=lambda now: tell(now.done_share, f"step {now.step}, loss {now.loss:.3f}"),
            stop=stop,
        )
        if result.finished:
            given = material.compared.description_encoder
            save_text_head(path, learner, self._fit.learner, self._decoder.config, encoder, given)
        return BaselineResult(
            row=TEXT_LORA,
            path=path,
            finished=result.finished,
            steps=result.step,
            best_step=result.best_step,
        )

    def _repository_lora(self, path: Path, tell: Tell, stop: Stop) -> BaselineResult:
        own = self._config.repository
        loras = OwnLoras(
            path=path,
            fit=self._fit,
            config=self._config,
            base=self._material.base,
            base_config=self._decoder.config,
            builder=self._material.builder,
            settings=self._material.settings(REPOSITORY_LORA),
        )
        asked = [case for suite in own.suites for case in self._material.suite(suite)]
        pasts = pasts_of(asked, own, seed=self._fit.seed)
        done = loras.train(pasts, tell, stop)
        return BaselineResult(
            row=REPOSITORY_LORA,
            path=path,
            finished=len(done) == len(pasts),
            steps=own.max_steps,
            best_step=max((each.best_step for each in done), default=0),
            watched_nll=sum(each.best_nll for each in done) / len(done) if done else None,
        )

    def _complete(self, result: BaselineResult) -> None:
        """Write the row's manifest, which makes it complete, and remove what led to it."""
        base = self._decoder.config
        manifest = Manifest(
            row=result.row,
            base=base.id,
            base_fingerprint=base.fingerprint,
            steps=result.steps,
            best_step=result.best_step,
            watched_nll=result.watched_nll,
            settings=self._material.settings(result.row),
        )
        write_manifest(result.path, manifest)
        shutil.rmtree(result.path / RUN, ignore_errors=True)

    def _earlier(self, row: str, path: Path) -> BaselineResult:
        """Return how a complete row ended. Raises UserError when it had other settings."""
        manifest = load_baseline(path, self._decoder.config).manifest
        if manifest.settings != self._material.settings(row):
            raise UserError(
                f"{path} was trained with other settings or repositories",
                hint="remove it, or give another output folder",
            )
        return BaselineResult(
            row=row,
            path=path,
            finished=True,
            steps=manifest.steps,
            best_step=manifest.best_step,
            watched_nll=manifest.watched_nll,
        )

    def _save_decoder(self, full: FullTuning, path: Path) -> None:
        """Write a directory that Transformers and the servers can load.

        In float32: a few steps at a small rate move weights by less than bfloat16 can hold.
        """
        shutil.rmtree(path, ignore_errors=True)
        full.model.save_pretrained(path)
        for pattern in _TOKENIZER_FILES:
            for file in self._decoder.path.glob(pattern):
                shutil.copyfile(file, path / file.name)
