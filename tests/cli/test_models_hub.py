"""`models pull`, `available`, `push` and `remove`, as a user runs them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from code2lora.hypernetwork.checkpoint import load_family
from code2lora.hypernetwork.models import resolve_model
from code2lora.settings import Settings
from tests.cli.conftest import Run
from tests.cli.models import AUDIT, make_model
from tests.hypernetwork import published
from tests.hypernetwork.mirror import Mirror, serve

# The catalogue's own entry, but for the sizes and digests of files that are not so small.
PROGRAM = """
from code2lora.hypernetwork import catalogue
from tests.hypernetwork import published
catalogue.CATALOGUE = {published.NAME: published.entry()}
from code2lora.cli import main
main()
"""
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mirror]:
    with serve() as made:
        published.publish(made, tmp_path_factory.mktemp("published"))
        yield made


def _start(mirror: Mirror, *arguments: str, offline: bool = False) -> subprocess.Popen[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = {
        **kept,
        "HF_ENDPOINT": mirror.endpoint,
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HOME": str(Path(os.environ["HOME"]) / "hf"),
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, "models", *arguments],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_pull_in_a_process_of_its_own(mirror: Mirror, home: Settings, code2lora: Run) -> None:
    archive = "code2lora_gru.pt"
    mirror.stalls[archive] = 5000  # sends so much, then nothing until it is let go
    process = _start(mirror, "pull", published.NAME)
    partial = home.models_dir / f".pull-{published.NAME}" / "partial"
    deadline = time.monotonic() + 60
    while not any(f.stat().st_size == 5000 for f in partial.glob("*")):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    mirror.stalls.clear()
    mirror.requests.clear()
    assert json.loads(code2lora("models", "list", "--json").out)[0]["name"] == "mini"

    out, err = _start(mirror, "pull", published.NAME).communicate(timeout=120)

    where = home.models_dir / published.NAME
    assert out.startswith(f"{published.NAME} is ready: {where}, "), err
    assert mirror.asked_for(archive) == ["bytes=5000-"]
    assert mirror.asked_for("resolve/" + mirror.repositories[REPOSITORY].revision) == []
    assert "pulling qwen2.5-coder-1.5b 100%" in err
    assert f"hint: `CODE2LORA_MODEL={published.NAME} code2lora daemon restart` uses it" in err
    _check_offline(mirror, home, code2lora)


REPOSITORY = "code2lora/code2lora-gru"


def _check_offline(mirror: Mirror, home: Settings, code2lora: Run) -> None:
    mirror.requests.clear()
    out, _ = _start(mirror, "pull", published.NAME, "--json", offline=True).communicate(timeout=60)
    assert json.loads(out)["status"] == "kept"
    view = json.loads(code2lora("models", "show", published.NAME, "--json").out)
    assert view["config"]["base"]["id"] == "Qwen/Qwen2.5-Coder-1.5B"
    loaded = load_family(resolve_model(published.NAME, home.models_dir))
    assert loaded.family.generic().rank == view["config"]["head"]["rank"]
    assert mirror.requests == []


def test_an_unknown_name(code2lora: Run) -> None:
    done = code2lora("models", "pull", "qwen2.5-coder")
    assert done.status == 1
    assert done.err.startswith("error: there is no model 'qwen2.5-coder' to pull; there are: ")
    assert "hint: did you mean `code2lora models pull qwen2.5-coder-1.5b`?" in done.err


def test_without_a_network(code2lora: Run, home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    done = code2lora("models", "pull", "qwen2.5-coder-1.5b")
    assert done.status == 1
    assert "error: HF_HUB_OFFLINE forbids using the network\n" in done.err
    assert not (home.models_dir / "qwen2.5-coder-1.5b").exists()


def test_what_is_available(code2lora: Run) -> None:
    done = code2lora("models", "available")
    assert (done.status, done.err) == (0, "")
    assert "qwen2.5-coder-1.5b" in done.out and "7.2 GB" in done.out
    found = json.loads(code2lora("models", "available", "--json").out)
    assert found[0]["parts"]["base"]["repository"] == "Qwen/Qwen2.5-Coder-1.5B"
    assert found[0]["parts"]["base"]["licence"] == "apache-2.0"


def test_push_shows_what_it_would_upload(code2lora: Run, home: Settings) -> None:
    make_model(home.models_dir / "good", audit=dataclasses.replace(AUDIT, verdict="passed"))
    done = code2lora("models", "push", "good", "me/good", "--dry-run")
    assert (done.status, done.err) == (0, "")
    assert [line.split()[0] for line in done.out.splitlines()] == [
        "FILE",
        "hypernetwork/config.json",
        "hypernetwork/model.safetensors",
        "base/config.json",
        "base/model.safetensors",
        "encoder/modules.json",
        "README.md",
    ]
    view = json.loads(code2lora("models", "push", "good", "me/good", "--dry-run", "--json").out)
    assert view["repository"] == "me/good" and "encoder/modules.json" in view["files"]
    done = code2lora("models", "push", "good", "me/good")
    assert done.err == "error: this needs your confirmation\nhint: add `--yes`\n"


def test_push_is_gated(code2lora: Run, home: Settings) -> None:
    make_model(home.models_dir / "bad", audit=AUDIT)
    done = code2lora("models", "push", "bad", "me/bad", "--yes")
    assert done.status == 1
    assert done.err == (
        "error: bad did not pass its audit: nothing shows that its adapters know their "
        "repositories\n"
        "hint: `code2lora train audit` asks that; `--despite-audit` publishes it with a warning\n"
    )
    done = code2lora("models", "push", "bad", "me/bad", "--despite-audit", "--dry-run")
    assert done.status == 0


def test_remove(code2lora: Run, home: Settings) -> None:
    model = make_model(home.models_dir / "old")
    asked = code2lora("models", "remove", "old")
    assert (asked.status, model.is_dir()) == (1, True)

    done = code2lora("models", "remove", "old", "--yes")

    assert (done.status, done.out) == (0, "old is deleted: 10.0 kB are free again\n")
    assert not model.exists()
    for name in ("old", "mini", "../data", str(home.data_dir)):
        assert code2lora("models", "remove", name, "--yes").status == 1
    assert home.data_dir.is_dir()
