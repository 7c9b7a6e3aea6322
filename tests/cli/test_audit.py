"""`train audit`: verdicts into words, tables and exit statuses; the asking has tests elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from code2lora.cli import audits
from code2lora.hypernetwork.config import EXACT_MATCH, AuditTest
from tests.cli.conftest import Run
from tests.cli.models import AUDIT, of_mini


@pytest.fixture
def place(tmp_path: Path) -> list[str]:
    for name in ("mined", "base", "out"):
        (tmp_path / name).mkdir()
    return [f"--{name}={tmp_path / name}" for name in ("mined", "base", "out")]


Asked = list[dict[str, Any]]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Asked]:
    """Stand in for the audit itself, with a verdict; the list fills with what is asked for."""
    from code2lora.training import run
    from code2lora.training.audit import stage as audit_stage
    from code2lora.training.audit.geometry import geometry
    from code2lora.training.audit.report import Audit, Ranking

    monkeypatch.setattr(run, "load_decoder", lambda path, **more: path)

    def answering(verdict: str) -> Asked:
        asked: Asked = []
        found = Audit(
            verdict=verdict,
            tests=AUDIT.tests,
            strata={"absent": {"own_minus_base": replace(AUDIT.tests["own_minus_base"], mean=-1)}},
            ranking=Ranking(n_adapters=25, win_rate=0.625, mean_rank=10.0, chance_rank=13.0),
            lambdas=(0.0, 0.5),
            along_own=(2.5, 2.25),
            along_wrong=(2.5, 2.75),
            geometry=geometry("ab", np.array([[4.0, 3.0], [3.0, 4.0]])),
            n_repositories=25,
            n_items=582,
        )

        def audit_model(*arguments: Any, **named: Any) -> Any:
            asked.append({"recipe": arguments[0], **named})
            named["progress"](1, 2)
            path = tmp_path / "out" / "audit.json"
            return audit_stage.AuditResult(found, path, found.to_dict())

        monkeypatch.setattr(audit_stage, "audit_model", audit_model)
        return asked

    return answering


def test_a_failed_audit_as_a_table(
    code2lora: Run, place: list[str], answer: Callable[[str], Asked], tmp_path: Path
) -> None:
    answer("failed")

    done = code2lora("train", "audit", *place)

    assert done.status == 4
    assert done.err == "auditing 50%  row 1 of 2\n"
    assert done.out == (
        "TEST               RESULT           MEAN       95 % INTERVAL   ABSENT\n"
        "own_minus_mean     not measured\n"
        "own_minus_generic  failed        +0.0052  -0.0010 to +0.0121\n"
        "own_minus_base     passed        -0.1154  -0.1300 to -0.1000  -1.0000\n"
        "freshness_10       failed        +0.0000  -0.5000 to +0.2500\n"
        "\n"
        "  verdict   failed: the own adapter does not beat the generic one; 1 more test failed\n"
        "  asked     582 rows of 25 repositories\n"
        "  rank      10.00 of 25, chance 13; better than 62% of the others\n"
        "  lambda                  0       0.5\n"
        "            own      2.5000    2.2500\n"
        "            wrong    2.5000    2.7500\n"
        "  geometry  cosine 0.7500, residual 0.3536, participation 1.00\n"
        f"  written   {tmp_path / 'out' / 'audit.json'}\n"
    )


@pytest.mark.parametrize(("verdict", "status"), [("passed", 0), ("failed", 4), ("incomplete", 5)])
def test_the_exit_status_is_the_verdict(
    code2lora: Run, place: list[str], answer: Callable[[str], Asked], verdict: str, status: int
) -> None:
    answer(verdict)

    done = code2lora("train", "audit", *place, "--json")

    assert done.status == status
    content = json.loads(done.out)
    assert content["verdict"] == verdict
    assert content["lambda_curve"] == {
        "lambdas": [0, 0.5],
        "own": [2.5, 2.25],
        "wrong": [2.5, 2.75],
    }


def test_options_reach_the_audit(
    code2lora: Run, place: list[str], answer: Callable[[str], Asked], tmp_path: Path
) -> None:
    asked = answer("passed")

    code2lora("train", "audit", *place)
    code2lora("train", "audit", *place, "--items=9", f"--shared={tmp_path}", "--test-bucket")

    assert [(each["shared"], each["test"]) for each in asked] == [(None, False), (tmp_path, True)]
    sizes = [(each["recipe"].audit.items, each["recipe"].audit.fresh_items) for each in asked]
    assert sizes == [(24, 24), (9, 9)]


def test_an_interrupted_audit_leaves_nothing(
    code2lora: Run, place: list[str], answer: Callable[[str], Asked], monkeypatch: Any
) -> None:
    from code2lora.training.audit import stage as audit_stage
    from code2lora.training.audit.scores import Stopped

    def stopped(*_: Any, **__: Any) -> None:
        raise Stopped

    answer("passed")
    monkeypatch.setattr(audit_stage, "audit_model", stopped)

    done = code2lora("train", "audit", *place)

    assert (done.status, done.out, done.err) == (130, "", "stopped; nothing was written\n")


def test_every_verdict_in_a_line() -> None:
    passed = replace(AUDIT, verdict="passed", n_repositories=1)
    incomplete = replace(AUDIT, verdict="incomplete")
    one = {name: AUDIT.tests[name] for name in ("own_minus_base", "freshness_10")}
    unknown = {"other": AuditTest(passed=False)}

    assert audits.in_a_line(None) == "not audited"
    assert audits.in_a_line(passed) == "passed on 1 repository"
    assert audits.in_a_line(incomplete) == (
        "incomplete on 25 repositories: a comparison that is needed could not be made"
    )
    assert audits.in_a_line(replace(AUDIT, tests=one)) == (
        "failed: the newest adapter does not beat older ones on what came since"
    )
    assert audits.in_a_line(replace(AUDIT, tests=unknown)) == "failed on 25 repositories"


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ({"pretrained": {"low": 0.01}, "shared_lora": {"low": 0.002}}, ""),
        (
            {"pretrained": {"low": 0.05}, "shared_lora": {"low": -0.04}},
            "; exact match no better than the shared LoRA's",
        ),
        (
            {"shared_lora": {"low": 0}, "pretrained": {"low": -0.1}},
            "; exact match no better than the base model's and the shared LoRA's",
        ),
        ({"pretrained": {"low": "-1"}, "shared_lora": [-1], "other": {"low": -1}}, ""),
        ([-1], ""),
    ],
)
def test_whose_exact_match_is_not_beaten(gains: object, said: str) -> None:
    assert audits.not_written_better({EXACT_MATCH: gains}) == said
    assert audits.not_written_better({}) == ""


def test_the_words_need_no_torch() -> None:
    """`status` says them, and starts in a fraction of what torch takes."""
    script = (
        "import sys; from code2lora.cli import audits; "
        "from code2lora.hypernetwork.config import AuditRecord; audits.in_a_line(None); "
        "from code2lora.cli.overview import audit_view; "
        "from code2lora.settings import load_settings; "
        "print(audit_view(load_settings(), None).text, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{of_mini()} False\n", "")
