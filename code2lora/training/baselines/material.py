"""Gather what the trained rows work on: repositories, questions, the frozen base, the schedule.

Reads   mined shards, the base decoder, the run of the model that the rows are compared with.

Everything is made when the first row needs it, and shared by the rows of one call.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from code2lora.errors import UserError
from code2lora.hypernetwork.config import Recipe as EncoderRecipe
from code2lora.hypernetwork.encoder import Encoder, load_encoder
from code2lora.training.baselines.context_items import ContextItems, RetrievedContexts, with_context
from code2lora.training.baselines.loading import (
    FULL_TUNING_RAG,
    REPOSITORY_LORA,
    SHARED_LORA,
    TEXT_LORA,
)
from code2lora.training.baselines.own_past import task_row
from code2lora.training.baselines.text_head import description_encoder
from code2lora.training.baselines.tuning import ItemSource, NothingTold, SampledItems, TuneConfig
from code2lora.training.data.dataset import RepositoryData
from code2lora.training.data.shards import Shard, read_shards
from code2lora.training.evaluation.contexts import Chunks
from code2lora.training.evaluation.suites import (
    CROSS_REPO,
    IN_REPO,
    SuiteCase,
    suite_cases,
    suite_shards,
)
from code2lora.training.fitting.items import Item, ItemBuilder
from code2lora.training.fitting.objective import Frozen, freeze
from code2lora.training.fitting.run_files import checkpoints
from code2lora.training.fitting.windows import WindowSampler
from code2lora.training.recipe import Recipe
from code2lora.training.run import Decoder, split

_SPEED_ONLY = ("suites", "repositories_at_once")
"""Settings of the repositories' LoRAs that say which and how fast, but not what they become."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What the rows are compared with, and on which repositories."""

    like: Path | None = None
    """The fitted model's folder: the shared rows take as many steps as its run, where the recipe
    does not say how many."""
    description_encoder: Path | None = None
    """A sentence-transformers encoder for the descriptions; without one the decoder's own
    embeddings are used."""
    test: bool = False
    """Train LoRAs for the repositories of the test bucket in place of the validation bucket's."""


