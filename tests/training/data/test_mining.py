from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from code2lora.errors import UserError
from code2lora.training.data import mining, shards
from code2lora.training.data.mining import Repository, mine
from tests.gitrepo import GitRepo
from tests.training import worlds


def _contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.startswith("bags-")
    }


def test_the_same_history_gives_the_same_bytes_on_any_number_of_processes(
    repositories: list[Repository], mined: Path, tmp_path: Path
) -> None:
    mine(list(reversed(repositories)), tmp_path, worlds.MINE, workers=2)

    assert _contents(tmp_path) == _contents(mined)


def test_a_finished_repository_is_kept_and_a_half_written_one_is_not(
    repositories: list[Repository], tmp_path: Path
) -> None:
    mine(repositories[:1], tmp_path, worlds.MINE)
    folder = tmp_path / shards.folder_name(repositories[0].name)
    before = (folder / "targets.parquet").stat().st_mtime_ns
    # what a kill leaves behind: tables without the manifest, under a temporary name
    half = tmp_path / f".tmp-{shards.folder_name(repositories[1].name)}-1"
    half.mkdir()
    (half / "files.parquet").write_bytes(b"PAR1")

    results = mine(repositories, tmp_path, worlds.MINE)

    assert [result.status for result in results] == ["kept", "mined", "mined"]
    assert (folder / "targets.parquet").stat().st_mtime_ns == before
    assert [shard.name for shard in shards.read_shards(tmp_path)] == [
        repository.name for repository in repositories
    ]


def test_other_settings_or_a_new_commit_mine_again(tmp_path: Path) -> None:
    repository = worlds.make_repository(tmp_path / "git", "alpha")
    out_dir = tmp_path / "mined"
    mine([repository], out_dir, worlds.MINE)

    fewer = dataclasses.replace(worlds.MINE, commits=5)
    assert mine([repository], out_dir, fewer)[0].rows["commits"] == 5

    GitRepo(repository.git_dir.parent, init=False).commit({"new.py": "almond_new = 1\n"})
    (result,) = mine([repository], out_dir, fewer)
    assert result.status == "mined"


def test_targets_lie_in_their_files_and_commit_targets_are_what_the_commit_added(
    repositories: list[Repository], mined: Path
) -> None:
    shard = next(shards.read_shards(mined))
    files, table = shard.table("files"), shard.table("targets")
    text_of = dict(zip(files["blob"], files["text"], strict=True))
    commits = shard.table("commits")["commit"]
    git = GitRepo(repositories[0].git_dir.parent, init=False)

    kinds = set()
    for kind, index, path, blob, start, end, _ in zip(*table.values(), strict=True):
        kinds.add(kind)
        body = text_of[blob][start:end]
        assert git.git("rev-parse", f"{commits[index]}:{path}") == blob
        if kind == "commit":
            added = git.git("show", "--format=", "-U0", commits[index], "--", path)
            assert all(f"+{line}" in added.split("\n") for line in body.splitlines())
    assert kinds == {"commit", "file"}


def test_snapshots_stand_at_the_anchors_and_at_the_newest_commit(mined: Path) -> None:
    for shard in shards.read_shards(mined):
        assert sorted(set(shard.table("snapshots")["index"])) == [0, 4, 8]


def test_a_broken_repository_is_reported_and_the_others_go_on(
    repositories: list[Repository], tmp_path: Path
) -> None:
    empty = GitRepo(tmp_path / "empty")
    broken = Repository("test/empty", empty.path / ".git")
    seen: list[tuple[str, int, int]] = []

    results = mine(
        [broken, repositories[0]],
        tmp_path / "mined",
        worlds.MINE,
        progress=lambda result, done, n: seen.append((result.status, done, n)),
    )

    assert seen == [("failed", 1, 2), ("mined", 2, 2)]
    assert results[0].reason


def test_a_stop_begins_no_further_repository(
    repositories: list[Repository], tmp_path: Path
) -> None:
    results = mine(repositories, tmp_path, worlds.MINE, stop=lambda: True)

    assert len(results) == 1


def test_shards_of_a_folder_without_any_are_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no mined repositories"):
        list(shards.read_shards(tmp_path))
    with pytest.raises(UserError, match="holds no mined repository"):
        list(shards.read_shards(tmp_path, ["some/name"]))


def test_a_damaged_table_is_a_user_error(repositories: list[Repository], tmp_path: Path) -> None:
    mining.mine_one(repositories[0], tmp_path, worlds.MINE)
    (shard,) = shards.read_shards(tmp_path)
    (shard.path / "files.parquet").write_bytes(b"not a table")

    with pytest.raises(UserError, match="cannot read"):
        shard.table("files")
