from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save

from code2lora.errors import UserError
from code2lora.training.data import shards
from code2lora.training.data.features import RELEASED_FILE, read_features
from code2lora.training.data.mining import MineConfig, Repository, mine
from code2lora.training.data.released import COLUMNS, export_released
from code2lora.training.data.released_import import import_released, read_header, split_diff
from tests.gitrepo import GitRepo

CONFIG = MineConfig(
    stream="assertions",
    commits=0,
    kinds=("assertion", "commit", "file"),
    target_every=1,
    rules="paper",
    snapshot_rules="paper-snapshot",
)


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("released")
    repositories = []
    for n, name in enumerate(_names()):
        repo = GitRepo(root / f"git{n}")
        for i in range(6):
            body = "".join(f"def compute_{j}(value):\n    return {n} + {j}\n" for j in range(i + 1))
            tests = "".join(
                f"def test_{j}():\n    é = 'ü'\n    assert compute_{j}(\n        é\n    ) == "
                f"(\n        {n + j}\n    )\n"
                for j in range(i + 1)
            )
            repo.commit({f"src {n}.py": body, "old.py": None} if i == 3 else {f"src {n}.py": body})
            old = {"old.py": f"kept_{i} = 1\n"} if i < 3 else {}
            repo.commit({"tests/test_a.py": tests, **old})
        repositories.append(Repository(name, repo.path / ".git"))
    results = mine(repositories, root / "mined", CONFIG)
    assert {result.status for result in results} == {"mined"}
    return root / "mined"


def _names() -> list[str]:
    from code2lora.training.split import cross_repo_split

    found: dict[str, str] = {}
    for i in range(200):
        found.setdefault(cross_repo_split(f"test/{i}"), f"Test/{i}")
    return sorted(found.values())


def _with_vectors(mined: Path, out_dir: Path) -> Path:
    """Copy a folder of shards and give each the vectors that a released data set would have."""
    shutil.copytree(mined, out_dir)
    for shard in shards.read_shards(out_dir):
        n_commits = len(shard.table("commits")["index"])
        rng = np.random.default_rng(n_commits)
        vectors = {
            "diffs": rng.standard_normal((n_commits, 6)).astype(np.float16),
            "snapshots": rng.standard_normal((n_commits - 1, 4)).astype(np.float16),
            "snapshot_indices": np.arange(1, n_commits, dtype=np.int64),
        }
        (shard.path / RELEASED_FILE).write_bytes(save(vectors))
    return out_dir


def _questions(shard: shards.Shard) -> set[tuple[Any, ...]]:
    files, table = shard.table("files"), shard.table("targets")
    text_of = dict(zip(files["blob"], files["text"], strict=True))
    found = set()
    for values in zip(*table.values(), strict=True):
        row = dict(zip(table, values, strict=True))
        text = text_of[row["blob"]]
        target = text[row["start"] : row["end"]] if row["target"] is None else row["target"]
        function = (row["function"] or "").rpartition(".")[2] or None
        same = (row[name] for name in ("kind", "index", "path", "assertion_type", "event"))
        found.add((*same, text[: row["start"]], target, function))
    return found


def test_shards_survive_the_way_there_and_back(mined: Path, tmp_path: Path) -> None:
    source = _with_vectors(mined, tmp_path / "mined")

    exported = export_released(source, tmp_path / "out", with_vectors=True)
    imported = import_released(tmp_path / "out", tmp_path / "back")

    assert imported.is_whole
    assert [result.status for result in imported.results] == ["mined"] * 3
    left_out = 0
    for before, after in zip(
        shards.read_shards(source), shards.read_shards(tmp_path / "back"), strict=True
    ):
        assert (after.name, after.split) == (before.name, before.split)
        assert after.table("commits") == before.table("commits")
        assert after.table("changes") == before.table("changes")
        left_out += len(_questions(before) - _questions(after))
        assert _questions(after) <= _questions(before)
        one, two = (load_file(shard.path / RELEASED_FILE) for shard in (before, after))
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
        assert read_features(after, None).diffs.shape[1] == 6
    assert left_out == exported.n_left_out
    kinds = {row[0] for shard in shards.read_shards(tmp_path / "back") for row in _questions(shard)}
    assert kinds == {"assertion", "commit", "file"}


