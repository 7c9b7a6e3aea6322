"""Turn shards into the layout of the released data sets, for other people's trainers.

Reads   shards (`shards.py`) and, where they were embedded, their features.
Writes  commits/, qna/, snapshots/commits/ and snapshots/qna/ below the output folder, each with
        one parquet file for every split of repositories that has rows (train, cr_val, cr_test,
        ood_test).

Rows are made one repository at a time and spooled to disk by `datasets`, so memory is bounded by
the largest repository. What must not be asked (`leakage`) is left out. Columns of the released
files that this data does not know are null.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from code2lora.errors import UserError
from code2lora.training.data.features import read_whole_features
from code2lora.training.data.leakage import Leak, Leaks, read_leaks
from code2lora.training.data.shards import Shard, read_shards

REPOSITORY_SPLITS = ("train", "cr_val", "cr_test", "ood_test")
COMMIT_SPLITS = {"train": "train", "ir_val": "val", "ir_test": "test"}
"""Our name of a commit's split -> the released one."""
TASKS = {"assertion": "assert_rhs", "commit": "added_lines", "file": "file_lines"}
"""Kind of a target -> what the column `task` says."""

_KEY = {"repo_id": "string", "cross_repo_split": "string", "commit_index": "int32"}
_COMMIT = _KEY | {
    "commit_sha": "string",
    "commit_timestamp": "string",
    "in_repo_split": "string",
}
_COUNTS = {
    "n_new_assertions": "int32",
    "n_added_assertions": "int32",
    "n_modified_assertions": "int32",
}
COLUMNS: Mapping[str, Mapping[str, str]] = {
    "commits": _COMMIT | {"production_code_diff": "large_string"} | _COUNTS,
    "snapshots/commits": _COMMIT | _COUNTS,
    "qna": _KEY
    | {
        "commit_sha": "string",
        "in_repo_split": "string",
        "test_file": "string",
        "lineno": "int32",
        "col_offset": "int32",
        "assertion_type": "string",
        "test_function": "string",
        "prefix": "large_string",
        "target": "string",
        "file_split": "string",
        "split_group": "string",
        "assertion_event_type": "string",
        "assertion_event_id": "string",
        "assertion_anchor": "string",
        "old_target": "string",
        "old_lineno": "int32",
        "old_col_offset": "int32",
        "task": "string",
    },
    "snapshots/qna": {
        "repo_id": "string",
        "commit_sha": "string",
        "commit_index": "int32",
        "in_repo_split": "string",
        "cross_repo_split": "string",
        "test_file": "string",
        "test_function": "string",
        "assertion_type": "string",
        "difficulty": "string",
        "context_lines": "int32",
        "prefix": "large_string",
        "target": "string",
        "anchor_sha": "string",
        "anchor_index": "int32",
        "qna_source": "string",
        "task": "string",
    },
}
"""Table -> column -> type; the vectors come on top."""

DIFF_VECTOR, SNAPSHOT_VECTOR = "diff_embedding", "repo_state_embedding"

