"""`models`: what a model directory says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from code2lora.settings import Settings
from tests.cli.conftest import Run
from tests.cli.models import AUDIT, make_model


@pytest.fixture
def pulled(home: Settings) -> Path:
    return make_model(home.models_dir / "tiny")


def test_the_list(
    code2lora: Run, home: Settings, pulled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODE2LORA_MODEL", "tiny")
    other = make_model(home.models_dir / "another", audit=AUDIT)
    done = code2lora("models")
    assert (done.status, done.err) == (0, "")
    rows = [line.split() for line in done.out.splitlines()]
    assert rows[0] == ["NAME", "BASE", "MODEL", "AUDIT", "SIZE", "PATH"]
    assert ["another", "tiny-base", "failed", "10.0", "kB", str(other)] in rows
    assert ["*", "tiny", "tiny-base", "not", "audited", "10.0", "kB", str(pulled)] in rows
    assert code2lora("models", "list").out == done.out
    found = {
        model["name"]: model for model in json.loads(code2lora("models", "list", "--json").out)
    }
    assert (found["tiny"]["in_use"], found["another"]["in_use"]) == (True, False)
    assert (found["tiny"]["audit"], found["another"]["audit"]) == ("not audited", "failed")


def test_one_model(code2lora: Run, pulled: Path) -> None:
    done = code2lora("models", "show", "tiny")
    assert (done.status, done.err) == (0, "")
    assert done.out == (
        "  name               tiny\n"
        f"  path               {pulled}\n"
        "  base               6.0 kB, tiny-base, 2 layers\n"
        "  encoder            2 B, tiny-encoder, width 7\n"
        "  hypernetwork       4.0 kB, family gru, head factorized, rank 5\n"
        f"  base path          {pulled / 'base'}\n"
        "  bucket_8.own_nll   1.235\n"
        "  bucket_8.base_nll  1.5\n"
        "  n_repositories     12\n"
        "  audit              not audited\n"
        f"  card               {pulled / 'MODEL_CARD.md'}\n"
    )


def test_an_audited_model_shows_every_test(code2lora: Run, home: Settings) -> None:
    make_model(home.models_dir / "audited", audit=AUDIT)
    out = code2lora("models", "show", "audited").out
    assert (
        "  audit                    failed: the own adapter does not beat the generic one; "
        "1 more test failed\n"
        "  audit.own_minus_mean     not measured\n"
        "  audit.own_minus_generic  failed, +0.0052 (-0.0010 to +0.0121)\n"
        "  audit.own_minus_base     passed, -0.1154 (-0.1300 to -0.1000)\n"
        "  audit.freshness_10       failed, +0.0000 (-0.5000 to +0.2500)\n"
    ) in out
    view = json.loads(code2lora("models", "show", "audited", "--json").out)
    assert view["audit"] == "failed"
    assert view["config"]["audit"]["tests"]["own_minus_base"]["mean"] == -0.1154


def test_one_model_as_json(code2lora: Run, pulled: Path) -> None:
    view = json.loads(code2lora("models", "show", str(pulled), "--json").out)
    assert view["base_path"] == str(pulled / "base")
    assert view["parts"] == {"base": 6000, "encoder": 2, "hypernetwork": 4000}
    assert view["config"]["metrics"]["n_repositories"] == 12


def test_a_model_with_a_wrong_configuration(code2lora: Run, pulled: Path) -> None:
    file = pulled / "hypernetwork" / "config.json"
    values = json.loads(file.read_text())
    values["head"]["kind"] = "magic"
    file.write_text(json.dumps(values))
    done = code2lora("models", "show", "tiny")
    assert done.status == 1
    expected = "expected one of: factorized, memory, paper"
    assert done.err == f"error: {file}: head.kind is 'magic', {expected}\n"
    file.write_text("{")
    done = code2lora("models", "show", "tiny")
    assert done.err.startswith(f"error: {file} cannot be read: ")
    assert done.err.endswith("hint: fetch or copy the model again\n")


def test_no_such_model(code2lora: Run, pulled: Path) -> None:
    done = code2lora("models", "show", "tinny")
    assert done.status == 1
    assert done.err.startswith("error: there is no model named 'tinny'; known models: ")