def test_exported_files_have_the_released_columns_and_datasets_reads_them(
    mined: Path, tmp_path: Path
) -> None:
    import datasets

    source = _with_vectors(mined, tmp_path / "mined")
    exported = export_released(source, tmp_path / "out", with_vectors=True)

    assert set(exported.rows) == {
        f"{table}/{split}.parquet" for table in COLUMNS for split in ("train", "cr_val", "cr_test")
    }
    for name, n_rows in exported.rows.items():
        file = tmp_path / "out" / name
        table = name.rpartition("/")[0]
        found = datasets.load_dataset(
            "parquet", data_files=str(file), cache_dir=str(tmp_path / "cache")
        )["train"]
        assert len(found) == n_rows
        vectors = [column for column in found.column_names if column.endswith("embedding")]
        assert set(found.column_names) == {*COLUMNS[table], *vectors}
        codecs = pq.ParquetFile(file).metadata.row_group(0).column(0).compression
        assert codecs == "ZSTD"
    schema = pq.read_schema(tmp_path / "out/commits/train.parquet")
    assert schema.field("diff_embedding").type == pa.list_(pa.float16(), 6)
    assert schema.field("production_code_diff").type == pa.large_string()
    commits = pq.read_table(tmp_path / "out/commits/train.parquet").to_pydict()
    assert list(dict.fromkeys(commits["in_repo_split"])) == ["train", "val", "test"]
    assert commits["commit_timestamp"][0].endswith("+00:00")
    assert not list((tmp_path / "out").rglob(".tmp-*"))


def test_exported_positions_are_those_of_the_targets(mined: Path, tmp_path: Path) -> None:
    export_released(mined, tmp_path / "out")

    rows = pq.read_table(tmp_path / "out/qna/train.parquet").to_pylist()

    assert rows
    for row in rows:
        lines = row["prefix"].split("\n")
        assert (row["lineno"], row["col_offset"]) == (len(lines), len(lines[-1]))
    assertions = [row for row in rows if row["task"] == "assert_rhs"]
    assert {row["assertion_event_type"] for row in assertions} == {"added"}
    assert all(row["prefix"].endswith(") == ") for row in assertions)
    assert all("\n" not in row["target"] for row in assertions)


def test_an_import_that_was_cut_off_goes_on_and_is_the_same(mined: Path, tmp_path: Path) -> None:
    export_released(mined, tmp_path / "out")
    import_released(tmp_path / "out", tmp_path / "whole")

    cut_off = import_released(tmp_path / "out", tmp_path / "parts", stop=lambda: True)
    assert not cut_off.is_whole
    (first,) = cut_off.results
    results = import_released(tmp_path / "out", tmp_path / "parts").results

    assert [result.status for result in results] == ["kept", "mined", "mined"]
    assert results[0].name == first.name

    def contents(root: Path) -> dict[str, bytes]:
        files = (path for path in root.rglob("*") if path.is_file())
        return {str(path.relative_to(root)): path.read_bytes() for path in files}

    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


def _released(folder: Path, **changes: Any) -> None:
    """Write the smallest data set that others may have made: few columns, one file for all."""
    commits = {
        "repo_id": ["o/n"] * 2,
        "cross_repo_split": ["ood_test"] * 2,
        "commit_index": [7, 3],
        "commit_sha": ["b" * 40, "a" * 40],
        "commit_timestamp": ["2025-05-02T10:00:00+02:00", "2025-05-01T00:00:00+00:00"],
        "in_repo_split": ["val", "train"],
        "production_code_diff": [
            "diff --git a/x.py b/x.py\n--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-old_name\n+new_name\n",
            None,
        ],
        "n_new_assertions": [2, 1],
    } | changes
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(commits), folder / "commits.parquet")
    qna = {
        "repo_id": ["o/n", "o/n", "o/n", "x/y"],
        "commit_sha": ["b" * 40, "b" * 40, "a" * 40, "a" * 40],
        "commit_index": [7, 7, 3, 3],
        "in_repo_split": ["val", "val", "train", "train"],
        "test_file": ["test_a.py"] * 4,
        "assertion_type": ["assert"] * 4,
        "test_function": ["test_a", "", "test_a", "test_a"],
        "prefix": ["a\nassert x == ", "a\nassert x == 1\nassert z == ", "assert x == ", "other"],
        "target": ["1", "new_name", "5", "6"],
    }
    pq.write_table(pa.table(qna), folder / "qna.parquet")


