"""Pulling from and pushing to a hub that runs on this machine, with all that can go wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from code2lora.errors import UserError
from code2lora.history import open_history
from code2lora.history.rules import FileRules
from code2lora.hypernetwork import hub as hub_module
from code2lora.hypernetwork.catalogue import CATALOGUE, Pullable, find_pullable
from code2lora.hypernetwork.checkpoint import load_family
from code2lora.hypernetwork.hub import Hub
from code2lora.hypernetwork.models import resolve_model
from code2lora.hypernetwork.pull import find_pulled, free_bytes, pull, read_sources, remove
from tests.gitrepo import GitRepo
from tests.hypernetwork import published
from tests.hypernetwork.mirror import Mirror, Repository, serve

BASE_WEIGHTS = "model.safetensors"
ARCHIVE = "code2lora_gru.pt"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Repository]:
    made = Mirror()
    published.publish(made, tmp_path_factory.mktemp("published"))
    return made.repositories


@pytest.fixture
def mirror(
    repositories: dict[str, Repository], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Mirror]:
    with serve() as made:
        for name, repository in repositories.items():
            made.repositories[name] = replace(repository, files=dict(repository.files), listing={})
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield made


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


ENTRY = published.entry()
FINAL = ENTRY.name


def _pull(mirror: Mirror, models: Path, entry: Pullable = ENTRY, **options: Any) -> Any:
    return pull(entry, models, hub=Hub(mirror.endpoint, pause_s=0.0), **options)


def _failure(mirror: Mirror, models: Path, entry: Pullable = ENTRY, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        _pull(mirror, models, entry, **options)
    assert not (models / FINAL).exists()
    return caught.value


# ---- what is pulled ----


def test_pull_makes_a_whole_model(mirror: Mirror, models: Path) -> None:
    shares: list[float] = []

    pulled = _pull(mirror, models, progress=lambda share, _said: shares.append(share))

    assert (pulled.name, pulled.status, pulled.path) == (FINAL, "pulled", models / FINAL)
    paths = resolve_model(FINAL, models)
    found = {p.relative_to(models / FINAL).as_posix() for p in (models / FINAL).rglob("*")}
    assert not {name for name in found if name.endswith((".pt", ".bin", ".onnx", ".partial"))}
    assert {"base/config.json", "base/tokenizer.json", "encoder/modules.json"} <= found
    assert "encoder/README.md" not in found and "base/.gitattributes" not in found
    config = load_family(paths).config
    assert config.base.id == "Qwen/Qwen2.5-Coder-1.5B"
    assert config.base.revision == ENTRY.base.revision
    assert config.encoder.recipe.stream == "assertions"
    assert config.encoder.recipe.snapshot_rules == "paper-snapshot"
    archive = torch.load(
        _write(models / "copy.pt", mirror, ENTRY.hypernetwork.repository, ARCHIVE),
        weights_only=True,
    )
    weights = load_file(paths.hypernetwork / "model.safetensors")
    for name, tensor in archive["gru_state"].items():
        assert torch.equal(weights[f"gru.{name}"], tensor)
    assert shares == sorted(shares) and (shares[0], shares[-1]) == (0.0, 1.0)
    assert not [p for p in models.iterdir() if p.name.startswith(".pull") and p.is_dir()]


def _write(path: Path, mirror: Mirror, repository: str, file: str) -> Path:
    path.write_bytes(mirror.repositories[repository].files[file])
    return path


def test_sources_say_where_every_file_came_from(mirror: Mirror, models: Path) -> None:
    _pull(mirror, models)

    sources = read_sources(models / FINAL)

    for part, source in ENTRY.parts.items():
        assert sources[part]["repository"] == source.repository
        assert sources[part]["revision"] == source.revision
        for path, digest in sources[part]["sha256"].items():
            data = mirror.repositories[source.repository].files[path]
            assert hashlib.sha256(data).hexdigest() == digest
            if part != "hypernetwork":
                assert (models / FINAL / part / path).read_bytes() == data
    assert sources["base"]["licence"] == "apache-2.0"
    card = (models / FINAL / "MODEL_CARD.md").read_text()
    assert ENTRY.encoder.revision in card and "code2lora/code2lora-gru" in card


def test_a_pulled_model_works_offline(
    mirror: Mirror, models: Path, repo: GitRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pull(mirror, models)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repo.commit({"a.py": "def parse(line):\n    return line.split(',')\n" * 20})
    commit = repo.commit({"a.py": "def parse(line):\n    return line.split(';')\n" * 20})

    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    family = load_family(resolve_model(FINAL, models)).family
    history = open_history(repo.path)
    state = family.initial(
        family.read_snapshot(history.snapshot(commit, FileRules.named("paper-snapshot"))).features
    )
    (diff,) = family.read_diffs([history.diff(commit, FileRules.named("paper"))])
    after = family.adapter(family.advance(state, diff.features))
    history.close()

    assert diff.n_tokens > 16
    before = family.adapter(state)
    assert any(not torch.equal(before.a[name], after.a[name]) for name in after.a)


def test_the_static_model(mirror: Mirror, models: Path) -> None:
    entry = published.entry(published.STATIC)

    _pull(mirror, models, entry)

    loaded = load_family(resolve_model(entry.name, models))
    assert (loaded.config.family, loaded.config.head.alpha) == ("static", 32.0)


def test_the_second_pull_asks_nothing(mirror: Mirror, models: Path) -> None:
    _pull(mirror, models)
    mirror.requests.clear()

    assert _pull(mirror, models).status == "kept"

    assert mirror.requests == []


def test_a_damaged_model_is_pulled_again(mirror: Mirror, models: Path) -> None:
    _pull(mirror, models)
    (models / FINAL / "hypernetwork" / "config.json").unlink()

    assert _pull(mirror, models).status == "pulled"

    load_family(resolve_model(FINAL, models))


def test_another_commit_replaces_the_model(mirror: Mirror, models: Path) -> None:
    _pull(mirror, models)
    revision = "1" * 40
    mirror.repositories[ENTRY.base.repository].revision = revision
    newer = replace(ENTRY, base=replace(ENTRY.base, revision=revision))

    assert _pull(mirror, models, newer).status == "pulled"

    assert read_sources(models / FINAL)["base"]["revision"] == revision
    assert [p.name for p in models.iterdir() if p.is_dir()] == [FINAL]


# ---- what goes wrong on the way ----


def test_a_download_that_is_cut_off_goes_on(mirror: Mirror, models: Path) -> None:
    size = len(mirror.repositories[ENTRY.hypernetwork.repository].files[ARCHIVE])
    mirror.cuts[ARCHIVE] = [1000, 0, 500]

    _pull(mirror, models)

    assert mirror.asked_for(ARCHIVE) == ["", "bytes=1000-", "bytes=1000-", "bytes=1500-"]
    assert size > 1500


def test_a_run_that_was_cut_off_goes_on(mirror: Mirror, models: Path) -> None:
    mirror.cuts[ARCHIVE] = [1000, *[0] * 10]
    error = _failure(mirror, models)
    assert error.message.startswith(f"{ARCHIVE} cannot be fetched from {mirror.endpoint}: ")
    assert error.hint == "check the network, HF_ENDPOINT and the proxies; the same command goes on"
    mirror.cuts.clear()
    mirror.requests.clear()

    _pull(mirror, models)

    assert mirror.asked_for(ARCHIVE) == ["bytes=1000-"]
    assert mirror.asked_for(BASE_WEIGHTS) == []  # it was there, and is whole


def test_a_server_without_ranges_sends_all_again(mirror: Mirror, models: Path) -> None:
    mirror.cuts[ARCHIVE] = [1000]
    mirror.ignores_ranges = True
    shares: list[float] = []

    _pull(mirror, models, progress=lambda share, _said: shares.append(share))

    assert max(shares) == 1.0
    assert mirror.asked_for(ARCHIVE) == ["", "bytes=1000-"]


def test_what_lies_there_is_checked_again(mirror: Mirror, models: Path) -> None:
    mirror.cuts[ARCHIVE] = [0] * 10
    _failure(mirror, models)
    weights = models / f".pull-{FINAL}" / "model" / "base" / BASE_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    mirror.cuts.clear()

    _pull(mirror, models)

    expected = mirror.repositories[ENTRY.base.repository].files[BASE_WEIGHTS]
    assert (models / FINAL / "base" / BASE_WEIGHTS).read_bytes() == expected


@pytest.mark.parametrize("path", [ARCHIVE, "config.json"])
def test_another_content_than_listed(mirror: Mirror, models: Path, path: str) -> None:
    files = [r.files[path] for r in mirror.repositories.values() if path in r.files]
    mirror.swaps[path] = bytes(len(files[0]))

    error = _failure(mirror, models)

    assert f": {path} arrived with another content than the hub lists" in error.message
    mirror.swaps.clear()
    _pull(mirror, models)


def test_more_than_listed_is_not_stored(mirror: Mirror, models: Path) -> None:
    data = mirror.repositories[ENTRY.hypernetwork.repository].files[ARCHIVE]
    mirror.swaps[ARCHIVE] = data + bytes(5_000_000)

    error = _failure(mirror, models)

    assert f"is longer than the {len(data):,} bytes that the hub lists" in error.message
    assert sum(f.stat().st_size for f in models.rglob("*") if f.is_file()) < 1_000_000


def test_less_than_listed(mirror: Mirror, models: Path) -> None:
    data = mirror.repositories[ENTRY.hypernetwork.repository].files[ARCHIVE]
    mirror.swaps[ARCHIVE] = data[:-10]

    error = _failure(mirror, models)

    assert f": {ARCHIVE} arrived with another content than the hub lists" in error.message


@pytest.mark.parametrize(
    "path", ["../evil.json", "/etc/passwd", "a/../../b", "a\\b", "a//b", "c:evil", "a\nb", "."]
)
def test_a_listing_that_would_leave_the_folder(mirror: Mirror, models: Path, path: str) -> None:
    mirror.repositories[ENTRY.encoder.repository].listing[path] = {}

    error = _failure(mirror, models)

    assert error.message == (
        f"Qwen/Qwen3-Embedding-0.6B lists a file named {path!r}, which would leave its folder"
    )
    assert not [r for r in mirror.requests if "/resolve/" in r[1]]


def test_a_listing_of_too_much(mirror: Mirror, models: Path) -> None:
    mirror.repositories[ENTRY.base.repository].listing["model-1-of-1.safetensors"] = {
        "lfs": {"sha256": "0" * 64, "size": 10**12, "pointerSize": 1}
    }

    assert "Qwen/Qwen2.5-Coder-1.5B lists 1,000,0" in _failure(mirror, models).message


@pytest.mark.parametrize("lie", [{"size": -1}, {"size": None}, {"blobId": None}])
def test_a_listing_without_what_is_needed(
    mirror: Mirror, models: Path, lie: dict[str, Any]
) -> None:
    mirror.repositories[ENTRY.base.repository].listing["config.json"] = lie

    assert _failure(mirror, models).message == (
        "Qwen/Qwen2.5-Coder-1.5B lists config.json without its size or its id"
    )


def test_a_digest_that_is_known_must_be_listed(mirror: Mirror, models: Path) -> None:
    source = replace(ENTRY.hypernetwork, sha256={ARCHIVE: "a781*6c09"})

    error = _failure(mirror, models, replace(ENTRY, hypernetwork=source))

    assert error.message.endswith("expected a781*6c09")
    assert not [r for r in mirror.requests if "/resolve/" in r[1]]


def test_a_commit_or_repository_that_is_not_there(mirror: Mirror, models: Path) -> None:
    moved = replace(ENTRY, base=replace(ENTRY.base, revision="2" * 40))
    assert _failure(mirror, models, moved).message == (
        f"{mirror.endpoint} has no Qwen/Qwen2.5-Coder-1.5B at {'2' * 12}"
    )
    del mirror.repositories[ENTRY.encoder.repository].files["modules.json"]
    for file in list(mirror.repositories[ENTRY.hypernetwork.repository].files):
        del mirror.repositories[ENTRY.hypernetwork.repository].files[file]
    assert _failure(mirror, models).message == (
        f"code2lora/code2lora-gru at {ENTRY.hypernetwork.revision[:12]} has none of: {ARCHIVE}"
    )


def test_an_incomplete_encoder_is_not_shown(mirror: Mirror, models: Path) -> None:
    del mirror.repositories[ENTRY.encoder.repository].files["modules.json"]

    assert "modules.json is missing" in _failure(mirror, models).message


def test_a_server_that_sends_another_commit(mirror: Mirror, models: Path) -> None:
    repository = mirror.repositories[ENTRY.base.repository]

    class Moved(Repository):
        """Answers for the commit that is asked for, and says that it is another one."""

        @property
        def sha(self) -> str:
            return "3" * 40

    moved = Moved(repository.revision, repository.files)
    mirror.repositories[ENTRY.base.repository] = moved

    assert _failure(mirror, models).message == (
        f"{mirror.endpoint} gave commit {'3' * 40} of Qwen/Qwen2.5-Coder-1.5B, "
        f"but {ENTRY.base.revision} was asked for"
    )


def test_a_server_that_wants_a_token(
    mirror: Mirror, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.token = "hf_secret"
    error = _failure(mirror, models)
    assert error.message.startswith(f"{mirror.endpoint} refuses Qwen/Qwen2.5-Coder-1.5B")
    assert error.hint and "HF_TOKEN" in error.hint
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    _pull(mirror, models)


def test_the_token_stays_with_the_hub(
    mirror: Mirror, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serve() as store:
        store.repositories = mirror.repositories
        mirror.redirects[ARCHIVE] = store.endpoint.replace("127.0.0.1", "localhost")
        mirror.redirects[BASE_WEIGHTS] = store.endpoint
        store.cuts[ARCHIVE] = [1000]

        _pull(mirror, models)

        assert store.asked_for(ARCHIVE) == ["", "bytes=1000-"]
        assert len(store.tokens_seen) >= 3 and set(store.tokens_seen) == {None}
    assert set(mirror.tokens_seen) == {"Bearer hf_secret"}


def test_no_server_and_no_network(
    mirror: Mirror, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.endpoint = "http://127.0.0.1:9"
    assert "cannot be fetched from http://127.0.0.1:9: " in _failure(mirror, models).message
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    error = _failure(mirror, models)
    assert (error.message, error.hint) == (
        "HF_HUB_OFFLINE forbids using the network",
        "unset HF_HUB_OFFLINE",
    )


# ---- the disk ----


def test_no_room(mirror: Mirror, models: Path) -> None:
    error = _failure(mirror, models, free=lambda _path: 1_000_000)

    assert error.message == (
        f"{FINAL} needs 0.3 GB more, but 0.0 GB are free on the disk of {models}"
    )
    assert not [r for r in mirror.requests if "/resolve/" in r[1]]
    assert free_bytes(models.parent) > 0


def test_the_disk_fills_up_all_the_same(
    mirror: Mirror, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_module.os, "fsync", full)
    error = _failure(mirror, models)
    assert error.message == f"cannot write to {models}: No space left on device"
    monkeypatch.undo()


def test_a_directory_in_the_way_is_left_alone(mirror: Mirror, models: Path) -> None:
    (models / FINAL).mkdir(parents=True)
    (models / FINAL / "notes").write_text("mine")

    with pytest.raises(UserError) as caught:
        _pull(mirror, models)

    assert caught.value.message == f"{models / FINAL} is in the way: it was not pulled"
    assert (models / FINAL / "notes").read_text() == "mine"


def test_symbolic_links_are_not_followed(mirror: Mirror, models: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    models.mkdir()
    staging = models / f".pull-{FINAL}"
    staging.symlink_to(outside)
    assert _failure(mirror, models).message == f"{staging} is a symbolic link"
    staging.unlink()
    (staging / "model").mkdir(parents=True)
    (staging / "model" / "base").symlink_to(outside)

    assert _failure(mirror, models).message == f"{staging / 'model' / 'base'} is a symbolic link"

    assert list(outside.iterdir()) == []


def test_one_pull_at_a_time(mirror: Mirror, models: Path) -> None:
    models.mkdir()
    with FileLock(models / f".pull-{FINAL}.lock"):
        assert _failure(mirror, models).message == f"{FINAL} is being pulled by another process"


# ---- names ----


def test_the_catalogue() -> None:
    for name, found in CATALOGUE.items():
        assert found.name == name == find_pullable(name).name
        for source in found.parts.values():
            assert len(source.revision) == 40 and int(source.revision, 16)
        assert found.hypernetwork.files[0].endswith(".pt")
    with pytest.raises(UserError) as caught:
        find_pullable("qwen2.5-coder-1.5")
    assert caught.value.hint == "did you mean `code2lora models pull qwen2.5-coder-1.5b`?"
    with pytest.raises(UserError) as caught:
        find_pullable("zzz")
    assert caught.value.hint == "`code2lora models available` lists them"


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("1_Pooling/config.json", True),
        ("pytorch_model.bin", False),
        ("onnx/model.onnx", False),
        ("onnx/config.json", False),
        ("deep/1_Pooling/config.json", False),
        ("model-a/b-of-c.safetensors", False),
        ("README.md", False),
        ("modeling_evil.py", False),
    ],
)
def test_what_is_wanted(path: str, wanted: bool) -> None:
    assert ENTRY.encoder.wants(path) is wanted


def test_remove(models: Path) -> None:
    (models / "one" / "base").mkdir(parents=True)
    (models / ".pull-one").mkdir()
    (models / "two").mkdir()

    remove(find_pulled("one", models))

    assert [path.name for path in models.iterdir()] == ["two"]
    for name in ("one", "mini", "../models", "a/b", "..", ".pull-one", ""):
        with pytest.raises(UserError):
            find_pulled(name, models)
    shutil.rmtree(models / "two")
    (models / "two").symlink_to(models.parent)
    with pytest.raises(UserError):
        find_pulled("two", models)
    assert os.path.lexists(models / "two")


def test_sources_that_are_no_json(tmp_path: Path) -> None:
    assert read_sources(tmp_path) == {}
    (tmp_path / "sources.json").write_text(json.dumps([1]))
    assert read_sources(tmp_path) == {}
    (tmp_path / "sources.json").write_text("{")
    with pytest.raises(UserError):
        read_sources(tmp_path)


def test_no_torch_before_it_is_needed() -> None:
    modules = ("cli.hub", "hypernetwork.hub", "hypernetwork.pull", "hypernetwork.push")
    imports = ", ".join(f"code2lora.{module}" for module in modules)
    script = f"import sys, {imports}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
