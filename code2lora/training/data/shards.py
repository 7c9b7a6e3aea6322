"""The tables that mining leaves for one repository, and how they are written and read.

A shard is a folder: `shard.json` (name, head, settings, counts) and six parquet tables. It is
written beside its place and renamed into it, so a shard that can be found is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from code2lora.errors import UserError
from code2lora.training.split import cross_repo_split

FORMAT = 2
"""Raised whenever a table's meaning changes, so that old shards are mined again."""

MANIFEST = "shard.json"

SCHEMAS: Mapping[str, pa.Schema] = {
    # Commits in the order of the history; index 0 is the oldest. It is an anchor without changes,
    # or, where the shard opens its history, a step whose changes are against the empty tree.
    # n_added and n_modified count assertions.
    "commits": pa.schema(
        [
            ("index", pa.int32()),
            ("commit", pa.string()),
            ("committed_at_s", pa.int64()),
            ("split", pa.string()),
            ("n_added", pa.int32()),
            ("n_modified", pa.int32()),
        ]
    ),
    "changes": pa.schema(
        [
            ("index", pa.int32()),
            ("path", pa.string()),
            ("old_path", pa.string()),
            ("status", pa.string()),
            ("patch", pa.large_string()),
        ]
    ),
    "snapshots": pa.schema([("index", pa.int32()), ("path", pa.string()), ("blob", pa.string())]),
    "files": pa.schema([("blob", pa.string()), ("text", pa.large_string())]),
    # Kinds `assertion` and `commit`: the commit at `index` wrote the span. Kind `file`: the span
    # stands in the snapshot at `index`, and its file is to be left out of what the model is told.
    # Before it stands text[:start]; where `target` is null, text[start:end] is what to write.
    "targets": pa.schema(
        [
            ("kind", pa.string()),
            ("index", pa.int32()),
            ("path", pa.string()),
            ("blob", pa.string()),
            ("start", pa.int32()),
            ("end", pa.int32()),
            ("target", pa.large_string()),
            ("absent", pa.int32()),
            ("function", pa.string()),
            ("assertion_type", pa.string()),
            ("event", pa.string()),
        ]
    ),
    # One row for each of `targets`, in its order: digests by which `leakage` compares them, and
    # whether it was seen earlier in this repository by what may have been trained on.
    "checks": pa.schema([("pair", pa.int64()), ("same", pa.int64()), ("leaked", pa.bool_())]),
}

Rows = dict[str, list[Any]]
"""One table as columns."""


@dataclass(frozen=True)
class Shard:
    """One repository's mined tables."""

    name: str
    path: Path
    manifest: Mapping[str, Any]

    @property
    def split(self) -> str:
        """What the repository may be used for: `train`, `cr_val`, `cr_test` or `ood_test`.

        Its name decides, unless it was imported from a data set that says.
        """
        return str(self.manifest.get("cross_repo_split") or cross_repo_split(self.name))

    @property
    def opens(self) -> bool:
        """Whether index 0 is the first step of its history by its stream (`Stream.opens`)."""
        return bool(self.manifest.get("opens"))

    @property
    def imported_snapshots(self) -> list[int]:
        """Commits whose snapshots came as vectors without files."""
        return list(self.manifest.get("snapshots", ()))

    def table(self, name: str, columns: list[str] | None = None) -> Rows:
        """Return one table's columns as Python lists, all or those named.

        Raises UserError when the file is missing or no table.
        """
        file = self.path / f"{name}.parquet"
        try:
            found: Rows = pq.read_table(file, columns=columns, schema=SCHEMAS[name]).to_pydict()
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"cannot read {file}: {error}", hint="remove its folder and mine again"
            ) from error
        return found


def folder_name(repository: str) -> str:
    """Return the folder of a repository, `owner/name` in lower case with `+` for the slash."""
    return repository.lower().replace("/", "+")


def empty_tables() -> dict[str, Rows]:
    """Return all tables without rows."""
    return {name: {column: [] for column in schema.names} for name, schema in SCHEMAS.items()}


def append(table: Rows, **values: Any) -> None:
    """Add one row; every column must be given."""
    if values.keys() != table.keys():
        raise AssertionError(f"columns {sorted(values)} for a table of {sorted(table)}")
    for column, value in values.items():
        table[column].append(value)


def write_shard(
    root: Path,
    name: str,
    tables: Mapping[str, Rows],
    manifest: dict[str, Any],
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a repository's tables and return their folder; an older shard is replaced whole.

    files: what else is to lie in the folder, by name
    """
    final = root / folder_name(name)
    temporary = root / f".tmp-{final.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for table, schema in SCHEMAS.items():
        rows = pa.table(tables[table], schema=schema)
        pq.write_table(rows, temporary / f"{table}.parquet", compression="zstd")
    for file, content_bytes in (files or {}).items():
        (temporary / file).write_bytes(content_bytes)
    counts = {table: len(next(iter(tables[table].values()))) for table in SCHEMAS}
    content = {"name": name, "format": FORMAT, **manifest, "rows": counts}
    (temporary / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    # A folder cannot be renamed onto one that has files. Between these two lines the shard is
    # missing, never half there.
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    return final


def read_shard(path: Path) -> Shard | None:
    """Return the shard in a folder, or None where there is no complete one of this format."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    return Shard(name=str(manifest["name"]), path=path, manifest=manifest)


def read_shards(root: Path, names: Sequence[str] | None = None) -> Iterator[Shard]:
    """Yield the complete shards below a folder in name order, all or those named.

    Raises UserError when the folder holds none, or lacks one that is named.
    """
    if names is None:
        folders = sorted(path for path in root.glob("*") if not path.name.startswith("."))
    else:
        folders = [root / folder_name(name) for name in sorted(names)]
    n_found = 0
    for folder in folders:
        shard = read_shard(folder)
        if shard is not None:
            n_found += 1
            yield shard
        elif names is not None:
            raise UserError(
                f"{folder} holds no mined repository", hint="run `code2lora train mine` first"
            )
    if not n_found:
        raise UserError(
            f"{root} holds no mined repositories", hint="run `code2lora train mine` first"
        )


def patch_sides(patch: str) -> tuple[str, str]:
    """Return the lines that one file's unified diff adds, and those that it removes."""
    _, cut, hunks = patch.partition("\n@@ ")
    lines = hunks.split("\n")[1:] if cut else []
    added = [f"{line[1:]}\n" for line in lines if line.startswith("+")]
    removed = [f"{line[1:]}\n" for line in lines if line.startswith("-")]
    return "".join(added), "".join(removed)