class BaselineMaterial:
    """What the rows of one call share."""

    def __init__(self, recipe: Recipe, mined: Path, decoder: Decoder, compared: Compared) -> None:
        self.recipe = recipe
        self.decoder = decoder
        self.compared = compared
        self.builder = ItemBuilder(decoder.tokenizer, recipe.fit.items, end_id=decoder.end_id)
        learner = recipe.fit.learner
        self.holds_out = learner.encoder == "lines" or learner.family == "memory"
        """Whether the hypernetwork can be asked for files; see `fitting.inputs`."""
        self._mined = mined

    @cached_property
    def training(self) -> list[RepositoryData]:
        """The training repositories, in the order of the hypernetwork's sampler."""
        return _load(split(self._mined)[0])

    @cached_property
    def validation(self) -> list[RepositoryData]:
        """The validation repositories."""
        return _load(split(self._mined)[1])

    @cached_property
    def base(self) -> Frozen:
        """The decoder, as the hypernetwork's rows go through it."""
        fit = self.recipe.fit
        return freeze(
            self.decoder.model,
            autocast=fit.autocast_bf16,
            n_lanes=fit.n_lanes,
            rows_per_pass=fit.rows_per_pass,
            checkpointing=fit.checkpointing,
        )

    @cached_property
    def steps(self) -> int:
        """The steps of the shared rows. Raises UserError when nothing says how many."""
        steps = self.recipe.baselines.steps or self.recipe.fit.max_steps
        if steps is None and self.compared.like is not None:
            found = checkpoints(self.compared.like / "run")
            if found:
                steps = int(json.loads((found[-1] / "run.json").read_text("utf-8"))["step"])
        if steps is None:
            raise UserError(
                "nothing says how many steps the rows are to take",
                hint="give the fitted model with `--like MODEL`, or `--steps N`",
            )
        return steps

    def sampler(self) -> WindowSampler:
        """Return a fresh sampler of the hypernetwork's own items."""
        return WindowSampler(
            self.training,
            self.builder,
            self.recipe.fit.windows,
            inputs=NothingTold(holds_out=self.holds_out),
            seed=self.recipe.fit.seed,
        )

    def source(self, row: str) -> ItemSource:
        """Return the items that a row is trained on."""
        if row != FULL_TUNING_RAG:
            return SampledItems(self.sampler())
        return ContextItems(self.sampler(), self.training, self._contexts, begin=self._begin)

    def watched(self, row: str) -> list[Item]:
        """Return fixed rows of the validation repositories, the same targets for every row."""
        fit, most = self.recipe.fit, self.recipe.baselines.watched_rows
        rows = []
        for case in self._watched_cases:
            data = case.data
            rng = random.Random(f"{fit.seed}/{data.name}/watched")
            for targets in (
                data.file_targets(case.anchor, case.held_out),
                data.commit_targets(case.told_up_to + 1, data.n_commits),
            ):
                for target in rng.sample(targets, min(len(targets), most)):
                    item = task_row(data, target, self.builder, rng)
                    if item is not None and row == FULL_TUNING_RAG:
                        item = with_context(item, self._contexts(data, target), self._begin)
                    rows += [item] if item is not None else []
        return rows

    def suite(self, suite: str) -> list[SuiteCase]:
        """Return the evaluation's cases of a suite."""
        shards = suite_shards(suite, self._shards, self.recipe.evaluate, test=self.compared.test)
        known = {data.name: data for data in (*self.training, *self.validation)}
        if self.compared.test and suite != IN_REPO:
            return self._cases(suite, shards, _load(shards))
        return self._cases(suite, shards, [known[shard.name] for shard in shards])

    def encoder(self) -> Encoder:
        """Return the frozen encoder of descriptions."""
        directory = self.compared.description_encoder
        if directory is not None:
            reading = EncoderRecipe(diff="paper", snapshot="paper", rules="paper")
            return load_encoder(directory, reading, self.base.device)
        embeddings: Tensor = self.decoder.model.get_input_embeddings().get_parameter("weight")
        return description_encoder(
            self.decoder.tokenizer,
            embeddings,
            self.training,
            description_lines=self.recipe.baselines.description_lines,
        )

    def schedule(self, row: str) -> TuneConfig:
        """Return the schedule of a shared row: that of the hypernetwork, at the row's own rate."""
        fit, config = self.recipe.fit, self.recipe.baselines
        return TuneConfig(
            steps=self.steps,
            learning_rate=self._rate(row),
            weight_decay=config.weight_decay,
            warmup_steps=fit.warmup_steps,
            stable_share=fit.stable_share,
            final_rate_share=fit.final_rate_share,
            max_grad_norm=fit.max_grad_norm,
            watch_every=config.watch_every,
            checkpoint_every_s=config.checkpoint_every_s,
        )

    def settings(self, row: str) -> dict[str, Any]:
        """Return, as JSON values, what must be the same for a row to go on or to be kept."""
        config = self.recipe.baselines
        values: dict[str, Any] = {
            "fit": self.recipe.fit.fixed(),
            "base": self.decoder.config.fingerprint,
            "learning_rate": self._rate(row),
            "weight_decay": config.weight_decay,
        }
        if row == REPOSITORY_LORA:
            own = asdict(config.repository)
            values["repository"] = {k: v for k, v in own.items() if k not in _SPEED_ONLY}
        else:
            values |= {"steps": self.steps, "repositories": [each.name for each in self.training]}
        if row == TEXT_LORA:
            values["description_lines"] = config.description_lines
        if row == FULL_TUNING_RAG:
            evaluate = self.recipe.evaluate
            values["context"] = [self._context_tokens, evaluate.chunk_tokens, evaluate.chunks]
        found: dict[str, Any] = json.loads(json.dumps(values))
        return found

    def _rate(self, row: str) -> float:
        config = self.recipe.baselines
        rates = {
            SHARED_LORA: config.lora_learning_rate,
            TEXT_LORA: self.recipe.fit.learning_rate,
            REPOSITORY_LORA: config.repository.learning_rate,
        }
        return rates.get(row, config.full_learning_rate)

    @cached_property
    def _shards(self) -> list[Shard]:
        return list(read_shards(self._mined))

    @cached_property
    def _watched_cases(self) -> list[SuiteCase]:
        shards = [each for each in self._shards if each.split == "cr_val"]
        return self._cases(CROSS_REPO, shards, self.validation)

    @cached_property
    def _contexts(self) -> RetrievedContexts:
        evaluate = self.recipe.evaluate
        return RetrievedContexts(
            self.decoder.tokenizer,
            lambda files, encode: Chunks(
                files, encode, chunk_tokens=evaluate.chunk_tokens, k=evaluate.chunks
            ),
            max_tokens=self._context_tokens,
        )

    @property
    def _context_tokens(self) -> int:
        evaluate = self.recipe.evaluate
        return self.recipe.baselines.context_tokens or evaluate.chunks * evaluate.chunk_tokens

    @property
    def _begin(self) -> list[int]:
        """What the tokenizer begins every text with."""
        ids: list[int] = self.decoder.tokenizer.encode("").ids
        return ids

    def _cases(
        self, suite: str, shards: Sequence[Shard], data: Sequence[RepositoryData]
    ) -> list[SuiteCase]:
        """Return the evaluation's cases; a leak changes what is asked there, not what is told."""
        config = self.recipe.evaluate
        if not self.holds_out:
            config = replace(config, held_out_share=0.0, file_items=0)
        return suite_cases(suite, shards, data, config, lambda data, target: False)


def _load(shards: Sequence[Shard]) -> list[RepositoryData]:
    """Return repositories without what only the hypernetwork on code is told."""
    return [RepositoryData(shard, None) for shard in shards]
