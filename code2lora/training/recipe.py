"""Turn a recipe file into settings: everything that a model was made with, in one TOML file.

A section is one stage's dataclass; what a file leaves out has the default that the class documents.
An unknown section or key and a value of the wrong kind are a `UserError` that names it.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from code2lora.errors import UserError
from code2lora.training.audit.items import AuditConfig
from code2lora.training.baselines.config import BaselineConfig
from code2lora.training.data.mining import MineConfig
from code2lora.training.evaluation.evaluate import EvaluateConfig
from code2lora.training.fitting.schedule import FitConfig
from code2lora.training.pretraining.base_config import BaseConfig
from code2lora.training.pretraining.corpus import CorpusConfig
from code2lora.training.pretraining.keys_config import KeysConfig

_BUNDLED = resources.files("code2lora.training") / "recipes"


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """What the tokenizer learns from; its size is `base.vocab_size`."""

    max_chars: int = 40_000_000
    """Characters of the corpus, taken in the order of the hashes of the paths."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of every stage."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    mine: MineConfig = field(default_factory=MineConfig)
    keys: KeysConfig = field(default_factory=KeysConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    baselines: BaselineConfig = field(default_factory=BaselineConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)


def load_recipe(name_or_path: str) -> Recipe:
    """Return the recipe in a file, or a bundled one by its name, such as `mini`.

    Raises UserError when there is none, or when it is wrong.
    """
    bundled = _BUNDLED / f"{name_or_path}.toml"
    if bundled.is_file():
        return parse_recipe(bundled.read_text(encoding="utf-8"), where=f"recipe {name_or_path}")
    try:
        text = Path(name_or_path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"there is no recipe {name_or_path!r}",
            hint=f"give a path, or one of: {', '.join(bundled_recipes())}",
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name_or_path} is not UTF-8 text") from error
    return parse_recipe(text, where=name_or_path)


def bundled_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    names = [file.name for file in _BUNDLED.iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def parse_recipe(text: str, *, where: str) -> Recipe:
    """Return the recipe that a TOML text holds.

    where: the file's name for messages. Raises UserError naming the key that is wrong.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where} is not valid TOML: {error}") from error
    _refuse_unknown(Recipe, values, where, "")
    try:
        return TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}: {key} is {first['input']!r}: {first['msg']}") from error


def _refuse_unknown(kind: type, values: Mapping[str, Any], where: str, prefix: str) -> None:
    known = {item.name for item in dataclasses.fields(kind)}
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else None
            raise UserError(f"{where}: unknown key {prefix}{name}", hint=hint)
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, Mapping):
            _refuse_unknown(hints[name], value, where, f"{prefix}{name}.")
