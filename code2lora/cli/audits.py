"""Say what an audit found, in one line or test by test. No torch here: `status` says it too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from code2lora.cli import render
from code2lora.hypernetwork.config import EXACT_MATCH

if TYPE_CHECKING:
    from code2lora.hypernetwork.config import AuditRecord, AuditTest

NOT_AUDITED = "not audited"

_RIVALS = {"pretrained": "the base model's", "shared_lora": "the shared LoRA's"}
"""Whom the own adapter is compared with in exact match, in words."""

_FAILURES = {
    "own_minus_base": "the own adapter does not beat the base model alone",
    "own_minus_generic": "the own adapter does not beat the generic one",
    "own_minus_mean": "the own adapter does not beat the mean of others",
    "own_minus_wrong": "the own adapter does not beat other repositories'",
    "own_minus_shared": "the own adapter does not beat the shared LoRA",
    "lambda_curve": "what is the repository's own does no better than what is another's",
    "freshness": "the newest adapter does not beat older ones on what came since",
    "shuffle": "the order of the commits makes no difference",
}
"""Test, or the beginning of its name, -> what it means that it failed; the gravest first."""


def verdict(record: AuditRecord | None) -> str:
    """Return `passed`, `failed`, `incomplete` or `not audited`."""
    return NOT_AUDITED if record is None else record.verdict


def in_a_line(record: AuditRecord | None) -> str:
    """Return the verdict with its reason."""
    if record is None:
        return NOT_AUDITED
    where = f"on {render.count(record.n_repositories, 'repository', 'repositories')}"
    if record.verdict == "passed":
        return f"passed {where}"
    if record.verdict == "incomplete":
        return f"incomplete {where}: a comparison that is needed could not be made"
    failed = [name for name, test in record.tests.items() if test.passed is False]
    known = [said for name, said in _FAILURES.items() if any(t.startswith(name) for t in failed)]
    more = len(failed) - 1
    rest = f"; {render.count(more, 'more test')} failed" if more > 0 else ""
    return f"failed: {known[0]}{rest}" if known else f"failed {where}"


def not_written_better(metrics: Mapping[str, Any]) -> str:
    """Return whose exact match the own adapter does not beat, in a clause; nothing if nobody's.

    metrics: of a checkpoint; what is not of the expected form is passed over
    """
    gains = metrics.get(EXACT_MATCH)
    if not isinstance(gains, Mapping):
        return ""
    lost = []
    for rival, said in _RIVALS.items():
        gain = gains.get(rival)
        low = gain.get("low") if isinstance(gain, Mapping) else None
        if isinstance(low, (int, float)) and low <= 0:
            lost.append(said)
    return f"; exact match no better than {' and '.join(lost)}" if lost else ""


def in_rows(record: AuditRecord | None) -> list[tuple[str, str]]:
    """Return labels and values: the verdict, then each test with its figures."""
    rows = [("audit", in_a_line(record))]
    if record is not None:
        for name, test in record.tests.items():
            rows.append((f"audit.{render.line(name)}", f"{result(test)}{_figures(test)}"))
    return rows


def result(test: AuditTest) -> str:
    """Return `passed`, `failed` or `not measured`."""
    return {True: "passed", False: "failed", None: "not measured"}[test.passed]


def interval(test: AuditTest) -> str:
    """Return the 95 % interval of a test, or nothing where it was not measured."""
    if test.low is None or test.high is None:
        return ""
    return f"{test.low:+.4f} to {test.high:+.4f}"


def mean(test: AuditTest) -> str:
    """Return the mean of a test, or nothing where it was not measured."""
    return "" if test.mean is None else f"{test.mean:+.4f}"


def _figures(test: AuditTest) -> str:
    return "" if test.mean is None else f", {mean(test)} ({interval(test)})"
