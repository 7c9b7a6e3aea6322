"""Pruning deletes adapters and refuses everything else; exporting copies them."""

from __future__ import annotations

from pathlib import Path

import pytest

from code2lora.adapters.export import export
from code2lora.adapters.layout import FILES
from code2lora.adapters.load import load
from code2lora.adapters.prune import prune
from code2lora.adapters.publish import publish
from code2lora.errors import UserError
from tests.adapters.test_publish import METADATA
from tests.hypernetwork import tiny


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "adapters"


def _adapter(root: Path, seed: int = 0) -> Path:
    return publish(tiny.random_lora(seed=seed), METADATA, root, n_layers=2).path


def test_prune_removes_what_it_is_given(root: Path) -> None:
    old, kept = _adapter(root, 1), _adapter(root, 2)

    assert prune([old], root) == [old]

    assert list(old.parent.iterdir()) == [kept]
    assert prune([old], root) == []


def test_prune_refuses_other_paths(root: Path, tmp_path: Path) -> None:
    inside = _adapter(root)
    outside = _adapter(tmp_path / "other")
    (root / "aaaaaaaaaaaa-bbbbbbbbbbbb").mkdir()
    wrong = [
        outside,
        root,
        inside.parent,
        inside / "adapter_config.json",
        root / "aaaaaaaaaaaa-bbbbbbbbbbbb",
        root / METADATA.repository / ".." / METADATA.repository / inside.name,
        Path(inside.name),
    ]

    for path in wrong:
        with pytest.raises(UserError) as caught:
            prune([inside, path], root)
        assert caught.value.message == (
            f"{path} is not an adapter directory of {root}, so it is not removed"
        )

    assert inside.is_dir() and outside.is_dir()  # nothing goes before everything is checked


def test_prune_does_not_follow_symlinks(root: Path, tmp_path: Path) -> None:
    real = _adapter(tmp_path / "other")
    link = _adapter(root).parent / "aaaaaaaaaaaa-bbbbbbbbbbbb"
    link.symlink_to(real)
    folder = root / ("f" * 32)
    folder.symlink_to(real.parent)

    for path in (link, folder / real.name):
        with pytest.raises(UserError) as caught:
            prune([path], root)
        assert caught.value.message == f"{path} leads through a symlink, so it is not removed"
    inner = _adapter(root, 5)
    (inner / "link").symlink_to(real)
    prune([inner], root)

    assert sorted(p.name for p in real.iterdir()) == sorted(FILES)


def test_export_copies_a_whole_adapter(root: Path, tmp_path: Path) -> None:
    adapter = _adapter(root)

    destination = export(adapter, tmp_path / "mine")

    assert load(destination)[1] == METADATA
    for name in FILES:
        assert (destination / name).read_bytes() == (adapter / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapters", "mine"]


def test_export_refusals(root: Path, tmp_path: Path) -> None:
    adapter = _adapter(root)
    (tmp_path / "mine").mkdir()
    cases = {
        (adapter, tmp_path / "mine", "peft"): f"{tmp_path / 'mine'} exists already",
        (
            adapter,
            tmp_path / "new",
            "onnx",
        ): "the format is 'onnx', expected one of: peft, gguf, mlx",
        (tmp_path, tmp_path / "new", "peft"): (
            f"{tmp_path} is not an adapter directory: code2lora.json is missing"
        ),
        (adapter, tmp_path / "no" / "new", "peft"): (
            f"cannot write {tmp_path / 'no' / 'new'}: No such file or directory"
        ),
    }
    for (path, destination, kind), message in cases.items():
        with pytest.raises(UserError) as caught:
            export(path, destination, kind)
        assert caught.value.message == message
    assert not (tmp_path / "new").exists()
