from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from code2lora.errors import UserError
from code2lora.history.open import open_history
from code2lora.history.stream import stream_named
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
    for kind, index, path, blob, start, end, *_ in zip(*table.values(), strict=True):
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


ASSERTIONS = dataclasses.replace(
    worlds.MINE,
    stream="assertions",
    commits=0,
    kinds=("assertion",),
    rules="paper",
    snapshot_rules="paper-snapshot",
)


def _case(path: Path) -> tuple[GitRepo, Repository]:
    repo = GitRepo(path)
    return repo, Repository("test/case", repo.path / ".git")


def _asked(shard: shards.Shard, kind: str = "assertion") -> list[tuple[int, str, str, str, str]]:
    """Index, path, what stands on the line above the target, target, and event."""
    files, table = shard.table("files"), shard.table("targets")
    text_of = dict(zip(files["blob"], files["text"], strict=True))
    found = []
    for values in zip(*table.values(), strict=True):
        row = dict(zip(table, values, strict=True))
        text = text_of[row["blob"]]
        target = text[row["start"] : row["end"]] if row["target"] is None else row["target"]
        line = text[: row["start"]].rpartition("\n")[2].lstrip()
        if row["kind"] == kind:
            found.append((row["index"], row["path"], line, target, row["event"]))
    return found


def test_the_stream_of_assertions_keeps_the_commits_that_change_one(tmp_path: Path) -> None:
    repo, repository = _case(tmp_path / "repo")
    repo.commit({"a.py": "def f():\n    return 1\n"})
    test = "def test_f():\n    assert f() == 1\n    assert f(\n    ) == (\n        2)\n"
    first = repo.commit({"tests/test_a.py": test, "a.py": "def f():\n    return 2\n"})
    repo.commit({"a.py": "def f():\n    return 3\n"})
    repo.commit({"tests/test_a.py": "import a\n\n" + test})  # an edit above
    repo.commit({"tests/test_a.py": None, "tests/test_b.py": "import a\n\n" + test})  # a rename
    second = repo.commit({"tests/test_b.py": test.replace("== 1", "== 4")})
    repo.commit({"b.py": "late = 1\n"})

    (result,) = mine([repository], tmp_path / "mined", ASSERTIONS)

    assert result.status == "mined"
    (shard,) = shards.read_shards(tmp_path / "mined")
    commits = shard.table("commits")
    assert commits["commit"] == [first, second]
    assert (commits["n_added"], commits["n_modified"]) == ([2, 0], [0, 1])
    assert commits["split"] == ["train", "train"]
    assert _asked(shard) == [
        (0, "tests/test_a.py", "assert f() == ", "1", "added"),
        (0, "tests/test_a.py", ") == ", "(2)", "added"),
        (1, "tests/test_b.py", "assert f() == ", "4", "modified"),
    ]
    changes = shard.table("changes")
    whole = repo.git("diff", "-U3", f"{first}~0", second, "--", "a.py") + "\n"
    assert changes["index"] == [0, 1]  # no test file, and each against the step before
    assert "+    return 2" in changes["patch"][0] and "new file" in changes["patch"][0]
    assert shards.patch_sides(changes["patch"][1]) == shards.patch_sides(whole)
    assert sorted(set(shard.table("snapshots")["index"])) == [0, 1]


def test_mining_takes_the_steps_that_a_checkpoint_takes(tmp_path: Path) -> None:
    """What a model is trained on and what advances it later must be the same commits."""
    repo, repository = _case(tmp_path / "repo")
    rng = random.Random(5)
    names = ["tests/a.py", "tests/b.py", "src/c.py", "test_d.py"]
    for i in range(30):
        n = rng.randrange(6)
        tests = (f"def test_{j}():\n    assert f({j}) == {rng.randrange(2)}\n" for j in range(n))
        body = "".join(tests)
        repo.commit({rng.choice(names): f"import m{i}\n{body}"})

    mine([repository], tmp_path / "mined", ASSERTIONS)

    (shard,) = shards.read_shards(tmp_path / "mined")
    history = open_history(repository.git_dir)
    commits = list(history.first_parents(repo.head))[::-1]
    steps = list(stream_named("assertions").steps(history, None, commits))
    history.close()
    assert shard.table("commits")["commit"] == [step.commit.id for step in steps]
    assert 5 < len(steps) < 30


