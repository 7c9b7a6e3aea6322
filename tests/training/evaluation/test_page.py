from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from code2lora.training.evaluation.compare import COLUMNS
from code2lora.training.evaluation.page import write_report
from code2lora.training.evaluation.rows import TITLES

EVIL = "<script>alert('$x^2$ & \"x\"')</script>"
INTERVAL = {"mean": 0.25, "low": -0.5, "high": 1.0}
PNG = b"\x89PNG\r\n\x1a\n"


def findings() -> dict[str, Any]:
    columns = dict.fromkeys(COLUMNS, INTERVAL)

    def row(*references: str) -> dict[str, Any]:
        return {
            "n_repositories": 2,
            "n_items": 1234,
            "columns": columns,
            "over_items": dict.fromkeys(COLUMNS, 0.125),
            "minus": {reference: columns for reference in references},
        }

    rows = {"pretrained": row(), "evo": row("pretrained")}
    bin_ = {"first": 1, "last": 2, "n_repositories": 2, "n_items": 3, "gain": INTERVAL}
    return {
        "model": {"base": EVIL, "base fingerprint": "ab"},
        "rows": {
            name: {"title": title, "measured": name in rows, "reason": EVIL}
            for name, title in TITLES.items()
        },
        "suites": {
            "cross-repo": {
                "strata": {"all": rows, "absent": rows},
                "decay": {"evo": [bin_, bin_ | {"first": 3, "last": None}], "rag": []},
                "repositories": [
                    {"name": EVIL, "n_items": 3, "anchor": 0, "told_up_to": 7, "held_out_files": 1}
                ],
            }
        },
        "settings": {"seed": 1, EVIL: EVIL},
        "data": {
            "training_repositories": [EVIL],
            "leakage": {"n_targets": 9, "n_in_repository": 2, "n_across": 1},
        },
    }


AUDIT = {
    "verdict": EVIL,
    "lambda_curve": {"lambdas": [0, 1], "own": [2.0, 1.0], "wrong": [2.0, 3.0]},
    "geometry": {
        "names": [EVIL, "b"],
        "cosine": [[1.0, 0.5], [0.5, 1.0]],
        "residual_ratio": [0.1, 0.2],
        "participation_ratio": 1.5,
    },
}


@pytest.fixture
def page(tmp_path: Path) -> str:
    return write_report(tmp_path / "report", findings(), AUDIT).read_text("utf-8")


def test_no_text_becomes_markup(page: str) -> None:
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 7
    tags = {tag.lower() for tag in re.findall(r"<([a-zA-Z0-9]+)", page)}
    assert not tags & {"script", "iframe", "object", "link", "form", "a"}


def test_everything_is_inside_the_page(page: str, tmp_path: Path) -> None:
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    images = sorted((tmp_path / "report").glob("*.png"))
    assert [image.stem for image in images] == [
        "decay-cross-repo",
        "geometry",
        "lambda",
        "rows-cross-repo",
    ]
    assert all(image.read_bytes().startswith(PNG) for image in images)


def test_figures_differences_and_missing_rows_are_shown(page: str) -> None:
    assert "1,234 questions, 2 repositories" in page
    assert "<td>Code2LoRA-Evo</td><td>0.2500 (-0.5000 to 1.0000)</td>" in page
    assert "<td>+0.2500 (-0.5000 to +1.0000)</td>" in page
    assert f"<li>{TITLES['shared_lora']}: " in page
    assert f"<li>{TITLES['evo']}: " not in page
    assert "3 of 9 targets" in page


def test_an_interval_beside_its_mean_is_drawn(tmp_path: Path) -> None:
    found = findings()
    odd = {column: {"mean": 0.5, "low": 0.6, "high": 0.7} for column in COLUMNS}
    found["suites"]["cross-repo"]["strata"]["all"]["evo"]["columns"] = odd
    assert write_report(tmp_path, found, None).is_file()


def test_without_an_audit_there_is_none(tmp_path: Path) -> None:
    page = write_report(tmp_path, findings(), None).read_text("utf-8")
    assert "Audit" not in page
    assert not (tmp_path / "lambda.png").exists()
    assert not list(tmp_path.glob(".tmp*"))
