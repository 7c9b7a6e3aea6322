"""Embedding of mined repositories, against the encoders' own reading of the histories."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from code2lora.errors import UserError
from code2lora.history import open_history
from code2lora.history.model import Diff, SourceFile
from code2lora.history.rules import FileRules
from code2lora.hypernetwork.config import Recipe
from code2lora.hypernetwork.encoder import Encoder, load_encoder
from code2lora.hypernetwork.encoder_lines import LinesEncoder
from code2lora.hypernetwork.family import Reading
from code2lora.hypernetwork.identity import encoder_fingerprint
from code2lora.training.data import embedding
from code2lora.training.data.embedding import (
    EmbedConfig,
    EmbedProgress,
    embed,
    embed_mined,
    recipe_of,
)
from code2lora.training.data.features import (
    RELEASED_FILE,
    features_file,
    read_features,
)
from code2lora.training.data.mining import Repository, mine
from code2lora.training.data.shards import Shard, read_shards
from tests.gitrepo import GitRepo
from tests.hypernetwork import tiny
from tests.training import worlds

SMALL = EmbedConfig(chunk_chars=2_000)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    tiny.lines_encoder().save(root / "lines")
    tiny.save_transformer_encoder(root / "paper")
    return {"lines": root / "lines", "paper": root / "paper"}


@pytest.fixture
def folder(mined: Path, tmp_path: Path) -> Path:
    """Shards of this test's own."""
    return Path(shutil.copytree(mined, tmp_path / "mined"))


def _fingerprint(encoder: Path, folder: Path) -> str:
    return encoder_fingerprint(encoder, recipe_of(encoder, read_shards(folder)))


