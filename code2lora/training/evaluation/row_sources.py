"""Find the rows that can be measured: fitted models, trained baselines, and what needs no training.

Reads   <baselines>/<row>/ (see `fitting.baselines`), the fitted models' folders
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from code2lora.errors import UserError
from code2lora.hypernetwork.config import BaseConfig
from code2lora.hypernetwork.gru_family import GruFamily
from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.memory_family import MemoryFamily
from code2lora.training.baselines.loading import (
    FULL_TUNING_RAG,
    TUNED_ROWS,
    Baseline,
    is_trained,
    load_baseline,
)
from code2lora.training.evaluation.contexts import Chunks, Context, Definitions
from code2lora.training.evaluation.evaluate import EvaluateConfig
from code2lora.training.evaluation.prompts import Prompts
from code2lora.training.evaluation.rows import (
    DRC,
    EVO,
    GENERIC,
    MEMORY,
    PRETRAINED,
    RAG,
    ROWS,
    STATIC,
    WRONG,
    AdapterRow,
    Adapters,
    BaseRow,
    FamilyRow,
    Row,
    TunedRow,
    Which,
    digest,
)
from code2lora.training.evaluation.suites import SuiteCase
from code2lora.training.fitting.objective import Frozen, freeze


@dataclass(frozen=True)
class RowSources:
    """What rows are made of."""

    base: Frozen
    base_config: BaseConfig
    prompts: Prompts
    config: EvaluateConfig
    models: Mapping[str, Adapters]
    """`static` or `evo` -> the fitted model; the first one's adapters are the controls'."""
    baselines: Path | None
    notes: list[str] = field(default_factory=list)
    """Fills with what rows could not answer, and why."""

    def rows(self, names: Sequence[str], cases: Sequence[SuiteCase]) -> list[Row]:
        """Return those of the named rows that there is something for, in the report's order."""
        found = [self._row(name, cases) for name in ROWS if name in names]
        return [row for row in found if row is not None]

    def reason(self, name: str) -> str:
        """Say why there is no row of a name."""
        if name in (STATIC, EVO, MEMORY, GENERIC, WRONG):
            return "no fitted model of this kind was given"
        if self.baselines is None:
            return "no trained baselines were given"
        return f"{self.baselines / name} holds no trained baseline"

    def _row(self, name: str, cases: Sequence[SuiteCase]) -> Row | None:
        if name in (PRETRAINED, RAG, DRC):
            makers = {PRETRAINED: None, RAG: self._chunks, DRC: self._definitions}
            return BaseRow(name, self.base, self._fingerprint(name), makers[name])
        if name in (STATIC, EVO, MEMORY):
            return self._family(name, name, cases) if name in self.models else None
        if name in (GENERIC, WRONG):
            return self._family(name, next(iter(self.models)), cases) if self.models else None
        if self.baselines is None or not is_trained(self.baselines / name):
            return None
        return self._baseline(name, self.baselines / name)

    def _family(self, name: str, model: str, cases: Sequence[SuiteCase]) -> Row:
        adapters = self.models[model]
        base = self._fingerprint(name)
        which: Which = "own"
        if name in (WRONG, GENERIC):
            which = "wrong" if name == WRONG else "generic"
        return FamilyRow(name, self.base, base, adapters, cases, which)

    def _baseline(self, name: str, path: Path) -> Row:
        baseline = load_baseline(path, self.base_config)
        fingerprint = self._fingerprint(name, baseline.fingerprint())
        if name not in TUNED_ROWS:
            return AdapterRow(name, self.base, fingerprint, _Trained(baseline, self.notes))

        def load() -> Frozen:
            model = baseline.decoder()
            if model is None:
                raise UserError(f"{path} holds no decoder", hint="train the baseline again")
            nn.Module.to(model, self.base.device, self.base.lanes[0].model.dtype)
            return freeze(model, autocast=self.base.autocast)

        context = self._chunks if name == FULL_TUNING_RAG else None
        return TunedRow(name, load, fingerprint, context)

    def _fingerprint(self, name: str, of_row: str = "") -> str:
        """Return a digest of what a row's answers come from, beside the prompts' settings."""
        chunks = (self.config.chunks, self.config.chunk_tokens) if "rag" in name else ()
        base = self.base_config.fingerprint or self.base_config.id
        return digest(base, of_row, str(chunks))

    def _chunks(self, files: Mapping[str, str]) -> Context:
        config = self.config
        return Chunks(files, self.prompts.encode, chunk_tokens=config.chunk_tokens, k=config.chunks)

    def _definitions(self, files: Mapping[str, str]) -> Context:
        return Definitions(files, self.prompts.encode)


def family_row(family: object) -> str:
    """Return the row that a family's own adapters are."""
    if isinstance(family, MemoryFamily):
        return MEMORY
    return EVO if isinstance(family, GruFamily) else STATIC


@dataclass(frozen=True)
class _Trained:
    """A baseline's adapters; one that knows what is asked is noted and not used."""

    baseline: Baseline
    notes: list[str]

    def __call__(self, case: SuiteCase) -> Lora | None:
        try:
            return self.baseline.adapter(case)
        except UserError as error:
            note = f"{case.suite}: {error}"
            if note not in self.notes:
                self.notes.append(note)
            return None
