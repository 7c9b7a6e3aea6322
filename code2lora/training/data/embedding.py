"""Read mined repositories with a frozen encoder, each distinct text once.

Reads   shards (`shards.py`), an encoder.
Writes  one file of vectors for each repository (`features.py`).

A run that was stopped goes on where it was, within a repository too. A repository that was mined
again is embedded again, but only what is new in it is read. A snapshot is pooled from its files'
stored vectors, so that it has the same features whether they were read in one run or in several.
The last digits of a vector depend on the device and on what was read beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch

from code2lora.errors import UserError
from code2lora.history.model import Diff, FileChange, SourceFile
from code2lora.history.stream import StreamName
from code2lora.hypernetwork.config import Recipe
from code2lora.hypernetwork.encoder import Encoder, load_encoder, reader_kind
from code2lora.hypernetwork.family import Reading
from code2lora.hypernetwork.identity import encoder_fingerprint
from code2lora.training.data.features import FeatureStore, Rows
from code2lora.training.data.shards import Shard, patch_sides, read_shards

_WRITE_EVERY_S = 300.0
"""What is embedded is written at least this often within a repository."""

T = TypeVar("T")


@dataclass(frozen=True)
class Embedded:
    """What became of one repository."""

    name: str
    status: Literal["embedded", "kept", "stopped"]
    """`kept`: it was finished before."""
    n_diffs: int
    """Distinct diffs that were read now; those found in the file do not count."""
    n_files: int
    """Distinct file versions that were read now."""
    n_tokens: int


@dataclass(frozen=True)
class EmbedProgress:
    """How far `embed` is."""

    share: float
    """Of all repositories, 0 to 1, by the size of their tables."""
    kept: float
    """How much of that share had been finished before, or was found in a file."""
    repository: str
    n_tokens: int
    """Read in this run."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How to read; none of it says what is read."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """What a transformer computes in. Vectors of another precision are not reused."""
    chunk_chars: int = 400_000
    """Text that is read together, between two looks at `stop`."""


def recipe_of(encoder: Path, shards: Iterable[Shard]) -> Recipe:
    """Return the recipe of a checkpoint over shards: the encoder's kind, their rules and stream.

    Raises UserError when the directory is no encoder, or the shards were mined by different rules.
    """
    kind = reader_kind(encoder)
    found = {_mined_by(shard): shard.name for shard in shards}
    if len(found) != 1:
        names = " and ".join(sorted(found.values()))
        raise UserError(
            f"{names or 'no repositories'} were mined by different rules",
            hint="mine them into one folder with one recipe",
        )
    rules, snapshot_rules, stream = found.popitem()[0]
    return Recipe(
        diff=kind,
        snapshot=kind,
        rules=rules,
        snapshot_rules=snapshot_rules,
        stream=stream,
    )


