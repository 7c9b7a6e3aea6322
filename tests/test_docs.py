"""The documentation names what there is: settings, rooms, words, files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from code2lora.settings import SETTING_NAMES

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("name", sorted(set(SETTING_NAMES) - {"config_dir", "debounce_s"}))
def test_every_setting_is_documented(name: str) -> None:
    assert f"`{name}`" in (ROOT / "docs" / "getting-started.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_every_room_is_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for room in (ROOT / "code2lora").glob("*/__init__.py"):
        assert f"**{room.parent.name}**" in text


def test_every_benchmark_says_how_it_is_run() -> None:
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert re.search(rf"benchmarks[./]{path.stem}", path.read_text()), path.name


@pytest.mark.parametrize("model", ["mini", "mini-gru"])
def test_the_card_in_the_docs_is_the_bundled_one(model: str) -> None:
    bundled = ROOT / "code2lora" / "hypernetwork" / "bundled" / model / "MODEL_CARD.md"
    assert (ROOT / "docs" / "model_cards" / f"{model}.md").read_text() == bundled.read_text()
