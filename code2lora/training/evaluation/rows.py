"""The rows of the comparison: what each puts above a prompt, into the decoder, or in its place.

Every row answers the same questions by the same rules (`answers`). What was not trained has no
row, and the report says so.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from code2lora.hypernetwork.heads import first
from code2lora.hypernetwork.lora import Lora
from code2lora.training.data.dataset import RepositoryData
from code2lora.training.data.features import Features, Parts
from code2lora.training.data.shards import Shard
from code2lora.training.evaluation.contexts import Context
from code2lora.training.evaluation.suites import SuiteCase
from code2lora.training.fitting.learner import Learner, told_states
from code2lora.training.fitting.objective import Frozen

PRETRAINED, RAG, DRC = "pretrained", "rag", "drc"
SHARED_LORA, REPOSITORY_LORA = "shared_lora", "repository_lora"
FULL_TUNING, FULL_TUNING_RAG = "full_tuning", "full_tuning_rag"
TEXT_LORA = "text_lora"
STATIC, EVO, MEMORY = "static", "evo", "memory"
GENERIC, WRONG = "generic", "wrong"

TITLES: Mapping[str, str] = {
    PRETRAINED: "Pretrained",
    RAG: "RAG",
    DRC: "Dependency-resolved context",
    FULL_TUNING: "Full fine-tuning",
    FULL_TUNING_RAG: "Full fine-tuning + RAG",
    SHARED_LORA: "Shared LoRA",
    REPOSITORY_LORA: "LoRA per repository",
    TEXT_LORA: "Text2LoRA-style",
    STATIC: "Code2LoRA-Static",
    EVO: "Code2LoRA-Evo",
    MEMORY: "Code2LoRA-Memory",
    GENERIC: "Generic adapter (control)",
    WRONG: "Wrong repository's adapter (control)",
}
"""Row -> what the report calls it, in the report's order."""

ROWS = tuple(TITLES)

Which = Literal["own", "wrong", "generic"]
"""Whose adapter a fitted model's row uses."""

MakeContext = Callable[[Mapping[str, str]], Context]
"""Returns what chooses text for prompts out of told files, path -> text."""


class Row(Protocol):
    """One way to answer."""

    @property
    def name(self) -> str:
        """One of ROWS."""

    def key(self, case: SuiteCase) -> str:
        """Return a digest of what the row answers a case with; equal keys, equal answers."""

    def applies(self, case: SuiteCase) -> bool:
        """Tell whether the row can answer a case."""

    def decoder(self) -> Frozen:
        """Return the decoder that the row writes with."""

    def context(self, case: SuiteCase) -> Context | None:
        """Return what chooses text to put above the prompts of a case, or None."""

    def adapter(self, case: SuiteCase) -> Lora | None:
        """Return the adapter for a case, without a batch axis, or None."""


@dataclass(frozen=True)
class BaseRow:
    """The decoder as it was pretrained, alone or with told text above the prompt."""

    name: str
    base: Frozen
    fingerprint: str
    make_context: MakeContext | None = None

    def key(self, case: SuiteCase) -> str:
        """See `Row`."""
        return digest(self.name, self.fingerprint)

    def applies(self, case: SuiteCase) -> bool:
        """See `Row`."""
        return True

    def decoder(self) -> Frozen:
        """See `Row`."""
        return self.base

    def context(self, case: SuiteCase) -> Context | None:
        """See `Row`."""
        return None if self.make_context is None else self.make_context(case.told())

    def adapter(self, case: SuiteCase) -> Lora | None:
        """See `Row`."""
        return None


