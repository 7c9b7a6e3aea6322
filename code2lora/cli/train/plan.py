"""Turn a recipe and a few folders into the commands that make a model, in order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from code2lora.cli import edge
from code2lora.cli.train.audit import FAILED, INCOMPLETE
from code2lora.cli.train.stages import Options, Stage
from code2lora.errors import UserError

if TYPE_CHECKING:
    from code2lora.training.data.cloning import Pin
    from code2lora.training.recipe import Recipe

_FOLDERS = ("clones", "base", "mined", "encoder", "fitted", "baselines")
_BASE_PARTS = ("export", "figures.json", "manifest.json")
_VERDICTS = (edge.OK, FAILED, INCOMPLETE)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `code2lora train all` is asked for; the fields are its options."""

    recipe_name: str
    out_dir: Path
    name: str | None
    clones: Path | None
    list_file: Path | None
    source: str
    base: Path | None
    sites: tuple[Path, ...]
    shared: bool
    workers: int
    device: str

    @property
    def model(self) -> Path:
        """Where the model is put. Raises UserError when it cannot have a folder of its own."""
        name = self.name or Path(self.recipe_name).stem
        if name in _FOLDERS or Path(name).name != name:
            raise UserError(f"a model cannot be called {name!r}", hint="give it another --name")
        return self.out_dir / name

    @property
    def cloned(self) -> Path:
        """The list that `clone` writes and `mine` takes."""
        return (self.clones or self.out_dir / "clones") / "list.txt"

    def made_with(self, recipe: Recipe, pins: Sequence[Pin]) -> dict[str, Any]:
        """Return what decides the result, by the names of the options, as JSON has it."""
        listed = "".join(f"{pin.name} {pin.commit}\n" for pin in pins)
        return {
            "recipe": json.loads(json.dumps(asdict(recipe))),
            "list": hashlib.sha256(listed.encode()).hexdigest(),
            "base": self.base and str(self.base.absolute()),
            "site": [str(site.absolute()) for site in self.sites],
            "shared": self.shared,
            "name": self.model.name,
        }

    def stages(self, recipe: Recipe) -> list[Stage]:
        """Return the stages that a recipe needs.

        Raises UserError when it needs what none of them makes, or the base is none.
        """
        memory = recipe.fit.learner.family == "memory"
        if recipe.fit.learner.encoder == "frozen" and not memory:
            raise UserError(
                f"the recipe {self.recipe_name} reads with a frozen encoder, which no stage makes",
                hint="give the stages one by one: `code2lora train embed --help`",
            )
        base, mined, fitted = self._base(), self.out_dir / "mined", self.out_dir / "fitted"
        encoder = self.out_dir / "encoder" if memory else None
        shared = self.out_dir / "baselines" if self.shared else None
        place: Options = {"mined": mined, "base": base / "export", "device": self.device}
        given: Options = {**place, "base-name": self.model.name, "recipe": self.recipe_name}
        asked: Options = {**given, "out": fitted}
        stages = self._gathering(base, mined)
        if encoder:
            stages += [
                Stage("keys", {**given, "out": encoder}, encoder),
                Stage("embed", {**place, "encoder": encoder}, mined / ".features"),
            ]
        stages.append(Stage("fit", {**asked, "features": encoder}, fitted / "hypernetwork"))
        if shared:
            row: Options = {**given, "out": shared, "row": "shared_lora", "like": fitted}
            stages.append(Stage("baselines", row, shared / "shared_lora"))
        bundle: Options = {"mined": mined, "base": base, "fitted": fitted, "out": self.model}
        return [
            *stages,
            Stage("evaluate", {**asked, "baselines": shared}, fitted / "evaluation.json"),
            Stage("audit", {**asked, "shared": shared}, fitted / "audit.json", _VERDICTS),
            Stage("bundle", bundle, self.model / "MODEL_CARD.md"),
        ]

    def _base(self) -> Path:
        """Return where the base is, or will be."""
        for part in _BASE_PARTS:
            if self.base and not (self.base / part).exists():
                raise UserError(
                    f"there is no {self.base / part}",
                    hint="--base takes the folder that `code2lora train base` filled",
                )
        return self.base or self.out_dir / "base"

    def _gathering(self, base: Path, mined: Path) -> list[Stage]:
        """Return the stages up to a base and mined repositories."""
        read: Options = {"recipe": self.recipe_name}
        pace: Options = {"workers": self.workers}
        clone: Options = {"list": self.list_file, "from": self.source, "out": self.cloned.parent}
        stages = [Stage("clone", {**clone, **pace}, self.cloned)]
        if self.base is None:
            train_base: Options = {**read, "site": self.sites, "out": base}
            stages.append(Stage("base", train_base, base / "export"))
        mine: Options = {**read, **pace, "list": self.cloned, "out": mined}
        return [*stages, Stage("mine", mine, mined)]
