from __future__ import annotations

import shutil
from pathlib import Path

from code2lora.hypernetwork.config import EXACT_MATCH
from code2lora.hypernetwork.identity import read_config
from code2lora.hypernetwork.models import resolve_model
from code2lora.training.bundle import assertions_section, note_exact_match


def test_the_card_says_what_was_written_of_assertions() -> None:
    def row(nll: float, exact: float, **minus: float) -> dict[str, object]:
        columns = {
            "nll": {"mean": nll, "low": nll - 1, "high": nll + 1},
            "exact_match": {"mean": exact, "low": exact - 0.05, "high": exact + 0.1},
        }
        against = {other: {"exact_match": {"low": low}} for other, low in minus.items()}
        return {"n_items": 40, "n_repositories": 5, "columns": columns, "minus": against}

    strata = {
        "assertion": {
            "pretrained": row(3.5, 0.05, shared_lora=-0.2),
            "shared_lora": row(2.5, 0.18, pretrained=0.05),
            "memory": row(2.25, 0.2, pretrained=0.07, shared_lora=-0.01),
        }
    }
    titles = {
        "pretrained": "Pretrained",
        "shared_lora": "Shared LoRA",
        "memory": "Code2LoRA-Memory",
    }
    evaluation = {
        "rows": {name: {"title": title} for name, title in titles.items()},
        "suites": {"cross-repo": {"strata": strata}},
    }

    said = assertions_section(evaluation, 9)

    assert "\n40 assertions of 5 repositories of bucket 9, " in said
    assert "\n| Pretrained | 3.5000 | 5.0% (0.0% to 15.0%) |\n" in said
    assert "\n| Code2LoRA-Memory | 2.2500 | 20.0% (15.0% to 30.0%) |\n" in said
    assert said.endswith(
        "\n**Verdict**: in exact match the own adapter beats Pretrained; it does not beat Shared "
        "LoRA.\n"
    )


def test_a_card_without_assertions_says_nothing_of_them() -> None:
    assert assertions_section({"suites": {"cross-repo": {"strata": {"all": {}}}}}, 8) == ""
    assert assertions_section({}, 8) == ""


def test_what_exact_match_gains_goes_into_the_checkpoint(tmp_path: Path) -> None:
    """`status` says it; states that were computed before stay valid."""
    mini = resolve_model("mini", tmp_path).hypernetwork
    shutil.copy(mini / "config.json", tmp_path)
    before = read_config(tmp_path)
    gain = {"mean": 0.1, "low": -0.01, "high": 0.2}
    rows = {"memory": {"minus": {"shared_lora": {"exact_match": gain, "nll": {}}}}}

    note_exact_match(tmp_path, {"suites": {"cross-repo": {"strata": {"assertion": rows}}}})

    after = read_config(tmp_path)
    assert after.metrics == {**before.metrics, EXACT_MATCH: {"shared_lora": gain}}
    assert after.identity() == before.identity()
    note_exact_match(tmp_path, {})
    assert read_config(tmp_path) == after
