"""What a run of all stages takes, kept beside what it makes.

Reads and writes one JSON file: what the run is made with, the seconds of each stage over all the
times that it was gone on with, and at the end the machine and the versions. It is written while a
stage runs, so that even a run that is killed has cost nearly what it says.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from code2lora.errors import UserError
from code2lora.history.gitcommand import run_git

_PACKAGES = ("code2lora-daemon", "torch", "transformers", "numpy", "pyarrow")


@dataclass
class StageTime:
    """How far one stage is."""

    seconds: float = 0.0
    """Wall time, summed over resumptions."""
    status: int | None = None
    """The exit status that finished it; None before."""


@dataclass
class Times:
    """The record of one run."""

    path: Path
    made_with: Mapping[str, Any]
    stages: dict[str, StageTime] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Wall time of all stages."""
        return sum(stage.seconds for stage in self.stages.values())

    def content(self) -> dict[str, Any]:
        """Return what the file says."""
        stages = {name: asdict(stage) for name, stage in self.stages.items()}
        return {"seconds": self.seconds, "stages": stages, "made_with": dict(self.made_with)}

    def write(self, **more: Any) -> dict[str, Any]:
        """Write the file whole and return what it says; more: further entries."""
        content = {**self.content(), **more}
        temporary = self.path.with_name(f".tmp-{self.path.name}")
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)
        return content


def open_times(path: Path, made_with: Mapping[str, Any]) -> Times:
    """Return the record of a run, begun or to be begun.

    made_with: what decides the result, as JSON has it
    Raises UserError when a run that was made with anything else is there.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before = found["made_with"]
        stages = {name: StageTime(**values) for name, values in found["stages"].items()}
    except FileNotFoundError:
        return Times(path, made_with)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read: {error}", hint="remove it; what it measured is lost"
        ) from error
    for key in sorted({*before, *made_with}):
        if before.get(key) != made_with.get(key):
            raise UserError(
                f"{path.parent} was begun with another {key}",
                hint=f"`{path}` says which; go on with that, or take another folder",
            )
    return Times(path, made_with, stages)


def machine() -> dict[str, Any]:
    """Return processor, cores, memory and GPU of this machine."""
    import psutil
    import torch

    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    found = {name: version(name) for name in _PACKAGES}
    git = run_git("version").stdout.strip().removeprefix("git version ")
    return {"python": platform.python_version(), "git": git, **found}


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*: *(.+)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()
