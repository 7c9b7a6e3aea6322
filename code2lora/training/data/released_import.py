"""Turn data sets of the released layout into shards, so that all stages read them like mined ones.

Reads   commits/, qna/, snapshots/commits/ and snapshots/qna/ (`released`), or those that are there.
Writes  shards (`shards.py`), and in each the vectors that came with it (`features`).

One repository is read at a time; a repository that is there from the same files is kept. The files
hold of each test file only what stands before a target, so that is all of the shard's texts: there
is nothing behind a target, and no snapshot has files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as pads
from safetensors.numpy import save

from code2lora.errors import UserError
from code2lora.training.data import leakage, shards
from code2lora.training.data.features import RELEASED_FILE
from code2lora.training.data.mining import Mined
from code2lora.training.data.released import (
    COLUMNS,
    DIFF_VECTOR,
    SNAPSHOT_VECTOR,
    TASKS,
    Row,
    check_layout,
    released_files,
)
from code2lora.training.data.targets import KnownNames, TargetConfig

_SPLITS = {"train": "train", "val": "ir_val", "test": "ir_test"}
_KINDS = {task: kind for kind, task in TASKS.items()}
_EVENTS = ("added", "modified")
_SECTION = re.compile(r"^(?=diff --git )", re.MULTILINE)
_HEADER_FIELDS = re.compile(
    r"^(rename from|rename to|---|\+\+\+|new file mode|deleted file mode) ?(.*)$", re.MULTILINE
)
_NEEDED = ("repo_id", "commit_index", "commit_sha", "in_repo_split")


@dataclass(frozen=True)
class Imported:
    """What became of the repositories of a data set."""

    results: list[Mined]
    is_whole: bool
    """Whether all of them were reached."""


def import_released(
    folder: Path,
    out_dir: Path,
    *,
    progress: Callable[[Mined, int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Imported:
    """Write a shard for every repository of a released data set.

    progress: called with (result, number done, number of all) after each repository
    stop: asked after each repository; when it answers true, no further one is begun

    Raises UserError when the folder holds no such data, or a file lacks a column.
    """
    check_layout(folder)
    source = _Files(folder)
    results: list[Mined] = []
    names = source.repositories()
    for name in names:
        results.append(_import_one(source, name, out_dir))
        if progress is not None:
            progress(results[-1], len(results), len(names))
        if stop is not None and stop():
            break
    if results:
        leakage.write_leaks(out_dir)
    return Imported(results, is_whole=len(results) == len(names))


class _Files:
    """The files of a released data set, read by repository."""

    def __init__(self, folder: Path) -> None:
        self._tables: dict[str, pads.Dataset] = {}
        sizes = []
        for table in COLUMNS:
            files = released_files(folder, table)
            sizes += [(table, file.name, file.stat().st_size) for file in files]
            if files:
                self._tables[table] = _open(files)
        self.digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]

    def repositories(self) -> list[str]:
        names: set[str] = set()
        for table in ("commits", "snapshots/commits"):
            if table in self._tables:
                column = self._tables[table].to_table(columns=["repo_id"])["repo_id"]
                names.update(column.unique().to_pylist())
        return sorted(names)

    def rows(self, table: str, name: str) -> pa.Table | None:
        """Return a repository's rows of one table, None where the table is not there."""
        found = self._tables.get(table)
        return None if found is None else found.to_table(filter=pads.field("repo_id") == name)


def _open(files: Sequence[Path]) -> pads.Dataset:
    try:
        found = pads.dataset([str(file) for file in files], format="parquet")
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {files[0].parent}: {error}") from error
    for column in _NEEDED:
        if column not in found.schema.names:
            raise UserError(
                f"{files[0]} has no column {column!r}, so it is not of the released layout",
                hint=f"it has {', '.join(found.schema.names[:8])}",
            )
    return found


def _import_one(source: _Files, name: str, out_dir: Path) -> Mined:
    settings = {
        "stream": "assertions",
        "rules": "paper",
        "snapshot_rules": "paper-snapshot",
        "source": source.digest,
    }
    found = shards.read_shard(out_dir / shards.folder_name(name))
    if found is not None and found.manifest.get("settings") == settings:
        return Mined(name, "kept", dict(found.manifest["rows"]))
    commits = _commits(source, name)
    tables = shards.empty_tables()
    for column, values in commits.columns().items():
        tables["commits"][column] = values
    _add_changes(tables, commits)
    for table, kind in (("qna", None), ("snapshots/qna", "file")):
        rows = source.rows(table, name)
        if rows is not None:
            _add_targets(tables, commits, rows.to_pylist(), kind)
    leakage.mark_seen(tables["checks"], tables["targets"], tables["commits"]["split"])
    manifest = {
        "head": commits.shas[-1],
        "settings": settings,
        "cross_repo_split": commits.cross_repo_split,
        "opens": commits.opens,
        "snapshots": commits.snapshots,
    }
    path = shards.write_shard(out_dir, name, tables, manifest, commits.files())
    written = shards.read_shard(path)
    if written is None:
        raise AssertionError(f"{path} was written and cannot be read")
    return Mined(name, "mined", dict(written.manifest["rows"]))