def test_files_with_few_columns_are_read(tmp_path: Path) -> None:
    _released(tmp_path / "data")

    (result,) = import_released(tmp_path / "data", tmp_path / "out").results

    assert result.rows["targets"] == 3
    (shard,) = shards.read_shards(tmp_path / "out")
    assert shard.split == "ood_test"
    assert shard.table("commits") == {
        "index": [0, 1],
        "commit": ["a" * 40, "b" * 40],
        "committed_at_s": [1746057600, 1746172800],
        "split": ["train", "ir_val"],
        "n_added": [1, 2],
        "n_modified": [0, 0],
    }
    assert shard.table("changes")["status"] == ["M"]
    assert len(shard.table("files")["blob"]) == 2  # one text holds both prefixes of a file
    assert shard.table("targets")["absent"] == [0, 0, 1]
    assert not (shard.path / RELEASED_FILE).exists()


def test_what_is_not_of_the_layout_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no released data"):
        import_released(tmp_path, tmp_path / "out")
    pq.write_table(pa.table({"repo_id": ["o/n"]}), tmp_path / "commits.parquet")
    with pytest.raises(UserError, match="no column 'commit_index'"):
        import_released(tmp_path, tmp_path / "out")
    (tmp_path / "commits.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="cannot read"):
        import_released(tmp_path, tmp_path / "out")


def test_exporting_vectors_that_are_not_there_is_a_user_error(mined: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        export_released(mined, tmp_path / "out", with_vectors=True)


def test_headers_of_all_kinds_of_changes_are_read(tmp_path: Path) -> None:
    repo = GitRepo(tmp_path / "repo")
    text = "".join(f"line {i}\n" for i in range(9))
    repo.commit({"gone.py": "1\n", "old name.py": text, 'q"ü.py': "1\n", "mode.py": "x\n"})
    repo.write({"gone.py": None, "old name.py": None, 'q"ü.py': "2\n", "empty.py": ""})
    repo.write({"new/name.py": text, "added.py": "--- a/not.py\n+++ b/not.py\n@@ -1 +1 @@\n"})
    (repo.path / "mode.py").chmod(0o755)
    repo.commit()

    diff = repo.git("diff", "-M", "HEAD~1", "HEAD") + "\n"
    patches = split_diff(diff)

    assert "".join(patches) == diff
    assert sorted(read_header(patch) for patch in patches) == [
        ("added.py", None, "A"),
        ("empty.py", None, "A"),
        ("gone.py", None, "D"),
        ("mode.py", None, "M"),
        ("new/name.py", "old name.py", "R"),
        ('q"ü.py', None, "M"),
    ]


def test_leaked_questions_are_not_exported(mined: Path, tmp_path: Path) -> None:
    """A held-out repository with the history of a trained one is a fork."""
    train = next(shard for shard in shards.read_shards(mined) if shard.split == "train")
    fork = next(shard for shard in shards.read_shards(mined) if shard.split == "cr_test")
    shutil.copytree(mined, tmp_path / "mined")
    tables = {name: train.table(name) for name in shards.SCHEMAS}
    shards.write_shard(tmp_path / "mined", fork.name, tables, dict(fork.manifest))
    (tmp_path / "mined/leakage.json").unlink()

    exported = export_released(tmp_path / "mined", tmp_path / "out")

    assert "commits/cr_test.parquet" in exported.rows
    assert "qna/cr_test.parquet" not in exported.rows
    assert exported.n_left_out >= len(tables["targets"]["kind"])
    assert dataclasses.asdict(exported)["rows"]["qna/train.parquet"]
