"""What an evaluation found, as JSON values: the file `evaluation.json` and what is read out of it.

The conditioning figures of `report.Evaluation` stand at the top level, where a model card finds
them; the comparison of rows stands under `suites`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from code2lora.training.evaluation.compare import Scored, compare, decay
from code2lora.training.evaluation.report import Evaluation
from code2lora.training.evaluation.rows import PRETRAINED, SHARED_LORA, TITLES
from code2lora.training.evaluation.suites import SuiteCase

VERSION = 2
"""Raised whenever a key of the file changes its meaning."""

REFERENCES = (PRETRAINED, SHARED_LORA)
"""Rows that the others' differences are taken to."""


@dataclass(frozen=True)
class SuiteFindings:
    """One suite: who was asked, and what each row made of it."""

    cases: Sequence[SuiteCase]
    rows: Mapping[str, Sequence[Scored]]

    def to_dict(self, *, resamples: int, seed: int) -> dict[str, Any]:
        """Return figures with intervals as JSON values; the same seed gives the same ones."""
        rows = {name: self.rows[name] for name in TITLES if self.rows.get(name)}
        strata = compare(rows, REFERENCES, resamples=resamples, seed=seed)
        pretrained = rows.get(PRETRAINED, ())
        return {
            "repositories": [
                {
                    "name": case.name,
                    "n_items": len(case.questions),
                    "anchor": case.anchor,
                    "told_up_to": case.told_up_to,
                    "held_out_files": len(case.held_out),
                }
                for case in self.cases
            ],
            "strata": {
                stratum: {name: asdict(each) for name, each in figures.items()}
                for stratum, figures in strata.items()
            },
            "decay": {
                name: [
                    asdict(each)
                    for each in decay(found, pretrained, resamples=resamples, seed=seed)
                ]
                for name, found in rows.items()
                if name != PRETRAINED
            },
            "per_repository": {
                name: {each.name: _per_repository(each) for each in found}
                for name, found in rows.items()
            },
        }


@dataclass(frozen=True)
class Findings:
    """Everything that an evaluation found."""

    conditioning: Evaluation | None
    """None where the suite cross-repo was not asked for."""
    content: dict[str, Any]
    """The whole of `evaluation.json`."""
    finished: bool
    """False when it was asked to stop before every row had answered."""
    path: Path
    """`evaluation.json`; not written yet unless finished."""
    page: Path

    def headline(self) -> dict[str, float]:
        """Return the conditioning figures for a checkpoint's metrics and a model card."""
        return {} if self.conditioning is None else self.conditioning.headline()


def write_findings(content: Mapping[str, Any], path: Path) -> None:
    """Write the file; an interrupted write leaves the old one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _per_repository(found: Scored) -> dict[str, float]:
    every = found.mask("all")
    return {name: found.mean(name, every) for name in found.values}