class _Commits:
    """One repository's commits in their order, with the vectors that came with them."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self.shas: list[str] = table["commit_sha"].to_pylist()
        self.diffs: list[str | None] = self._column("production_code_diff")
        splits = table["cross_repo_split"].to_pylist() if self._has("cross_repo_split") else []
        self.cross_repo_split: str | None = splits[0] if splits else None
        self.index_of = {sha: index for index, sha in enumerate(self.shas)}

    def _has(self, column: str) -> bool:
        return column in self._table.column_names

    def _column(self, name: str) -> list[Any]:
        return self._table[name].to_pylist() if self._has(name) else [None] * len(self._table)

    @property
    def opens(self) -> bool:
        """Whether the first commit came with a diff: it is then the whole of its tree."""
        vectors, _ = self._vectors(DIFF_VECTOR)
        return bool(self.diffs[0]) or (vectors is not None and bool(vectors[0].any()))

    @property
    def snapshots(self) -> list[int]:
        """The commits that came with the vector of a snapshot."""
        found: list[int] = self._vectors(SNAPSHOT_VECTOR)[1].tolist()
        return found

    def columns(self) -> dict[str, list[Any]]:
        """Return the columns of the shard's table."""
        n_new = self._column("n_new_assertions")
        n_modified = [n or 0 for n in self._column("n_modified_assertions")]
        n_added = [
            (new or 0) - modified if added is None else added
            for new, added, modified in zip(
                n_new, self._column("n_added_assertions"), n_modified, strict=True
            )
        ]
        return {
            "index": list(range(len(self.shas))),
            "commit": self.shas,
            "committed_at_s": [_seconds(time) for time in self._column("commit_timestamp")],
            "split": [_SPLITS.get(split, split) for split in self._column("in_repo_split")],
            "n_added": n_added,
            "n_modified": n_modified,
        }

    def files(self) -> dict[str, bytes]:
        """Return the file with the vectors, if there are any."""
        diffs, _ = self._vectors(DIFF_VECTOR)
        snapshots, indices = self._vectors(SNAPSHOT_VECTOR)
        if diffs is None and snapshots is None:
            return {}
        of_diffs = snapshots if diffs is None else diffs
        of_snapshots = diffs if snapshots is None else snapshots
        assert of_diffs is not None and of_snapshots is not None
        return {
            RELEASED_FILE: save(
                {
                    "diffs": np.zeros_like(of_diffs) if diffs is None else of_diffs,
                    "snapshots": of_snapshots[indices],
                    "snapshot_indices": indices,
                }
            )
        }

    def _vectors(self, column: str) -> tuple[npt.NDArray[np.float16] | None, npt.NDArray[np.int64]]:
        """Return a vector for each commit, zeros where it has none, and which commits have one."""
        values = self._table[column].combine_chunks() if self._has(column) else None
        if values is None or values.null_count == len(values):
            return None, np.zeros(0, dtype=np.int64)
        indices = np.flatnonzero(np.asarray(values.is_valid()))
        known = values.drop_null().flatten().to_numpy(zero_copy_only=False).astype(np.float16)
        vectors = np.zeros((len(values), len(known) // len(indices)), dtype=np.float16)
        vectors[indices] = known.reshape(len(indices), -1)
        return vectors, indices.astype(np.int64)


def _commits(source: _Files, name: str) -> _Commits:
    for table in ("commits", "snapshots/commits"):
        rows = source.rows(table, name)
        if rows is not None and len(rows):
            return _Commits(rows.sort_by("commit_index"))
    raise AssertionError(f"{name} was listed and has no commits")


def _add_changes(tables: Mapping[str, shards.Rows], commits: _Commits) -> None:
    for index, diff in enumerate(commits.diffs):
        for patch in split_diff(diff or ""):
            path, old_path, status = read_header(patch)
            shards.append(
                tables["changes"],
                index=index,
                path=path,
                old_path=old_path,
                status=status,
                patch=patch,
            )


def split_diff(diff: str) -> list[str]:
    """Return the patches of the files of a whole diff; joined, they are the diff."""
    return [patch for patch in _SECTION.split(diff) if patch]


def read_header(patch: str) -> tuple[str, str | None, str]:
    """Return path, old path (of a rename, else None) and status of one file's patch."""
    header = patch[: patch.index("\n@@ ") + 1] if "\n@@ " in patch else patch
    fields = {match[1]: match[2] for match in _HEADER_FIELDS.finditer(header)}
    if "rename to" in fields:
        return _unquote(fields["rename to"]), _unquote(fields["rename from"]), "R"
    status = "A" if "new file mode" in fields else "D" if "deleted file mode" in fields else "M"
    name = fields.get("---" if status == "D" else "+++")
    if name is None:
        # Neither line is there without hunks; the two names of the first line are then the same.
        both = patch.partition("\n")[0].removeprefix("diff --git ")
        name = both[: len(both) // 2]
    return _unquote(name)[2:], None, status


def _unquote(name: str) -> str:
    name = name.rstrip("\t")
    if not name.startswith('"'):
        return name
    inner = name[1:-1].encode("utf-8").decode("unicode_escape")
    return inner.encode("latin-1", "replace").decode("utf-8", "replace")


def _add_targets(
    tables: Mapping[str, shards.Rows], commits: _Commits, rows: list[Row], kind: str | None
) -> None:
    """Add questions, with as few texts as hold all their prefixes."""
    known = _Known(tables["changes"])
    blobs = set(tables["files"]["blob"])
    limit = TargetConfig().prefix_chars
    for index, path, asked in _by_file(commits, rows):
        for text, found in _texts(asked):
            blob = _blob_id(text)
            if blob not in blobs:
                blobs.add(blob)
                shards.append(tables["files"], blob=blob, text=text)
            for row in found:
                prefix, target = row["prefix"], row["target"]
                end = len(prefix) + len(target)
                is_own = text.startswith(target, len(prefix))
                pair, same = leakage.digests(
                    prefix, target, prefix[prefix.rfind("\n") + 1 :] + target
                )
                event = row.get("assertion_event_type")
                shards.append(
                    tables["targets"],
                    kind=kind or _KINDS.get(row.get("task") or "", "assertion"),
                    index=index,
                    path=path,
                    blob=blob,
                    start=len(prefix),
                    end=end if is_own else len(prefix),
                    target=None if is_own else target,
                    absent=known.up_to(index).n_absent(target, prefix[-limit:], path),
                    function=row.get("test_function") or None,
                    assertion_type=row.get("assertion_type") or None,
                    event=event if event in _EVENTS else None,
                )
                shards.append(tables["checks"], pair=pair, same=same, leaked=False)


class _Known:
    """The names that the changes up to a commit have used; asked in the order of the commits."""

    def __init__(self, changes: shards.Rows) -> None:
        self._changes = list(zip(changes["index"], changes["path"], changes["patch"], strict=True))[
            ::-1
        ]
        self._names = KnownNames()

    def up_to(self, index: int) -> KnownNames:
        while self._changes and self._changes[-1][0] <= index:
            _, path, patch = self._changes.pop()
            self._names.add(path, shards.patch_sides(patch)[0])
        return self._names


def _by_file(commits: _Commits, rows: list[Row]) -> Iterator[tuple[int, str, list[Row]]]:
    """Yield (commit's index, path, rows) in the order of the commits and paths."""
    files: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        index = commits.index_of.get(row["commit_sha"])
        if index is None or row["prefix"] is None or not row["target"]:
            continue
        files.setdefault((index, row["test_file"] or ""), []).append(row)
    for (index, path), found in sorted(files.items(), key=lambda item: item[0]):
        yield index, path, found


def _texts(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield texts and the rows whose prefixes they begin with, rows in the order of the file."""
    texts: list[tuple[str, list[Row]]] = []
    for row in sorted(rows, key=lambda row: (-len(row["prefix"]), row["prefix"], row["target"])):
        for text, found in texts:
            if text.startswith(row["prefix"]):
                found.append(row)
                break
        else:
            texts.append((row["prefix"] + row["target"], [row]))
    for text, found in reversed(texts):
        yield text, found[::-1]


def _blob_id(text: str) -> str:
    content = text.encode("utf-8", "surrogatepass")
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _seconds(time: str | None) -> int:
    try:
        return int(datetime.fromisoformat(time or "").timestamp())
    except ValueError:
        return 0
