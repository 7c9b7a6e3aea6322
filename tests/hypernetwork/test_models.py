"""Finding models, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from code2lora.errors import UserError
from code2lora.hypernetwork import models
from code2lora.hypernetwork.models import list_models, resolve_model

FILES = ["base/config.json", "encoder/modules.json", "hypernetwork/config.json"]


@pytest.fixture(autouse=True)
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the models that the package brings out of these tests."""
    monkeypatch.setattr(models, "_BUNDLED", tmp_path / "bundled")
    return tmp_path / "bundled"


def _model(path: Path) -> Path:
    for file in FILES:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_text("{}")
    return path


def test_names_and_paths(tmp_path: Path, bundled: Path) -> None:
    root = tmp_path / "models"
    own, pulled = _model(bundled / "mini"), _model(root / "big")
    _model(root / "mini")
    elsewhere = _model(tmp_path / "elsewhere")

    assert resolve_model("mini", root).base == own / "base"
    assert resolve_model("big", root).encoder == pulled / "encoder"
    paths = resolve_model(str(elsewhere), root)
    assert (paths.name, paths.hypernetwork, paths.card) == (
        "elsewhere",
        elsewhere / "hypernetwork",
        elsewhere / "MODEL_CARD.md",
    )
    assert [model.base for model in list_models(root)] == [pulled / "base", own / "base"]


def test_missing_models(tmp_path: Path) -> None:
    root = tmp_path / "models"
    path = _model(root / "big")
    with pytest.raises(UserError) as caught:
        resolve_model("bog", root)
    assert caught.value.message == "there is no model named 'bog'; known models: big"
    assert caught.value.hint == (
        "`code2lora models` lists them; give a path with a slash for a directory of your own"
    )

    with pytest.raises(UserError) as caught:
        resolve_model(f"{root}/bog", root)
    assert caught.value.message == f"there is no model directory at {root}/bog"

    (path / "encoder/modules.json").unlink()
    with pytest.raises(UserError) as caught:
        resolve_model("big", root)
    assert caught.value.message == (
        f"the model at {path} has no encoder: big/encoder/modules.json is missing"
    )
    assert list_models(root) == []


def test_a_base_that_two_models_share(tmp_path: Path, bundled: Path) -> None:
    own = _model(bundled / "mini")
    second = _model(bundled / "mini-gru")
    (second / "base/config.json").unlink()
    assert [model.name for model in list_models(tmp_path)] == ["mini"]

    (second / "base-of").write_text("mini\n")
    paths = resolve_model("mini-gru", tmp_path)
    assert (paths.base, paths.encoder) == (own / "base", second / "encoder")
    assert [model.name for model in list_models(tmp_path)] == ["mini", "mini-gru"]


@pytest.mark.parametrize("name", ["", ".", "..", "../mini", "/", "mini/base", "a\0b"])
def test_a_base_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    second = _model(tmp_path / "models/second")
    (second / "base-of").write_text(name)
    with pytest.raises(UserError, match="base"):
        resolve_model("second", tmp_path / "models")
    assert list_models(tmp_path / "models") == []


def test_no_torch_is_imported() -> None:
    code = (
        "import sys, code2lora.hypernetwork.models, code2lora.hypernetwork.config;"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "False\n"
