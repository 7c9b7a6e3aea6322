"""Measure fitted models and their rivals on the same questions: `code2lora train evaluate`.

Reads   mined shards, the base decoder, fitted models, trained baselines
Writes  <out>/evaluation.json, <out>/report/, the headline figures into the checkpoint's
        configuration, and <out>/evaluation/: the answers, which a second run does not make again

With the test repositories in place of the validation ones the names are `evaluation-test`, and the
checkpoint is left as it is.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from code2lora.errors import UserError
from code2lora.hypernetwork.checkpoint import LoadedFamily
from code2lora.hypernetwork.identity import write_config
from code2lora.hypernetwork.models import ModelPaths
from code2lora.training.data.dataset import RepositoryData, load_repositories
from code2lora.training.data.features import RELEASED_FILE, Features, Parts, read_features
from code2lora.training.data.leakage import Leaks
from code2lora.training.data.shards import Shard
from code2lora.training.evaluation.answers import AnswerConfig, Answering
from code2lora.training.evaluation.compare import Scored, scored
from code2lora.training.evaluation.evaluate import EvaluateConfig, evaluate, prepare
from code2lora.training.evaluation.findings import (
    VERSION,
    Findings,
    SuiteFindings,
    write_findings,
)
from code2lora.training.evaluation.page import write_report
from code2lora.training.evaluation.prompts import PromptConfig, Prompts
from code2lora.training.evaluation.report import Evaluation
from code2lora.training.evaluation.row_sources import RowSources, family_row
from code2lora.training.evaluation.rows import ROWS, TITLES, Adapters
from code2lora.training.evaluation.suites import (
    CROSS_REPO,
    IN_REPO,
    SUITES,
    suite_cases,
    suite_shards,
)
from code2lora.training.fitted import load_fitted
from code2lora.training.fitting.inputs import LexicalInputs
from code2lora.training.fitting.items import ItemBuilder
from code2lora.training.fitting.learner import Learner
from code2lora.training.fitting.objective import Frozen, freeze
from code2lora.training.recipe import Recipe
from code2lora.training.split import TEST_BUCKET, VALIDATION_BUCKET

if TYPE_CHECKING:
    from code2lora.training.run import Decoder

TEST_EVALUATION = "evaluation-test.json"
"""What the evaluation of the test repositories writes."""

Progress = Callable[[float, str], None]
"""Called with the share that is done, 0 to 1, and what is being done."""


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What to measure."""

    suites: tuple[str, ...] = SUITES
    rows: tuple[str, ...] = ROWS
    baselines: Path | None = None
    """What the stage of the baselines wrote."""
    also: tuple[Path, ...] = ()
    """Folders of further fitted models; a model's family is its row."""
    test: bool = False
    """Ask the repositories of the test bucket in place of the validation bucket's."""


@dataclass(frozen=True)
class _Fitted:
    """One fitted model, ready to make adapters."""

    path: Path
    loaded: LoadedFamily
    adapters: Adapters

    @property
    def learner(self) -> Learner:
        return self.adapters.learner


