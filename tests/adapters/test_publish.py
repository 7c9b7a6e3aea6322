"""Published directories: what is in them, that they are whole, and that they load back."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from code2lora.adapters import publish as publishing
from code2lora.adapters.layout import FILES, AdapterMetadata
from code2lora.adapters.load import load
from code2lora.adapters.prune import sweep_temporary
from code2lora.adapters.publish import PublishedAdapter, publish
from code2lora.errors import UserError
from code2lora.hypernetwork.config import block_of
from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.projections import TARGETS
from tests.hypernetwork import tiny

METADATA = AdapterMetadata(
    repository="0123456789abcdef" * 2,
    commit="c0ffee" * 6 + "abcd",
    state_sha256="5" * 64,
    checkpoint="6" * 64,
    base_model="tiny",
)


def _publish(root: Path, lora: Lora | None = None, **changes: str) -> PublishedAdapter:
    metadata = replace(METADATA, **changes)  # type: ignore[arg-type]
    return publish(lora or tiny.random_lora(), metadata, root, n_layers=tiny.N_LAYERS)


def test_directory_is_what_peft_expects(tmp_path: Path) -> None:
    lora = tiny.random_lora()

    published = _publish(tmp_path, lora, base_revision="r1")

    sha = hashlib.sha256((published.path / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert published.sha256 == sha
    assert published.path == tmp_path / METADATA.repository / f"c0ffeec0ffee-{sha[:12]}"
    weights = published.path / "adapter_model.safetensors"
    assert published.n_bytes == weights.stat().st_size
    assert sorted(p.name for p in published.path.iterdir()) == sorted(FILES)
    tensors = load_file(weights)
    assert len(tensors) == tiny.N_LAYERS * 14
    for layer in range(tiny.N_LAYERS):
        for target in TARGETS:
            name = f"base_model.model.model.layers.{layer}.{block_of(target)}.{target}.lora_"
            a, b = lora.layer(target, layer)
            assert torch.equal(tensors[f"{name}A.weight"], a.bfloat16())
            assert torch.equal(tensors[f"{name}B.weight"], b.bfloat16())
    with safe_open(weights, "pt") as archive:
        assert archive.metadata() == {"format": "pt"}
    config = json.loads((published.path / "adapter_config.json").read_text())
    assert config["r"] == tiny.RANK and config["lora_alpha"] == 8
    assert config["target_modules"] == sorted(TARGETS)
    assert (config["base_model_name_or_path"], config["revision"]) == ("tiny", "r1")
    origin = json.loads((published.path / "code2lora.json").read_text())
    assert origin["origin"]["commit"] == METADATA.commit
    assert origin["weights"] == {"sha256": sha, "n_layers": 2, "shared_layers": False}


def test_files_are_private(tmp_path: Path) -> None:
    published = _publish(tmp_path / "root")

    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    for directory in (published.path, published.path.parent, tmp_path / "root"):
        assert mode(directory) == 0o700, directory
    assert {mode(published.path / name) for name in FILES} == {0o600}


def test_bytes_are_deterministic(tmp_path: Path) -> None:
    lora = tiny.random_lora()
    # another order of the module types must not matter
    turned = replace(lora, a=dict(reversed(lora.a.items())), b=dict(reversed(lora.b.items())))

    one, two = _publish(tmp_path / "1", lora), _publish(tmp_path / "2", turned)

    for name in FILES:
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()
    other = _publish(tmp_path / "1", tiny.random_lora(seed=9))
    assert other.sha256 != one.sha256 and other.path != one.path


def test_identical_adapter_is_reused(tmp_path: Path) -> None:
    first = _publish(tmp_path)
    inode = first.path.stat().st_ino

    assert _publish(tmp_path) == first

    assert first.path.stat().st_ino == inode
    assert list(first.path.parent.iterdir()) == [first.path]


def test_damaged_directory_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    first = _publish(tmp_path)
    weights = first.path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])

    assert _publish(tmp_path) == first

    load(first.path)
    assert list(first.path.parent.iterdir()) == [first.path]


@pytest.mark.parametrize("n_layers", [1, tiny.N_LAYERS])
def test_load_gives_back_what_was_published(tmp_path: Path, n_layers: int) -> None:
    lora = tiny.random_lora(n_layers=n_layers)
    published = _publish(tmp_path, lora)

    loaded, metadata = load(published.path, tiny.base_config())

    assert metadata == METADATA
    assert (loaded.rank, loaded.alpha) == (lora.rank, lora.alpha)
    for target in TARGETS:
        assert torch.equal(loaded.a[target], lora.a[target].bfloat16())
        assert torch.equal(loaded.b[target], lora.b[target].bfloat16())
    assert len(load_file(published.path / "adapter_model.safetensors")) == 14 * tiny.N_LAYERS


def test_full_precision_is_kept(tmp_path: Path) -> None:
    lora = tiny.random_lora()

    published = publish(lora, METADATA, tmp_path, n_layers=2, dtype=torch.float32)

    loaded, _ = load(published.path)
    assert all(torch.equal(loaded.b[t], lora.b[t]) for t in TARGETS)


def test_wrong_identity_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        _publish(tmp_path, repository="../../etc")
    assert caught.value.message == "the repository's id is '../../etc', expected 32 hex digits"
    assert caught.value.hint == "`git config --unset code2lora.id`, then `code2lora init`"
    with pytest.raises(UserError) as caught:
        _publish(tmp_path, commit="main")
    assert caught.value.message == "the commit is 'main', expected a full hash"
    assert list(tmp_path.iterdir()) == []


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(publishing.os, "fsync", full)

    with pytest.raises(UserError) as caught:
        _publish(tmp_path)

    assert caught.value.message == (
        f"cannot write an adapter under {tmp_path}: No space left on device"
    )
    assert caught.value.hint == ("free some space, or choose another place with CODE2LORA_DATA_DIR")
    assert list((tmp_path / METADATA.repository).iterdir()) == []


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file")

    with pytest.raises(UserError) as caught:
        _publish(tmp_path / "root")

    message = f"cannot write an adapter under {tmp_path / 'root'}: File exists"
    assert caught.value.message == message


def test_kill_leaves_no_torn_adapter(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.adapters.publisher", str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True)
    (folder,) = tmp_path.iterdir()

    entries = sorted(folder.iterdir())
    whole = [path for path in entries if not path.name.startswith(".tmp-")]
    torn = [path for path in entries if path.name.startswith(".tmp-")]

    assert whole and torn  # some were killed at work
    for path in whole:
        _, metadata = load(path)
        sha = hashlib.sha256((path / "adapter_model.safetensors").read_bytes()).hexdigest()
        assert path.name == f"{metadata.commit[:12]}-{sha[:12]}"
    assert sorted(sweep_temporary(tmp_path)) == torn
    assert sorted(folder.iterdir()) == whole
