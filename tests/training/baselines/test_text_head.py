from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from code2lora.training.baselines.descriptions import Describer
from code2lora.training.baselines.text_head import (
    TextLearner,
    build_text_learner,
    description_encoder,
    load_text_head,
    save_text_head,
)
from code2lora.training.data.dataset import RepositoryData
from code2lora.training.fitting.fit import FitRun, fit
from code2lora.training.fitting.items import ItemBuilder, ItemConfig
from code2lora.training.fitting.learner import LearnerConfig, told_states
from code2lora.training.fitting.objective import freeze
from code2lora.training.fitting.schedule import FitConfig
from code2lora.training.fitting.windows import WindowConfig
from tests.training.worlds import make_base

CONFIG = FitConfig(
    learner=LearnerConfig(encoder_width=12, hidden_width=14, trunk_width=10, rank=3, alpha=6.0),
    windows=WindowConfig(repositories=3, commits=3, states=2, restart_share=0.5, horizon=6),
    items=ItemConfig(max_tokens=40, prefix_tokens=16, suffix_tokens=6),
    max_steps=3,
    learning_rate=1e-2,
    warmup_steps=1,
    margin_rows=3,
    autocast_bf16=False,
    tensorboard=False,
)


@pytest.fixture
def learner(data: list[RepositoryData], tokenizer: Tokenizer) -> TextLearner:
    model, base = make_base(tokenizer)
    embeddings = model.get_input_embeddings().weight
    encoder = description_encoder(tokenizer, embeddings, data, description_lines=4)
    return build_text_learner(
        CONFIG.learner, base, encoder, description_lines=4, holds_out=True, seed=1
    )


@pytest.fixture
def trained(
    learner: TextLearner, data: list[RepositoryData], tokenizer: Tokenizer, tmp_path: Path
) -> FitRun:
    """The head after three steps of the hypernetwork's own loop."""
    run = FitRun(
        CONFIG,
        tmp_path / "run",
        learner=learner,
        base=freeze(make_base(tokenizer)[0], autocast=False),
        builder=ItemBuilder(tokenizer, CONFIG.items),
        repositories=data,
    )
    fit(run)
    return run


def test_gradient_reaches_every_trainable_tensor_and_none_of_the_encoder(
    trained: FitRun, learner: TextLearner
) -> None:
    names = {name.split(".")[0] for name, _ in learner.named_parameters()}
    assert names == {"family"}
    for name, parameter in learner.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_state_is_that_of_the_description_whatever_the_commits_bring(
    learner: TextLearner, data: list[RepositoryData]
) -> None:
    states = told_states(learner, data[0], 0, 3)

    assert torch.equal(states, states[:1].expand_as(states))
    assert not torch.equal(states[0], told_states(learner, data[1], 0, 3)[0])


@dataclass(frozen=True)
class _Asked:
    data: RepositoryData
    anchor: int
    told_up_to: int
    held_out: frozenset[str]


def test_a_saved_head_gives_the_same_adapters_and_repositories_differ(
    trained: FitRun,
    learner: TextLearner,
    data: list[RepositoryData],
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    base = make_base(tokenizer)[1]
    encoder = description_encoder(
        tokenizer, make_base(tokenizer)[0].get_input_embeddings().weight, data, description_lines=4
    )
    save_text_head(tmp_path / "text", learner, CONFIG.learner, base, encoder, None)

    head = load_text_head(tmp_path / "text", description_lines=4)

    found = [head.adapter(_Asked(each, 4, 6, frozenset())) for each in data[:2]]
    expected = learner.family.lora(told_states(learner, data[0], 4, 6)[-1:])
    for target, b in found[0].b.items():
        torch.testing.assert_close(b, expected.b[target][0])
        assert not torch.equal(b, found[1].b[target])


class _Files:
    """A repository of one snapshot."""

    name = "owner/thing"

    def __init__(self, texts: dict[str, str]) -> None:
        @dataclass(frozen=True)
        class File:
            path: str
            text: int

        self.texts = list(texts.values())
        self._files = [File(path, row) for row, path in enumerate(texts)]

    def told_files(self, anchor: int, held_out: Collection[str]) -> list[Any]:
        return [file for file in self._files if file.path not in held_out]


def _describe(texts: dict[str, str], held_out: Collection[str] = ()) -> list[str]:
    data: Any = _Files(texts)
    return Describer(lines=2).describe(data, 0, held_out).split("\n")


def test_a_description_names_languages_and_foreign_dependencies() -> None:
    lines = _describe(
        {
            "thing/a.py": "import numpy as np\nfrom thing.b import x\nfrom rich.text import Text\n",
            "thing/b.py": "import numpy\n",
            "web/c.ts": 'import { z } from "zod"\nimport React from "react"\n',
        }
    )

    assert lines == [
        "owner/thing",
        "Languages: py ts",
        "Dependencies: numpy React react rich zod",
    ]


def test_a_description_begins_with_the_readme_nearest_the_root() -> None:
    texts = {
        "docs/README.md": "Deep\n",
        "README.md": "# Thing\n\nDoes a thing.\nAnd more.\n",
        "thing/__init__.py": '"""The package."""\n',
    }

    assert _describe(texts)[1:3] == ["# Thing", "Does a thing."]
    assert _describe(texts, {"README.md"})[1] == "Deep"
    assert _describe(texts, {"README.md", "docs/README.md"})[1] == "The package."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('#!/bin/sh\n# licence\n\n"""Says it.\n\nMore.\nYet more."""\n', ["Says it.", "More."]),
        ("from setuptools import setup\nsetup(description='A small tool')\n", ["A small tool"]),
        ("x = 1\n", []),
    ],
)
def test_without_a_readme_the_package_speaks_for_itself(text: str, expected: list[str]) -> None:
    lines = _describe({"setup.py": text})

    assert [line for line in lines[1:] if not line.startswith(("Lang", "Dep"))] == expected


def test_another_setting_of_the_head_is_that_of_the_hypernetwork(
    data: list[RepositoryData], tokenizer: Tokenizer
) -> None:
    model, base = make_base(tokenizer)
    encoder = description_encoder(
        tokenizer, model.get_input_embeddings().weight, data, description_lines=4
    )
    paper = dataclasses.replace(CONFIG.learner, head="paper", rank=2)

    learner = build_text_learner(paper, base, encoder, description_lines=4, holds_out=True, seed=1)

    assert type(learner.family.head).__name__ == "PaperHead"
    assert learner.family.head.rank == 2
