"""Train the LoRAs of many repositories, a group at a time, and keep each with what it knows.

Writes  <path>/<repository>/up-to-<commit>/ (adapter and manifest), <path>/run/<group>/ meanwhile

A LoRA that is complete is left alone, so a call that was cut off goes on, and one with further
repositories adds theirs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from code2lora.errors import UserError
from code2lora.hypernetwork.config import BaseConfig
from code2lora.training.baselines.config import BaselineConfig
from code2lora.training.baselines.loading import (
    RUN,
    OwnManifest,
    own_folder,
    read_own_manifest,
    write_manifest,
)
from code2lora.training.baselines.lora_files import write_lora
from code2lora.training.baselines.own_past import Past
from code2lora.training.baselines.repository_lora import BankProgress, BankRun
from code2lora.training.baselines.shared_lora import LoraBank
from code2lora.training.fitting.items import ItemBuilder
from code2lora.training.fitting.objective import Frozen
from code2lora.training.fitting.schedule import FitConfig

Tell = Callable[[float, str], None]
"""Called with the share that is done, 0 to 1, and what is being done."""


@dataclass(frozen=True, kw_only=True)
class OwnLoras:
    """What the LoRAs are made with."""

    path: Path
    fit: FitConfig
    config: BaselineConfig
    base: Frozen
    base_config: BaseConfig
    builder: ItemBuilder
    settings: Mapping[str, Any]
    """JSON values that are the same for LoRAs that can be compared."""

    def train(
        self, pasts: Sequence[Past], tell: Tell, stop: Callable[[], bool] | None
    ) -> list[OwnManifest]:
        """Train what is not there yet and return the manifests of all that are, in order.

        There are fewer of them than pasts when it was asked to stop. Raises UserError when a LoRA
        of other settings is in the way.
        """
        done = {place: found for place, past in enumerate(pasts) if (found := self._kept(past))}
        missing = [place for place in range(len(pasts)) if place not in done]
        size = self.config.repository.repositories_at_once
        for start in range(0, len(missing), size):
            places = missing[start : start + size]
            group = [pasts[place] for place in places]
            n_before = len(done)

            def report(now: BankProgress, group: Sequence[Past] = group, n: int = n_before) -> None:
                share = (n + now.done_share * len(group)) / len(pasts)
                said = f"{n + now.n_done} of {len(pasts)}, step {now.step}, loss {now.loss:.3f}"
                tell(share, said)

            manifests = self._group(group, report, stop)
            if manifests is None:
                break
            done |= dict(zip(places, manifests, strict=True))
        return [done[place] for place in sorted(done)]

    def _group(
        self,
        pasts: Sequence[Past],
        report: Callable[[BankProgress], None],
        stop: Callable[[], bool] | None,
    ) -> list[OwnManifest] | None:
        """Train some LoRAs together and write them; None when it was asked to stop."""
        learner = self.fit.learner
        bank = LoraBank(
            self.base_config,
            rank=learner.rank,
            alpha=learner.alpha,
            seed=self.fit.seed,
            n_adapters=len(pasts),
        )
        nn.Module.to(bank, self.base.device)
        folder = self.path / RUN / self._group_name(pasts)
        run = BankRun(
            pasts,
            self.config.repository,
            folder,
            bank=bank,
            base=self.base,
            builder=self.builder,
            length_power=self.fit.length_power,
            max_grad_norm=self.fit.max_grad_norm,
            weight_decay=self.config.weight_decay,
            seed=self.fit.seed,
            identity=self.settings,
            checkpoint_every_s=self.config.checkpoint_every_s,
        )
        if not run.run(progress=report, stop=stop):
            return None
        manifests = [self._write(past, run, owner) for owner, past in enumerate(pasts)]
        shutil.rmtree(folder, ignore_errors=True)
        return manifests

    def _write(self, past: Past, run: BankRun, owner: int) -> OwnManifest:
        course = run.courses[owner]
        folder = own_folder(self.path, past.data, past.told_up_to)
        folder.mkdir(parents=True, exist_ok=True)
        write_lora(folder / "adapter", run.lora(owner), self.base_config)
        manifest = OwnManifest(
            repository=past.data.name,
            n_commits=past.data.n_commits,
            told_up_to=past.told_up_to,
            hidden=sorted(past.hidden),
            n_tasks=len(past.tasks),
            n_sources=len(past.sources),
            best_step=course.best_step,
            base_nll=course.base_nll,
            best_nll=course.best_nll,
            settings=dict(self.settings),
        )
        write_manifest(folder, manifest)
        return manifest

    def _kept(self, past: Past) -> OwnManifest | None:
        """Return the manifest of the LoRA that is there already."""
        folder = own_folder(self.path, past.data, past.told_up_to)
        found = read_own_manifest(folder)
        if found is None:
            return None
        same = (found.settings, found.n_commits) == (self.settings, past.data.n_commits)
        if not same or not past.hidden <= set(found.hidden):
            raise UserError(
                f"{folder} was trained with other settings or on other files",
                hint="remove it, or give another output folder",
            )
        return found

    def _group_name(self, pasts: Sequence[Past]) -> str:
        content = [[past.data.name, past.told_up_to, sorted(past.hidden)] for past in pasts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
