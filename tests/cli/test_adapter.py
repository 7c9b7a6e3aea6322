"""`adapter`: finding, listing and copying published directories."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from code2lora.adapters import verify as verifying
from code2lora.adapters.layout import FILES, AdapterMetadata, WeightsInfo, dump_json, metadata_json
from code2lora.cli.render import short
from code2lora.settings import Settings
from code2lora.state_store import Store
from code2lora.state_store.records import Adapter
from tests.cli.conftest import CHECKPOINT, Known, Run
from tests.gitrepo import GitRepo


@pytest.fixture
def live(known: Known) -> Adapter:
    adapter = known.store.live_adapter(known.worktree.id)
    assert adapter is not None
    return adapter


def test_the_path_alone_is_data(code2lora: Run, live: Adapter, known: Known, here: Path) -> None:
    done = code2lora("adapter", "path")
    assert (done.status, done.out) == (0, f"{live.path}\n")
    assert done.err == (
        f"it is the adapter of {short(live.commit)}, HEAD is {short(known.repo.head)}: "
        "`code2lora refresh`\n"
    )


def test_the_path_at_its_commit_needs_no_remark(
    code2lora: Run, live: Adapter, known: Known, here: Path
) -> None:
    known.repo.reset(live.commit)
    done = code2lora("adapter", "path")
    assert (done.out, done.err) == (f"{live.path}\n", "")


def test_the_path_of_a_commit(code2lora: Run, live: Adapter, known: Known, here: Path) -> None:
    commits = known.repo.git("rev-list", "HEAD").split()
    known.publish(commits[2])
    done = code2lora("adapter", "path", "--commit", "HEAD~1")
    assert (done.out, done.err) == (f"{live.path}\n", "")
    done = code2lora("adapter", "path", "--commit", "HEAD")
    assert (done.status, done.out) == (1, "")
    assert done.err == (
        f"error: no adapter of commit {short(commits[0])} is on disk\n"
        "hint: `git switch --detach HEAD` and `code2lora refresh` make one\n"
    )


def test_no_adapter_yet(
    code2lora: Run, home: Settings, store: Store, repo: GitRepo, here: Path
) -> None:
    Known(home, store, repo)
    unborn = code2lora("adapter", "path")
    assert (unborn.status, unborn.out) == (1, "")
    assert unborn.err == "error: there is no commit yet: the first one makes the adapter\n"
    repo.commit({"a.py": "x = 1\n"})
    done = code2lora("adapter", "path")
    assert done.status == 1
    assert done.err == f"error: {here} has no adapter yet\nhint: `code2lora refresh {here}`\n"
    done = code2lora("adapter", "list")
    assert (done.status, done.out) == (0, "")
    assert done.err == "no adapter has been published yet: `code2lora status`\n"


def test_the_list_is_newest_first(code2lora: Run, live: Adapter, known: Known, here: Path) -> None:
    older = known.repo.git("rev-parse", "HEAD~2")
    newer = known.publish(older)
    done = code2lora("adapter", "list")
    assert (done.status, done.err) == (0, "")
    assert [line.split() for line in done.out.splitlines()] == [
        ["GENERATION", "COMMIT", "AGE", "SIZE", "PATH"],
        ["*", "2", short(older), "3", "min", "ago", "1.2", "MB", newer.path],
        ["1", short(live.commit), "3", "min", "ago", "1.2", "MB", live.path],
    ]


def test_pruned_adapters_are_listed_on_request(
    code2lora: Run, live: Adapter, known: Known, here: Path
) -> None:
    known.store.set_live(known.worktree.id, None)
    assert known.store.mark_pruned(live.id)
    assert code2lora("adapter", "list").out == ""
    assert code2lora("adapter", "list", "--all").out.splitlines()[1].endswith("  pruned")
    (only,) = json.loads(code2lora("adapter", "list", "--all", "--json").out)
    assert (only["generation"], only["path"]) == (1, live.path)
    assert only["pruned_at"] is not None


def test_an_export_is_a_copy(
    code2lora: Run, live: Adapter, known: Known, here: Path, tmp_path: Path
) -> None:
    metadata = AdapterMetadata(
        repository=known.repository_id,
        commit=live.commit,
        state_sha256="5" * 64,
        checkpoint=CHECKPOINT,
        base_model="tiny-base",
    )
    info = WeightsInfo(sha256=live.sha256, n_layers=2, shared_layers=True)
    (Path(live.path) / "code2lora.json").write_bytes(dump_json(metadata_json(metadata, info)))
    (Path(live.path) / "adapter_config.json").write_text("{}")
    destination = tmp_path / "copy"

    done = code2lora("adapter", "export", destination)

    assert (done.status, done.out, done.err) == (0, f"{destination}\n", "")
    assert sorted(file.name for file in destination.iterdir()) == sorted(FILES)
    again = code2lora("adapter", "export", destination)
    assert again.status == 1
    assert again.err == (
        f"error: {destination} exists already\nhint: name a new directory, or add `--force`\n"
    )
    again = code2lora("adapter", "export", destination, "--force")
    assert (again.status, again.out, again.err) == (0, f"{destination}\n", "")


@pytest.mark.parametrize("loss", ["directory", "weights", "rest"])
def test_a_live_adapter_that_is_gone(
    code2lora: Run, live: Adapter, known: Known, here: Path, tmp_path: Path, loss: str
) -> None:
    weights = Path(live.path) / "adapter_model.safetensors"
    if loss == "directory":
        shutil.rmtree(live.path)
    elif loss == "weights":
        weights.unlink()
    else:
        os.truncate(weights, 9)
    for arguments in (["path"], ["export", str(tmp_path / "copy")], ["verify"]):
        done = code2lora("adapter", *arguments)
        assert (done.status, done.out) == (1, "")
        assert done.err == (
            f"error: the live adapter {live.path} is gone\n"
            "hint: `code2lora refresh` makes it again\n"
        )


def test_changed_weights_are_not_copied(
    code2lora: Run, live: Adapter, here: Path, tmp_path: Path
) -> None:
    with (Path(live.path) / "adapter_model.safetensors").open("r+b") as weights:
        weights.write(b"?")
    done = code2lora("adapter", "export", tmp_path / "copy")
    assert done.status == 1
    assert done.err == (
        f"error: {live.path} has changed since it was published\n"
        "hint: `code2lora refresh` makes it again\n"
    )
    assert not (tmp_path / "copy").exists()


def test_a_verdict_that_is_not_ok_says_what_to_do(
    code2lora: Run, live: Adapter, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the comparison, which takes a real model and seconds."""
    report = verifying.VerifyReport(14, 0.0, 1.0, digest_matches=False)
    monkeypatch.setattr(verifying, "verify", lambda path, base: report)
    done = code2lora("adapter", "verify")
    assert done.status == 1
    assert "  verdict  not ok\n" in done.out
    assert done.err == "hint: `code2lora refresh` makes it again\n"
    done = code2lora("adapter", "verify", "--directory", tmp_path)
    assert done.err == "hint: `code2lora adapter export` makes a new copy\n"