class Counting:
    """An encoder that remembers what it was asked to read."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.recipe, self.width = encoder.recipe, encoder.width
        self.diffs: list[str] = []
        self.files: list[str] = []

    def diff_key(self, diff: Diff) -> str:
        return self._encoder.diff_key(diff)

    def file_key(self, file: SourceFile) -> str:
        return self._encoder.file_key(file)

    def told(self, files: Sequence[SourceFile]) -> Sequence[SourceFile]:
        return self._encoder.told(files)

    def pool_files(self, vectors: torch.Tensor) -> torch.Tensor:
        return self._encoder.pool_files(vectors)

    def read_diffs(self, diffs: Sequence[Diff], *, across: bool = False) -> list[Reading]:
        self.diffs += [diff.commit for diff in diffs]
        return self._encoder.read_diffs(diffs, across=across)

    def read_files(self, files: Sequence[SourceFile], *, across: bool = False) -> list[Reading]:
        self.files += [file.path for file in files]
        return self._encoder.read_files(files, across=across)

    def read_snapshot(self, snapshot: object) -> Reading:
        raise AssertionError("a snapshot is pooled from its files")


@pytest.mark.parametrize("kind", ["lines", "paper"])
def test_features_are_what_the_encoder_reads_of_the_history(
    kind: str, encoders: dict[str, Path], folder: Path, repositories: list[Repository]
) -> None:
    encoder_dir = encoders[kind]
    results = embed_mined(folder, encoder_dir, SMALL)

    assert [r.status for r in results] == ["embedded"] * 3
    recipe = recipe_of(encoder_dir, read_shards(folder))
    assert (recipe.diff, recipe.rules) == (kind, "source")
    encoder = load_encoder(encoder_dir, recipe)
    for repository, shard in zip(repositories, read_shards(folder), strict=True):
        assert repository.name == shard.name
        features = read_features(shard, encoder_fingerprint(encoder_dir, recipe))
        history, rules = open_history(repository.git_dir), FileRules.named("source")
        commits = shard.table("commits")["commit"]
        diffs = [history.diff(commit, rules) for commit in commits[1:]]
        expected = torch.stack([reading.features for reading in encoder.read_diffs(diffs)])
        assert features.diffs.shape == (worlds.N_COMMITS, recipe.diff_width(encoder.width))
        assert features.diffs.dtype == torch.float32
        assert not features.diffs[0].any()  # the anchor has no changes
        torch.testing.assert_close(features.diffs[1:], expected, rtol=1e-3, atol=2e-4)
        assert sorted(features.snapshots) == sorted(set(shard.table("snapshots")["index"]))
        for index, vector in features.snapshots.items():
            reading = encoder.read_snapshot(history.snapshot(commits[index], rules))
            torch.testing.assert_close(vector, reading.features, rtol=1e-3, atol=2e-4)
        history.close()
    tokens = sum(result.n_tokens for result in results)
    assert tokens > 1000


def test_what_is_finished_is_kept(encoders: dict[str, Path], folder: Path) -> None:
    embed_mined(folder, encoders["paper"], SMALL)
    file = next(folder.glob(".features/*/*"))
    before = file.read_bytes(), file.stat().st_mtime_ns

    results = embed_mined(folder, encoders["paper"], SMALL)

    assert {(r.status, r.n_diffs, r.n_files, r.n_tokens) for r in results} == {("kept", 0, 0, 0)}
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before


def test_only_what_is_new_is_read_when_mined_again(
    encoders: dict[str, Path], tmp_path: Path, repo: GitRepo
) -> None:
    text = worlds.source(worlds.WORDS["alpha"], worlds.random.Random(1), n_functions=9)
    for n in range(4):
        repo.commit({"a.py": f"{text}x = {n}\n", "b.py": text, f"c{n}.py": f"{text}y = {n}\n"})
    source = Repository("test/growing", repo.path / ".git")
    out, config = tmp_path / "mined", replace(worlds.MINE, anchor_every=1)
    mine([source], out, config)
    recipe = recipe_of(encoders["paper"], read_shards(out))
    encoder, name = load_encoder(encoders["paper"], recipe), "f" * 64
    embed(list(read_shards(out)), encoder, name, SMALL)
    (shard,) = read_shards(out)
    before = read_features(shard, name)
    repo.commit({"a.py": f"{text}x = 5\n"})

    mine([source], out, config)
    (shard,) = read_shards(out)
    with pytest.raises(UserError) as caught:
        read_features(shard, name)
    counting = Counting(encoder)
    (result,) = embed([shard], counting, name, SMALL)

    assert caught.value.message == "test/growing was mined again after it was embedded"
    assert (counting.diffs, counting.files) == ([repo.head], ["a.py"])
    assert (result.status, result.n_diffs, result.n_files) == ("embedded", 1, 1)
    after = read_features(shard, name)
    assert torch.equal(after.diffs[:-1], before.diffs)
    assert set(after.snapshots) - set(before.snapshots) == {4}
    for index, vector in before.snapshots.items():
        assert torch.equal(after.snapshots[index], vector)
    # and all the same as from nothing
    shutil.rmtree(out / ".features")
    embed([shard], encoder, name, SMALL)
    fresh = read_features(shard, name)
    torch.testing.assert_close(fresh.diffs, after.diffs, rtol=1e-3, atol=1e-4)
    for index, vector in fresh.snapshots.items():
        torch.testing.assert_close(vector, after.snapshots[index], rtol=1e-3, atol=1e-4)


def test_equal_content_is_read_once(encoders: dict[str, Path], tmp_path: Path) -> None:
    repo = GitRepo(tmp_path / "repo")
    repo.commit({"a.py": "def parse(line):\n    return line\n" * 9})
    other = "def other(line):\n    return line * 2\n" * 9
    repo.commit({"b.py": other})
    repo.commit({"b.py": None})
    repo.commit({"b.py": other})  # the diff of two commits before
    repo.commit({"copy.py": other})
    mine([Repository("test/same", repo.path / ".git")], tmp_path / "mined", worlds.MINE)
    (shard,) = read_shards(tmp_path / "mined")
    recipe = recipe_of(encoders["paper"], [shard])
    counting = Counting(load_encoder(encoders["paper"], recipe))

    embed([shard], counting, "f" * 64, SMALL)

    assert len(counting.diffs) == 4  # nothing, added, removed, and the copy
    assert len(counting.files) == 2  # one blob under two names
    features = read_features(shard, "f" * 64)
    assert torch.equal(features.diffs[1], features.diffs[3])
    assert not torch.equal(features.diffs[1], features.diffs[2])


def test_stopped_in_a_repository_and_resumed(encoders: dict[str, Path], folder: Path) -> None:
    shards = list(read_shards(folder))
    recipe = recipe_of(encoders["paper"], shards)
    encoder = load_encoder(encoders["paper"], recipe)
    looks: list[int] = []

    def stop() -> bool:
        looks.append(1)
        return len(looks) > 2

    (first,) = embed(shards, encoder, "f" * 64, EmbedConfig(chunk_chars=1), stop=stop)
    assert (first.status, first.n_diffs) == ("stopped", 3)  # an empty one came with the first
    with pytest.raises(UserError) as caught:
        read_features(shards[0], "f" * 64)
    assert caught.value.message == f"the features of {shards[0].name} are not finished"
    assert caught.value.hint == "run `code2lora train embed` on the mined folder"

    counting = Counting(encoder)
    results = embed(shards, counting, "f" * 64, EmbedConfig(chunk_chars=1))

    assert [result.status for result in results] == ["embedded"] * 3
    assert len(set(counting.diffs)) == len(counting.diffs)
    whole = len(set(map(str, shards[0].table("commits")["commit"])))
    assert results[0].n_diffs == whole - 3
    assert read_features(shards[0], "f" * 64).diffs.shape[0] == worlds.N_COMMITS


def test_progress_says_how_far_it_is_and_what_was_there(
    encoders: dict[str, Path], folder: Path
) -> None:
    shards = list(read_shards(folder))
    encoder = load_encoder(encoders["lines"], recipe_of(encoders["lines"], shards))
    embed(shards[:1], encoder, "f" * 64, SMALL)
    seen: list[EmbedProgress] = []

    embed(shards, encoder, "f" * 64, SMALL, progress=seen.append)

    shares = [now.share for now in seen]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0)
    assert 0 < seen[0].share == pytest.approx(seen[0].kept)
    assert seen[-1].kept == pytest.approx(seen[0].kept)
    assert seen[-1].n_tokens > 0 and seen[-1].repository == shards[-1].name


def test_another_encoder_or_precision_reuses_nothing(
    encoders: dict[str, Path], folder: Path
) -> None:
    shards = list(read_shards(folder))[:1]
    recipe = recipe_of(encoders["paper"], shards)
    encoder = load_encoder(encoders["paper"], recipe)
    embed(shards, encoder, "f" * 64, SMALL)
    half = load_encoder(encoders["paper"], recipe, dtype=torch.bfloat16)

    (other,) = embed(shards, encoder, "e" * 64, SMALL)
    (coarse,) = embed(shards, half, "f" * 64, replace(SMALL, precision="bfloat16"))

    assert other.n_diffs == coarse.n_diffs == worlds.N_COMMITS
    fine, rough = read_features(shards[0], "e" * 64), read_features(shards[0], "f" * 64)
    assert not torch.equal(fine.diffs, rough.diffs)
    torch.testing.assert_close(fine.diffs, rough.diffs, rtol=0.05, atol=0.05)
    with pytest.raises(UserError) as caught:  # the same first digits, another encoder
        read_features(shards[0], "f" * 63 + "0")
    assert caught.value.message.endswith("was made with another encoder")


def test_a_damaged_file_is_made_again(encoders: dict[str, Path], folder: Path) -> None:
    embed_mined(folder, encoders["lines"], SMALL)
    fingerprint = _fingerprint(encoders["lines"], folder)
    shard = next(read_shards(folder))
    file = features_file(shard, fingerprint)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError) as caught:
        read_features(shard, fingerprint)
    assert caught.value.message.startswith(f"{file} is damaged: ")

    results = embed_mined(folder, encoders["lines"], SMALL)

    assert [result.status for result in results] == ["embedded", "kept", "kept"]
    read_features(shard, fingerprint)


def test_a_failed_write_leaves_the_old_file(
    encoders: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed_mined(folder, encoders["lines"], SMALL)
    fingerprint = _fingerprint(encoders["lines"], folder)
    shard = next(read_shards(folder))
    file = features_file(shard, fingerprint)
    old = file.read_bytes()
    manifest = json.loads((shard.path / "shard.json").read_text())
    (shard.path / "shard.json").write_text(json.dumps({**manifest, "head": "0" * 40}))

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError) as caught:
        embed_mined(folder, encoders["lines"], SMALL)

    assert caught.value.message.startswith(f"cannot write {file}: ")
    assert file.read_bytes() == old
    assert not [path for path in file.parent.iterdir() if path.name.startswith(".tmp")]


def test_nothing_embedded(encoders: dict[str, Path], folder: Path) -> None:
    shard = next(read_shards(folder))
    with pytest.raises(UserError) as caught:
        read_features(shard, "f" * 64)
    assert caught.value.message == (
        f"there are no features of {shard.name}: this encoder has not read it"
    )
    with pytest.raises(UserError) as caught:
        read_features(shard, None)
    assert caught.value.message == f"there are no features of {shard.name}: it came with none"


def test_imported_vectors(folder: Path) -> None:
    shard = next(read_shards(folder))
    indices = sorted(set(shard.table("snapshots")["index"]))
    file = shard.path / RELEASED_FILE
    diffs = torch.randn(worlds.N_COMMITS, 6).half()
    snapshots = torch.randn(len(indices), 8).half()
    save_file({"diffs": diffs, "snapshots": snapshots}, file)

    features = read_features(shard, None)

    assert torch.equal(features.diffs, diffs.float())
    assert list(features.snapshots) == indices
    assert torch.equal(features.snapshots[indices[1]], snapshots[1].float())
    own = torch.tensor([3, 5], dtype=torch.int32)
    save_file({"diffs": diffs, "snapshots": snapshots[:2], "snapshot_indices": own}, file)
    assert list(read_features(shard, None).snapshots) == [3, 5]
    for wrong in ({"diffs": diffs[1:], "snapshots": snapshots}, {"diffs": diffs}):
        save_file(wrong, file)
        with pytest.raises(UserError) as caught:
            read_features(shard, None)
        assert caught.value.message == f"{file} does not fit its shard"


def test_rules_must_agree(encoders: dict[str, Path], folder: Path) -> None:
    shards = list(read_shards(folder))
    recipe = Recipe(diff="lines", snapshot="lines", rules="paper")
    encoder = load_encoder(encoders["lines"], recipe)
    assert isinstance(encoder, LinesEncoder)
    with pytest.raises(UserError) as caught:
        embed(shards, encoder, "f" * 64, SMALL)
    assert caught.value.message == (
        f"{shards[0].name} was mined by the rules 'source' and 'source', "
        "but the encoder reads by 'paper' and 'paper'"
    )
    settings = {**shards[0].manifest["settings"], "rules": "paper"}
    other = Shard("x/y", shards[0].path, {**shards[0].manifest, "settings": settings})
    with pytest.raises(UserError) as caught:
        recipe_of(encoders["lines"], [shards[0], other])
    assert caught.value.message == "test/alpha and x/y were mined by different rules"
    settings = {**shards[0].manifest["settings"], "stream": "assertions"}
    shard = Shard("x/y", shards[0].path, {**shards[0].manifest, "settings": settings})
    assert recipe_of(encoders["paper"], [shard]).stream == "assertions"


def test_partial_work_is_written_now_and_then(
    encoders: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_WRITE_EVERY_S", 0.0)
    shards = list(read_shards(folder))[:1]
    encoder = load_encoder(encoders["lines"], recipe_of(encoders["lines"], shards))

    class Breaking(Counting):
        """Dies when it has read something."""

        def read_files(self, files: Sequence[SourceFile], *, across: bool = False) -> list[Reading]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(shards, Breaking(encoder), "f" * 64, EmbedConfig(chunk_chars=1))
    counting = Counting(encoder)

    embed(shards, counting, "f" * 64, EmbedConfig(chunk_chars=1))

    assert counting.diffs == [] and counting.files


def _command(folder: Path, encoder: Path) -> list[str]:
    main = "from code2lora.cli import main; main()"
    where = ["--mined", str(folder), "--encoder", str(encoder), "--device", "cpu"]
    return [sys.executable, "-c", main, "train", "embed", *where]


def test_the_command_stops_at_an_interrupt_and_goes_on(
    encoders: dict[str, Path], folder: Path
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        _command(folder, encoders["lines"]),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    process.stderr.readline()  # it has begun
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)

    again = subprocess.run(
        [*_command(folder, encoders["lines"]), "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )

    assert process.returncode in (0, 130)  # it may have been done
    assert "Traceback" not in err and "Traceback" not in out
    results = json.loads(again.stdout)
    assert {result["status"] for result in results} <= {"embedded", "kept"}
    fingerprint = _fingerprint(encoders["lines"], folder)
    for shard in read_shards(folder):
        assert len(read_features(shard, fingerprint).diffs) == worlds.N_COMMITS