@dataclass(frozen=True)
class TunedRow:
    """A decoder whose own weights were trained, with told text above the prompt or without."""

    name: str
    load: Callable[[], Frozen]
    fingerprint: str
    make_context: MakeContext | None = None
    _loaded: list[Frozen] = field(default_factory=list)

    def key(self, case: SuiteCase) -> str:
        """See `Row`."""
        return digest(self.name, self.fingerprint)

    def applies(self, case: SuiteCase) -> bool:
        """See `Row`."""
        return True

    def decoder(self) -> Frozen:
        """See `Row`. It is loaded when it is first asked for, and kept with the row."""
        if not self._loaded:
            self._loaded.append(self.load())
        return self._loaded[0]

    def context(self, case: SuiteCase) -> Context | None:
        """See `Row`."""
        return None if self.make_context is None else self.make_context(case.told())

    def adapter(self, case: SuiteCase) -> Lora | None:
        """See `Row`."""
        return None


@dataclass(frozen=True)
class AdapterRow:
    """Trained adapters beside the base decoder."""

    name: str
    base: Frozen
    fingerprint: str
    adapter_of: Callable[[SuiteCase], Lora | None]
    """None where there is none for the repository; the row then has no answers there."""

    def key(self, case: SuiteCase) -> str:
        """See `Row`."""
        return digest(self.name, self.fingerprint)

    def applies(self, case: SuiteCase) -> bool:
        """See `Row`."""
        return self.adapter_of(case) is not None

    def decoder(self) -> Frozen:
        """See `Row`."""
        return self.base

    def context(self, case: SuiteCase) -> Context | None:
        """See `Row`."""
        return None

    def adapter(self, case: SuiteCase) -> Lora | None:
        """See `Row`."""
        return self.adapter_of(case)


class Adapters:
    """The adapters that one fitted model makes for the cases of a suite, each state made once."""

    def __init__(
        self,
        learner: Learner,
        fingerprint: str,
        read_features: Callable[[Shard], Features | Parts] | None = None,
    ) -> None:
        """fingerprint: of the checkpoint.

        read_features: returns what a frozen encoder made of a repository; None for a learner that
        reads texts.
        """
        self.learner = learner
        self.fingerprint = fingerprint
        self._read_features = read_features
        self._states: dict[tuple[str, str], Tensor] = {}

    def told(self, shard: Shard, data: RepositoryData) -> RepositoryData:
        """Return a repository as the learner reads it: with features where it needs them."""
        if self._read_features is not None:
            data = copy.copy(data)
            data.features = self._read_features(shard)
        return data

    @torch.no_grad()
    def own(self, case: SuiteCase) -> Lora:
        """Return a case's own adapter."""
        place = (case.suite, case.name)
        if place not in self._states:
            data = self.told(case.shard, case.data)
            every = told_states(self.learner, data, case.anchor, case.told_up_to, case.held_out)
            self._states[place] = every[-1]
        return first(self.learner.family.lora(self._states[place][None]))

    @torch.no_grad()
    def generic(self) -> Lora:
        """Return the adapter of the mean training repository."""
        return self.learner.family.generic()


@dataclass(frozen=True)
class FamilyRow:
    """A fitted hypernetwork: each repository's own adapter, another's, or the generic one."""

    name: str
    base: Frozen
    base_fingerprint: str
    adapters: Adapters
    cases: Sequence[SuiteCase]
    """All cases of the suite; the wrong adapter is the next one's."""
    which: Which

    def key(self, case: SuiteCase) -> str:
        """See `Row`."""
        parts = [self.name, self.base_fingerprint, self.adapters.fingerprint]
        return digest(*parts, self._source(case).key())

    def applies(self, case: SuiteCase) -> bool:
        """See `Row`."""
        return self.which != "wrong" or len(self.cases) > 1

    def decoder(self) -> Frozen:
        """See `Row`."""
        return self.base

    def context(self, case: SuiteCase) -> Context | None:
        """See `Row`."""
        return None

    def adapter(self, case: SuiteCase) -> Lora | None:
        """See `Row`."""
        if self.which == "generic":
            return self.adapters.generic()
        return self.adapters.own(self._source(case))

    def _source(self, case: SuiteCase) -> SuiteCase:
        if self.which != "wrong":
            return case
        names = [each.name for each in self.cases]
        return self.cases[(names.index(case.name) + 1) % len(self.cases)]


def digest(*parts: str) -> str:
    """Return one digest of some texts."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
