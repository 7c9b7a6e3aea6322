"""What is installed is what is in the tree, and nothing lies beside the package."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tracked(prefix: str) -> set[str]:
    """Return the files of the package that belong to a build."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / prefix).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist, as `pip install` of a release builds it."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    [sdist] = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("tests/gitrepo.py") for name in archive.getnames())
    [built] = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    ours = {name for name in names if ".dist-info/" not in name}

    assert ours == tracked("code2lora")
    assert {name.split("/")[0] for name in ours} == {"code2lora"}
    assert wheel.name.startswith("code2lora_daemon-")


def test_the_users_rooms_are_the_top_level_of_the_package() -> None:
    rooms = {path.parent.name for path in (ROOT / "code2lora").glob("*/__init__.py")}

    assert {"daemon", "hooks", "state_store", "training", "cli"} <= rooms
    assert rooms == {
        "adapters",
        "cli",
        "daemon",
        "history",
        "hooks",
        "hypernetwork",
        "serving",
        "state_store",
        "training",
    }


def test_the_bundled_model_is_small_enough() -> None:
    bundled = ROOT / "code2lora" / "hypernetwork" / "bundled"
    assert sum(path.stat().st_size for path in bundled.rglob("*") if path.is_file()) < 64_000_000