def measure(
    recipe: Recipe,
    shards: Sequence[Shard],
    leaks: Leaks,
    decoder: Decoder,
    out_dir: Path,
    measuring: Measuring,
    *,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> Findings:
    """Measure a fitted model, and the rows beside it, and write what was found.

    shards: all that were mined; each says what it is for
    leaks: the targets that must not be asked
    Nothing but answers is written when it is asked to stop.
    Raises UserError when a model is missing or a suite has too few repositories.
    """
    run = _Run(recipe, shards, leaks, decoder, out_dir, measuring, progress, stop)
    conditioning = run.conditioning() if CROSS_REPO in measuring.suites else None
    suites = {suite: run.suite(suite) for suite in measuring.suites}
    finished = not run.stopped
    name = TEST_EVALUATION.removesuffix(".json") if measuring.test else "evaluation"
    path, folder = out_dir / f"{name}.json", out_dir / name.replace("evaluation", "report")
    content = run.content(conditioning, suites) if finished else {}
    if finished:
        write_findings(content, path)
        write_report(
            folder, content, _read_audit(out_dir / f"{name.replace('evaluation', 'audit')}.json")
        )
        if conditioning is not None and not measuring.test:
            run.note_in_checkpoint(conditioning)
    return Findings(conditioning, content, finished, path, folder / "index.html")


class _Run:
    """One call of `measure`."""

    def __init__(
        self,
        recipe: Recipe,
        shards: Sequence[Shard],
        leaks: Leaks,
        decoder: Decoder,
        out_dir: Path,
        measuring: Measuring,
        progress: Progress | None,
        stop: Callable[[], bool] | None,
    ) -> None:
        self._recipe = recipe
        self._shards = shards
        self._leaks = leaks
        self._decoder = decoder
        self._out_dir = out_dir
        self._measuring = measuring
        self._progress = progress
        self._stop = stop
        self.stopped = False
        self._models = [_fitted(path, decoder) for path in (out_dir, *measuring.also)]
        self._base = freeze(
            decoder.model, autocast=recipe.fit.autocast_bf16, n_lanes=recipe.fit.n_lanes
        )
        self._config = recipe.evaluate
        if not all(model.learner.inputs.holds_out for model in self._models):
            # What a frozen encoder made of a snapshot holds every file: none may be asked for.
            self._config = dataclasses.replace(self._config, held_out_share=0.0, file_items=0)
        self._prompts = Prompts(decoder.tokenizer, _prompt_config(self._config, self._base))
        self._sources = RowSources(
            base=self._base,
            base_config=decoder.config,
            prompts=self._prompts,
            config=self._config,
            models={family_row(model.loaded.family): model.adapters for model in self._models},
            baselines=measuring.baselines,
        )
        self._loaded: dict[str, list[RepositoryData]] = {}

    def conditioning(self) -> Evaluation:
        """Return the figures of the fitted model against the generic and wrong adapters."""
        model = self._models[0]
        pairs = zip(self._chosen(CROSS_REPO), self._data(CROSS_REPO), strict=True)
        data = [model.adapters.told(shard, each) for shard, each in pairs]
        builder = ItemBuilder(self._decoder.tokenizer, self._recipe.fit.items)
        cases = prepare(data, builder, self._config, self._leaks)
        if len(cases) < 2:
            kind, number = self._held_out()
            raise UserError(
                f"{len(cases)} {kind} repositories, expected at least 2",
                hint=f"mine repositories of bucket {number}",
            )
        return evaluate(
            model.learner,
            self._base,
            cases,
            self._config,
            progress=lambda done, total: self._tell(0.0, f"adapters of {done} of {total}"),
        )

    def suite(self, suite: str) -> SuiteFindings:
        """Return what every row makes of a suite."""
        shards, data = self._chosen(suite), self._data(suite)
        cases = suite_cases(suite, shards, data, self._config, self._leaks)
        rows = self._sources.rows(self._measuring.rows, cases)
        config = self._config
        limits = AnswerConfig(
            max_new_tokens=config.max_new_tokens,
            rows_per_pass=config.rows_per_pass,
            repositories_per_pass=config.repositories_per_pass,
        )
        answering = Answering(self._prompts, limits, self._out_dir / "evaluation")
        found: dict[str, list[Scored]] = {}
        total = max(1, len(rows) * len(cases))
        done = 0
        for row in rows:
            for case, answers in answering.answers(row, cases, self._asked_to_stop):
                each = scored(case, answers, self._prompts, config.max_new_tokens)
                found.setdefault(row.name, []).append(each)
                done += 1
                self._tell(self._share(suite, done / total), f"{suite}, {TITLES[row.name]}")
        in_order = {case.name: number for number, case in enumerate(cases)}
        return SuiteFindings(
            cases,
            {name: sorted(each, key=lambda s: in_order[s.name]) for name, each in found.items()},
        )

    def content(
        self, conditioning: Evaluation | None, suites: dict[str, SuiteFindings]
    ) -> dict[str, Any]:
        """Return the whole of `evaluation.json`."""
        config = self._config
        measured = {name for suite in suites.values() for name, each in suite.rows.items() if each}
        training = [shard.name for shard in self._shards if shard.split == "train"]
        return {
            "version": VERSION,
            **({} if conditioning is None else conditioning.to_dict()),
            "suites": {
                name: each.to_dict(resamples=config.resamples, seed=config.seed)
                for name, each in suites.items()
                if each.rows
            },
            "rows": {
                name: {
                    "title": TITLES[name],
                    "measured": name in measured,
                    "reason": "" if name in measured else self._reason(name),
                }
                for name in ROWS
            },
            "notes": self._sources.notes,
            "settings": {
                "seed": config.seed,
                "suites": list(self._measuring.suites),
                "bucket": self._held_out()[1],
                "prompts": asdict(self._prompts.config),
                "evaluate": asdict(config),
                "items": asdict(self._recipe.fit.items),
            },
            "model": self._fingerprints(),
            "data": {
                "training_repositories": training,
                "mined": {shard.name: shard.manifest.get("head") for shard in self._shards},
                "leakage": {
                    "n_targets": self._leaks.n_targets,
                    "n_in_repository": self._leaks.n_in_repository,
                    "n_across": self._leaks.n_across,
                },
            },
        }

    def note_in_checkpoint(self, conditioning: Evaluation) -> None:
        """Put the headline figures into the configuration of the fitted model."""
        model = self._models[0]
        config = dataclasses.replace(model.loaded.config, metrics=dict(conditioning.headline()))
        write_config(model.path / "hypernetwork", config)

    def _reason(self, name: str) -> str:
        if name not in self._measuring.rows:
            return "it was not asked for"
        found = self._sources.rows([name], [])
        return "it could answer no repository" if found else self._sources.reason(name)

    def _fingerprints(self) -> dict[str, str]:
        base = self._decoder.config
        found = {"base": base.id, "base fingerprint": base.fingerprint or ""}
        for model in self._models:
            row = family_row(model.loaded.family)
            found[f"{row} hypernetwork"] = model.loaded.fingerprint
            found[f"{row} encoder"] = model.loaded.encoder_fingerprint
        return found

    def _held_out(self) -> tuple[str, int]:
        """Return what the held-out repositories are called, and their bucket."""
        if self._measuring.test:
            return "test", TEST_BUCKET
        return "validation", VALIDATION_BUCKET

    def _chosen(self, suite: str) -> list[Shard]:
        return suite_shards(suite, self._shards, self._config, test=self._measuring.test)

    def _data(self, suite: str) -> list[RepositoryData]:
        """Return a suite's repositories; those of two suites are read once."""
        whose = "training" if suite == IN_REPO else "held out"
        if whose not in self._loaded:
            shards = self._chosen(suite)
            if any(isinstance(model.learner.inputs, LexicalInputs) for model in self._models):
                self._loaded[whose] = load_repositories(shards, self._decoder.tokenizer)
            else:
                self._loaded[whose] = [RepositoryData(shard, None) for shard in shards]
        return self._loaded[whose]

    def _asked_to_stop(self) -> bool:
        self.stopped = self.stopped or (self._stop is not None and self._stop())
        return self.stopped

    def _share(self, suite: str, of_suite: float) -> float:
        suites = self._measuring.suites
        return (suites.index(suite) + of_suite) / len(suites)

    def _tell(self, share: float, said: str) -> None:
        if self._progress is not None:
            self._progress(share, said)


def _fitted(path: Path, decoder: Decoder) -> _Fitted:
    paths = ModelPaths(
        name=path.name,
        base=decoder.path,
        encoder=path / "encoder",
        hypernetwork=path / "hypernetwork",
        card=path / "MODEL_CARD.md",
    )
    loaded = load_fitted(paths, decoder.model.device)
    learner = Learner(loaded.family)
    if isinstance(learner.inputs, LexicalInputs):
        return _Fitted(path, loaded, Adapters(learner, loaded.fingerprint))

    def features(shard: Shard) -> Features | Parts:
        # An imported data set came with vectors of its own, for checkpoints that take any encoder.
        released = loaded.config.encoder.fingerprint is None
        released = released and (shard.path / RELEASED_FILE).is_file()
        return read_features(shard, None if released else loaded.encoder_fingerprint)

    return _Fitted(path, loaded, Adapters(learner, loaded.fingerprint, features))


def _prompt_config(config: EvaluateConfig, base: Frozen) -> PromptConfig:
    """Return the prompts' sizes: what is asked for, or what the decoder's positions leave."""
    longest = base.lanes[0].model.config.max_position_embeddings
    return PromptConfig(
        prompt_tokens=min(config.prompt_tokens, longest - config.max_new_tokens),
        context_share=config.context_share,
    )


def _read_audit(path: Path) -> dict[str, Any] | None:
    """Return what `train audit` wrote, or None where it has not run."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}", hint="remove it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no audit", hint="remove it")
    return content
