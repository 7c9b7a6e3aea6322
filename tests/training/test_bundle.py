from __future__ import annotations

from code2lora.training.bundle import assertions_section


def test_the_card_says_what_was_written_of_assertions() -> None:
    def row(nll: float, exact: float) -> dict[str, object]:
        columns = {
            "nll": {"mean": nll, "low": nll - 1, "high": nll + 1},
            "exact_match": {"mean": exact, "low": exact - 0.05, "high": exact + 0.1},
        }
        return {"n_items": 40, "n_repositories": 5, "columns": columns}

    strata = {"assertion": {"pretrained": row(3.5, 0.05), "memory": row(2.25, 0.2)}}
    evaluation = {
        "rows": {"pretrained": {"title": "Pretrained"}, "memory": {"title": "Code2LoRA-Memory"}},
        "suites": {"cross-repo": {"strata": strata}},
    }

    said = assertions_section(evaluation, 9)

    assert "\n40 assertions of 5 repositories of bucket 9, " in said
    assert "\n| Pretrained | 3.5000 | 5.0% (0.0% to 15.0%) |\n" in said
    assert "\n| Code2LoRA-Memory | 2.2500 | 20.0% (15.0% to 30.0%) |\n" in said


def test_a_card_without_assertions_says_nothing_of_them() -> None:
    assert assertions_section({"suites": {"cross-repo": {"strata": {"all": {}}}}}, 8) == ""
    assert assertions_section({}, 8) == ""
