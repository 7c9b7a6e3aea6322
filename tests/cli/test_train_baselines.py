"""`train baselines`: options into the call; the training itself has tests of its own room."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / name for name in ("mined", "base", "out", "like")}
    for folder in found.values():
        folder.mkdir()
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand in for the training; the list fills with (recipe, rows, compared) of each call."""
    from code2lora.training import run
    from code2lora.training.baselines import stage as baselines

    found: list[Any] = []

    def train(
        recipe: Any,
        mined: Path,
        decoder: Any,
        out_dir: Path,
        rows: Sequence[str],
        compared: Any,
        *,
        progress: Callable[[float, str], None],
        stop: Callable[[], bool],
    ) -> list[baselines.BaselineResult]:
        found.append((recipe, tuple(rows), compared))
        progress(1.0, "shared_lora: step 4, loss 1.000")
        return [
            baselines.BaselineResult(
                row=row,
                path=out_dir / row,
                finished=row != "text_lora",
                steps=1200,
                best_step=1000,
                watched_nll=None if row == "text_lora" else 1.25,
            )
            for row in rows[:2]
        ]

    monkeypatch.setattr(run, "load_decoder", lambda path, **_: path)
    monkeypatch.setattr(baselines, "train_baselines", train)
    return found


def _place(folders: dict[str, Path]) -> list[str]:
    return [f"--{name}={folders[name]}" for name in ("mined", "base", "out")]


def test_options_reach_the_training(
    code2lora: Run, folders: dict[str, Path], asked: list[Any]
) -> None:
    rows = ("--row=shared_lora", "--row=full_tuning")

    done = code2lora(
        *("train", "baselines", *_place(folders), *rows, f"--like={folders['like']}"),
        *("--steps=9", "--device=cpu", "--test-bucket"),
    )

    assert done.status == 0
    assert [line.split() for line in done.out.splitlines()] == [
        ["shared_lora", "step", "1,000", "of", "1,200,", "1.2500", "nats"],
        ["full_tuning", "step", "1,000", "of", "1,200,", "1.2500", "nats"],
    ]
    assert done.err == "training 100%  shared_lora: step 4, loss 1.000\n"
    ((recipe, trained, compared),) = asked
    assert trained == ("shared_lora", "full_tuning")
    assert recipe.baselines.steps == 9
    assert (compared.like, compared.test) == (folders["like"], True)


def test_a_row_that_is_not_complete_is_130(
    code2lora: Run, folders: dict[str, Path], asked: list[Any]
) -> None:
    done = code2lora("train", "baselines", *_place(folders), "--json", "--device=cpu")

    assert done.status == 130
    assert "the same command goes on from here" in done.err
    first, second = json.loads(done.out)
    assert first["path"] == str(folders["out"] / "shared_lora")
    assert (second["row"], second["finished"], second["watched_nll"]) == ("text_lora", False, None)
    from code2lora.training.baselines.loading import ROWS

    assert asked[0][1] == ROWS