def test_an_assertion_that_went_and_came_back_is_asked_once(tmp_path: Path) -> None:
    repo, repository = _case(tmp_path / "repo")
    test = "def test_f():\n    assert f() == 1\n"
    repo.commit({"test_a.py": test})
    repo.commit({"test_a.py": "def test_f():\n    pass\n"})
    repo.commit({"test_a.py": test})

    mine([repository], tmp_path / "mined", ASSERTIONS)

    (shard,) = shards.read_shards(tmp_path / "mined")
    assert [index for index, *_ in _asked(shard)] == [0]
    assert shard.table("commits")["n_added"] == [1, 1]


def test_no_commit_is_emitted_twice_whatever_is_edited_above(tmp_path: Path) -> None:
    repo, repository = _case(tmp_path / "repo")
    body = "".join(f"def test_{i}():\n    assert f({i}) == {i}\n\n" for i in range(5))
    for i in range(6):
        imports = "".join(f"import m{j}\n" for j in range(i))
        repo.commit({"test_a.py": f"{imports}{body}def test_new_{i}():\n    assert g == {i}\n"})

    mine([repository], tmp_path / "mined", ASSERTIONS)

    (shard,) = shards.read_shards(tmp_path / "mined")
    assert [(index, target) for index, _, _, target, _ in _asked(shard)] == [
        *((0, str(i)) for i in range(5)),
        *((i, str(i)) for i in range(6)),
    ]


def test_a_repository_without_assertions_is_reported_and_mines_as_every_commit(
    repositories: list[Repository], tmp_path: Path
) -> None:
    (result,) = mine(repositories[:1], tmp_path / "a", ASSERTIONS)
    assert result.status == "failed"
    assert "assertion" in result.reason

    (result,) = mine(repositories[:1], tmp_path / "b", worlds.MINE)
    assert result.status == "mined" and result.rows["targets"]


def test_every_commit_gives_its_assertions_too(tmp_path: Path) -> None:
    repo, repository = _case(tmp_path / "repo")
    repo.commit({"a.py": "def compute_total():\n    return make_sum()\n", "test_a.py": "x = 1\n"})
    repo.commit({"test_a.py": "def test_x():\n    assert shown_x == compute_total(local_y)\n"})

    mine([repository], tmp_path / "mined", worlds.MINE)

    (shard,) = shards.read_shards(tmp_path / "mined")
    assert _asked(shard) == [
        (1, "test_a.py", "assert shown_x == ", "compute_total(local_y)", "added")
    ]
    table = shard.table("targets")
    row = table["kind"].index("assertion")
    assert table["absent"][row] == 1  # of the two names, one is another file's
    assert (table["function"][row], table["assertion_type"][row]) == ("test_x", "assert")


def test_more_assertions_than_wanted_are_chosen_in_the_same_way_each_time(tmp_path: Path) -> None:
    repo, repository = _case(tmp_path / "repo")
    repo.commit({"test_a.py": "".join(f"assert f({i}) == {i}\n" for i in range(20))})
    targets = dataclasses.replace(ASSERTIONS.targets, assertions_per_step=4)
    config = dataclasses.replace(ASSERTIONS, targets=targets)

    for name in ("one", "two"):
        mine([repository], tmp_path / name, config)

    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")
    (shard,) = shards.read_shards(tmp_path / "one")
    asked = [int(target) for *_, target, _ in _asked(shard)]
    assert len(asked) == 4 and asked == sorted(asked) and asked != [0, 1, 2, 3]


def test_tables_are_read_by_datasets(mined: Path) -> None:
    import datasets

    shard = next(shards.read_shards(mined))
    for name, schema in shards.SCHEMAS.items():
        found = datasets.load_dataset(
            "parquet", data_files=str(shard.path / f"{name}.parquet"), streaming=True
        )["train"]
        assert next(iter(found)).keys() == set(schema.names)