_VECTORS = {
    "commits": (DIFF_VECTOR, SNAPSHOT_VECTOR),
    "snapshots/commits": (SNAPSHOT_VECTOR,),
    "qna": (),
    "snapshots/qna": (),
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Exported:
    """What was written."""

    rows: dict[str, int]
    """File below the output folder -> its rows."""
    n_left_out: int
    """Targets that were seen in training and so are not in the files."""


def export_released(
    mined: Path,
    out_dir: Path,
    *,
    fingerprint: str | None = None,
    with_vectors: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Exported:
    """Write the shards of a folder as files of the released layout.

    with_vectors: add the embeddings; every repository needs features
    fingerprint: of the encoder that they are of; None takes those that an import came with
    progress: called with (name, number done, number of all) after each file

    Raises UserError when there is nothing mined, or features are missing.
    """
    leaks = read_leaks(mined)
    source = _Source(mined, leaks, fingerprint, with_vectors)
    widths = source.widths()
    rows: dict[str, int] = {}
    files = [(table, split) for table in COLUMNS for split in source.splits()]
    for n_done, (table, split) in enumerate(files, start=1):
        name = f"{table}/{split}.parquet"
        n_rows = _write(source, table, split, widths, out_dir / name)
        if n_rows:
            rows[name] = n_rows
        if progress is not None:
            progress(name, n_done, len(files))
    return Exported(rows, sum(len(found) for found in leaks.leaks.values()))


@dataclass(frozen=True)
class _Source:
    """The shards to export; every table is a generator of rows over them."""

    mined: Path
    leaks: Leaks
    fingerprint: str | None
    with_vectors: bool

    def splits(self) -> list[str]:
        found = {shard.split for shard in read_shards(self.mined)}
        return [split for split in REPOSITORY_SPLITS if split in found]

    def widths(self) -> dict[str, int]:
        """Return the length of each kind of vector, of the first repository; none without them."""
        if not self.with_vectors:
            return {}
        features = read_whole_features(next(read_shards(self.mined)), self.fingerprint)
        snapshots = next(iter(features.snapshots.values()), np.zeros(0))
        return {DIFF_VECTOR: features.diffs.shape[1], SNAPSHOT_VECTOR: len(snapshots)}

    def rows(self, table: str, split: str) -> Iterator[Row]:
        make = _MAKERS[table]
        for shard in read_shards(self.mined):
            if shard.split == split:
                yield from make(self, shard)

    def is_leak(self, shard: Shard, leak: Leak) -> bool:
        return leak in self.leaks.leaks.get(shard.name, frozenset())


def _write(source: _Source, table: str, split: str, widths: Mapping[str, int], path: Path) -> int:
    """Write one file, if it has rows, and return how many."""
    import datasets

    types = {name: datasets.Value(type) for name, type in COLUMNS[table].items()}
    for name in _VECTORS[table]:
        if name in widths:
            types[name] = datasets.List(datasets.Value("float16"), length=widths[name])
    features = datasets.Features(types)
    if next(source.rows(table, split), None) is None:
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder, _quiet():
        spooled = datasets.Dataset.from_generator(
            source.rows,
            features=features,
            cache_dir=folder,
            gen_kwargs={"table": table, "split": split},
            writer_batch_size=_ROWS_IN_MEMORY,
            fingerprint=f"{table.replace('/', '-')}-{split}",
        )
        temporary = Path(folder) / path.name
        with pq.ParquetWriter(temporary, features.arrow_schema, compression="zstd") as writer:
            for batch in spooled.with_format("arrow").iter(_ROWS_IN_MEMORY):
                writer.write_table(batch)
        n_rows = len(spooled)
        os.replace(temporary, path)
    return n_rows


_ROWS_IN_MEMORY = 256


class _quiet:
    """Keeps `datasets` from drawing bars of its own."""

    def __enter__(self) -> None:
        import datasets

        self._were_on = datasets.are_progress_bars_disabled() is False
        datasets.disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        import datasets

        if self._were_on:
            datasets.enable_progress_bars()


def _commit_rows(source: _Source, shard: Shard) -> Iterator[Row]:
    patches: dict[int, list[str]] = {}
    changes = shard.table("changes")
    for index, patch in zip(changes["index"], changes["patch"], strict=True):
        patches.setdefault(index, []).append(patch)
    vectors = read_whole_features(shard, source.fingerprint) if source.with_vectors else None
    for row in _plain_commit_rows(shard):
        index = row["commit_index"]
        row["production_code_diff"] = "".join(patches.get(index, ()))
        if vectors is not None:
            row[DIFF_VECTOR] = _half(vectors.diffs[index])
            row[SNAPSHOT_VECTOR] = _half(vectors.snapshots.get(index))
        yield row


def _snapshot_rows(source: _Source, shard: Shard) -> Iterator[Row]:
    vectors = read_whole_features(shard, source.fingerprint) if source.with_vectors else None
    if vectors is not None:
        anchors = set(vectors.snapshots)
    else:
        anchors = set(shard.table("snapshots")["index"])
    for row in _plain_commit_rows(shard):
        if row["commit_index"] in anchors:
            if vectors is not None:
                row[SNAPSHOT_VECTOR] = _half(vectors.snapshots[row["commit_index"]])
            yield row


def _plain_commit_rows(shard: Shard) -> Iterator[Row]:
    commits = shard.table("commits")
    for index, commit, time_s, split, n_added, n_modified in zip(*commits.values(), strict=True):
        yield {
            "repo_id": shard.name,
            "cross_repo_split": shard.split,
            "commit_index": index,
            "commit_sha": commit,
            "commit_timestamp": datetime.fromtimestamp(time_s, UTC).isoformat(),
            "in_repo_split": COMMIT_SPLITS[split],
            "n_new_assertions": n_added + n_modified,
            "n_added_assertions": n_added,
            "n_modified_assertions": n_modified,
        }


def _qna_rows(source: _Source, shard: Shard) -> Iterator[Row]:
    for target, commit, split in _targets(source, shard, ("assertion", "commit")):
        prefix = target["prefix"]
        yield dict.fromkeys(COLUMNS["qna"]) | {
            "repo_id": shard.name,
            "cross_repo_split": shard.split,
            "commit_index": target["index"],
            "commit_sha": commit,
            "in_repo_split": split,
            "test_file": target["path"],
            "lineno": prefix.count("\n") + 1,
            "col_offset": len(prefix) - (prefix.rfind("\n") + 1),
            "assertion_type": target["assertion_type"] or "",
            "test_function": (target["function"] or "").rpartition(".")[2],
            "prefix": prefix,
            "target": target["target"],
            "assertion_event_type": target["event"],
            "task": TASKS[target["kind"]],
        }


def _snapshot_qna_rows(source: _Source, shard: Shard) -> Iterator[Row]:
    for target, commit, split in _targets(source, shard, ("file",)):
        yield dict.fromkeys(COLUMNS["snapshots/qna"]) | {
            "repo_id": shard.name,
            "commit_sha": commit,
            "commit_index": target["index"],
            "in_repo_split": split,
            "cross_repo_split": shard.split,
            "test_file": target["path"],
            "test_function": (target["function"] or "").rpartition(".")[2],
            "assertion_type": target["assertion_type"] or "",
            "context_lines": target["prefix"].count("\n"),
            "prefix": target["prefix"],
            "target": target["target"],
            "anchor_sha": commit,
            "anchor_index": target["index"],
            "qna_source": "snapshot",
            "task": TASKS["assertion" if target["assertion_type"] else "file"],
        }


def _targets(source: _Source, shard: Shard, kinds: Sequence[str]) -> Iterator[tuple[Row, str, str]]:
    """Yield the targets of some kinds that may be asked, with their commit and its split."""
    files, commits, table = shard.table("files"), shard.table("commits"), shard.table("targets")
    text_of = dict(zip(files["blob"], files["text"], strict=True))
    for values in zip(*table.values(), strict=True):
        row = dict(zip(table, values, strict=True))
        leak = Leak(row["kind"], row["index"], row["path"], row["start"])
        if row["kind"] not in kinds or source.is_leak(shard, leak):
            continue
        text = text_of[row["blob"]]
        if row["target"] is None:
            row["target"] = text[row["start"] : row["end"]]
        row["prefix"] = text[: row["start"]]
        index = row["index"]
        yield row, commits["commit"][index], COMMIT_SPLITS[commits["split"][index]]


def _half(vector: Any) -> Any:
    return None if vector is None else vector.numpy().astype(np.float16)


_MAKERS: Mapping[str, Callable[[_Source, Shard], Iterator[Row]]] = {
    "commits": _commit_rows,
    "qna": _qna_rows,
    "snapshots/commits": _snapshot_rows,
    "snapshots/qna": _snapshot_qna_rows,
}


def check_layout(folder: Path) -> None:
    """Raise UserError when a folder holds no file of the released layout."""
    if not released_files(folder, "commits") and not released_files(folder, "snapshots/commits"):
        raise UserError(
            f"{folder} holds no released data: neither commits/ nor snapshots/commits/ was found",
            hint="give the folder that holds commits/*.parquet or commits.parquet",
        )


def released_files(folder: Path, table: str) -> list[Path]:
    """Return the parquet files of one table, whether in a folder of its name or one file."""
    single = folder / f"{table}.parquet"
    return sorted((folder / table).glob("*.parquet")) or ([single] if single.is_file() else [])