def embed_mined(
    mined: Path,
    encoder_dir: Path,
    config: EmbedConfig,
    *,
    base: Path | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[EmbedProgress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[Embedded]:
    """Embed every shard of a folder with the encoder in a directory; see `embed`.

    base: the base model's directory, for an encoder that reads its gradients
    Raises UserError when nothing is mined or the directory is no encoder, too.
    """
    shards = list(read_shards(mined))
    recipe = recipe_of(encoder_dir, shards)
    fingerprint = encoder_fingerprint(encoder_dir, recipe)
    encoder = load_encoder(encoder_dir, recipe, device, getattr(torch, config.precision), base=base)
    return embed(shards, encoder, fingerprint, config, progress=progress, stop=stop)


def embed(
    shards: Sequence[Shard],
    encoder: Encoder,
    fingerprint: str,
    config: EmbedConfig,
    *,
    progress: Callable[[EmbedProgress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[Embedded]:
    """Write the features of every shard and return what became of each, in their order.

    fingerprint: of the encoder (`encoder_fingerprint`), by which its vectors are found again
    stop: when it answers true, what was embedded is written and no further shard is begun
    Raises UserError when a shard is damaged, was mined by other rules than the encoder's recipe
    names, or when there is no room.
    """
    run = _Run(encoder, fingerprint, config, progress, stop or (lambda: False))
    sizes = [_table_bytes(shard) for shard in shards]
    results: list[Embedded] = []
    for i, shard in enumerate(shards):
        run.begin(shard, sum(sizes[:i]) / sum(sizes), sizes[i] / sum(sizes))
        results.append(_embed_one(run, shard))
        if results[-1].status == "stopped":
            break
    return results


class _Run:
    """One call of `embed`."""

    def __init__(
        self,
        encoder: Encoder,
        fingerprint: str,
        config: EmbedConfig,
        progress: Callable[[EmbedProgress], None] | None,
        stop: Callable[[], bool],
    ) -> None:
        self.encoder = encoder
        self.fingerprint = fingerprint
        self.config = config
        self.stop = stop
        self._progress = progress
        self._name, self._start, self._length, self._kept = "", 0.0, 0.0, 0.0
        self.n_tokens = 0

    def begin(self, shard: Shard, start: float, length: float) -> None:
        """Go on to a shard, which is `length` of all the work and begins at `start`."""
        self._name, self._start, self._length = shard.name, start, length

    def tell(self, share: float, *, kept: float = 0.0) -> None:
        """share: of the shard; kept: how much of that was found to be there."""
        self._kept += self._length * kept
        if self._progress is not None:
            done = min(1.0, self._start + self._length * share)
            self._progress(EmbedProgress(done, self._kept, self._name, self.n_tokens))


@dataclass(frozen=True)
class _Texts(Generic[T]):
    """Distinct things to read, and how that is done."""

    items: dict[bytes, T]
    n_chars: Callable[[T], int]
    read: Callable[[Sequence[T]], list[Reading]]
    rows: Rows

    def missing(self) -> dict[bytes, T]:
        return {key: item for key, item in self.items.items() if key not in self.rows}

    def chunks(self, chunk_chars: int) -> Iterator[tuple[dict[bytes, T], int]]:
        """Yield what is missing, about so many characters at a time, and how many these are."""
        chunk: dict[bytes, T] = {}
        size = 0
        for key, item in self.missing().items():
            chunk[key] = item
            size += self.n_chars(item)
            if size >= chunk_chars:
                yield chunk, size
                chunk, size = {}, 0
        if chunk:
            yield chunk, size


def _embed_one(run: _Run, shard: Shard) -> Embedded:
    encoder = run.encoder
    store = FeatureStore(
        shard,
        run.fingerprint,
        precision=run.config.precision,
        diff_width=encoder.recipe.diff_width(encoder.width),
        file_width=encoder.recipe.file_width(encoder.width),
        adds_up=encoder.recipe.adds_up,
    )
    if store.is_finished:
        run.tell(1.0, kept=1.0)
        return Embedded(shard.name, "kept", 0, 0, 0)
    _check_rules(shard, encoder.recipe)
    adds_up = encoder.recipe.adds_up
    commits, diffs = (_distinct_changes if adds_up else _distinct_diffs)(shard, encoder)
    snapshots, files = _distinct_files(shard, encoder)
    before = len(store.diffs), len(store.files), run.n_tokens
    finished = _fill(
        run,
        store,
        [
            _Texts(diffs, _diff_chars, lambda d: encoder.read_diffs(d, across=True), store.diffs),
            _Texts(files, _file_chars, lambda f: encoder.read_files(f, across=True), store.files),
        ],
    )
    if finished:
        vectors = store.files.vectors
        pooled = {  # of an encoder whose features add up, whoever needs them adds them up
            index: encoder.pool_files(vectors[store.files.find(keys).long()].float())
            for index, keys in ({} if adds_up else snapshots).items()
        }
        store.finish(commits, pooled)
        run.tell(1.0)
    return Embedded(
        shard.name,
        "embedded" if finished else "stopped",
        len(store.diffs) - before[0],
        len(store.files) - before[1],
        run.n_tokens - before[2],
    )


def _fill(run: _Run, store: FeatureStore, kinds: Sequence[_Texts]) -> bool:  # type: ignore[type-arg]
    """Read all that is missing, and return whether that came to an end."""
    total = max(1, sum(kind.n_chars(item) for kind in kinds for item in kind.items.values()))
    missing = sum(kind.n_chars(item) for kind in kinds for item in kind.missing().values())
    done = total - missing
    run.tell(done / total, kept=done / total)
    written_s = time.monotonic()
    for kind in kinds:
        for chunk, n_chars in kind.chunks(run.config.chunk_chars):
            if run.stop():
                store.write()
                return False
            readings = kind.read(list(chunk.values()))
            kind.rows.add(list(chunk), torch.stack([reading.features for reading in readings]))
            run.n_tokens += sum(reading.n_tokens for reading in readings)
            done += n_chars
            run.tell(done / total)
            if time.monotonic() - written_s > _WRITE_EVERY_S:
                store.write()
                written_s = time.monotonic()
    return True


def _distinct_diffs(shard: Shard, encoder: Encoder) -> tuple[list[bytes], dict[bytes, Diff]]:
    """Return the key of each commit's diff, in their order, and the diffs by key."""
    commits, rows = shard.table("commits"), shard.table("changes")
    changes: dict[int, list[FileChange]] = {index: [] for index in commits["index"]}
    for index, path, old_path, status, patch in zip(
        *(rows[c] for c in ("index", "path", "old_path", "status", "patch")), strict=True
    ):
        added, removed = patch_sides(patch)
        changes[index].append(FileChange(path, old_path, status, added, removed, patch))
    keys: list[bytes] = []
    diffs: dict[bytes, Diff] = {}
    for index, commit in zip(commits["index"], commits["commit"], strict=True):
        diff = Diff(commit=commit, parent=None, changes=tuple(changes[index]), skipped=())
        keys.append(bytes.fromhex(encoder.diff_key(diff)))
        diffs.setdefault(keys[-1], diff)
    return keys, diffs


def _distinct_changes(shard: Shard, encoder: Encoder) -> tuple[list[bytes], dict[bytes, Diff]]:
    """Return the key of each change as a diff of its own, in the table's order, and the diffs."""
    rows = shard.table("changes")
    keys: list[bytes] = []
    diffs: dict[bytes, Diff] = {}
    for path, old_path, status, patch in zip(
        *(rows[c] for c in ("path", "old_path", "status", "patch")), strict=True
    ):
        change = FileChange(path, old_path, status, *patch_sides(patch), patch)
        diff = Diff(commit="", parent=None, changes=(change,), skipped=())
        keys.append(bytes.fromhex(encoder.diff_key(diff)))
        diffs.setdefault(keys[-1], diff)
    return keys, diffs


def _distinct_files(
    shard: Shard, encoder: Encoder
) -> tuple[dict[int, list[bytes]], dict[bytes, SourceFile]]:
    """Return the keys of each snapshot's files that are read, in path order, and the files."""
    texts = shard.table("files")
    text_of = dict(zip(texts["blob"], texts["text"], strict=True))
    found: dict[int, list[SourceFile]] = {}
    for index, path, blob in sorted(zip(*shard.table("snapshots").values(), strict=True)):
        found.setdefault(index, []).append(SourceFile(path=path, blob=blob, text=text_of[blob]))
    snapshots: dict[int, list[bytes]] = {}
    files: dict[bytes, SourceFile] = {}
    for index, present in found.items():
        for file in encoder.told(present):
            key = bytes.fromhex(encoder.file_key(file))
            snapshots.setdefault(index, []).append(key)
            files.setdefault(key, file)
    return snapshots, files


def _mined_by(shard: Shard) -> tuple[str, str | None, StreamName]:
    """Return by which rules a shard's changes and its snapshots were read, and in which stream."""
    settings = shard.manifest["settings"]
    return settings["rules"], settings["snapshot_rules"], settings["stream"]


def _check_rules(shard: Shard, recipe: Recipe) -> None:
    rules, snapshot_rules, _ = _mined_by(shard)
    if (rules, snapshot_rules) != (recipe.rules, recipe.snapshot_rules):
        mined, read = (
            f"{a!r} and {b or a!r}"
            for a, b in ((rules, snapshot_rules), (recipe.rules, recipe.snapshot_rules))
        )
        raise UserError(
            f"{shard.name} was mined by the rules {mined}, but the encoder reads by {read}",
            hint="mine it again with the encoder's rules",
        )


def _diff_chars(diff: Diff) -> int:
    return sum(len(change.patch) for change in diff.changes)


def _file_chars(file: SourceFile) -> int:
    return len(file.text)


def _table_bytes(shard: Shard) -> int:
    """Return how much there is to read, roughly; at least 1."""
    files = [shard.path / f"{table}.parquet" for table in ("changes", "files")]
    return 1 + sum(file.stat().st_size for file in files if file.is_file())
