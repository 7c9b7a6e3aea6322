"""The feature vectors of mined repositories: where they lie, and how they are found again.

A file <mined>/.features/<encoder fingerprint, 16 hex>/<repository>.safetensors holds

    diff_keys, diffs            a row for each distinct diff, by the digest of what was read
    file_keys, files            a row for each distinct file version
    commit_rows                 the row of each commit's diff       \\ missing until the
    snapshot_indices, snapshots a row for each commit with a snapshot /  repository is finished

with vectors in float16, like those of the released data sets. It lies beside the shard and not
inside, because mining replaces a shard's folder whole and what was embedded is to be kept. It is
only ever replaced by a whole one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from code2lora.errors import UserError
from code2lora.hypernetwork.encoder_gradients import file_key
from code2lora.training.data.shards import Shard, folder_name

FOLDER = ".features"
"""Below the folder of the shards."""
RELEASED_FILE = "features-released.safetensors"
"""In the folder of an imported data set's shard: `diffs` and `snapshots` that it came with."""

KEY_BYTES = 32

_FORMAT = "1"
_PARTS = "parts"
_EMBED = "run `code2lora train embed` on the mined folder"


@dataclass(frozen=True)
class Features:
    """What an encoder read of one repository."""

    diffs: Tensor
    """(n_commits, D_d) float32; row i belongs to the commit with index i, zeros without a diff."""
    snapshots: dict[int, Tensor]
    """Index of each commit that has a snapshot -> (D_s,) float32."""


@dataclass(frozen=True)
class Parts:
    """What an encoder whose features add up read of one repository, piece by piece."""

    files: Tensor
    """(n, D_s) float16"""
    file_rows: list[int | None]
    """For each distinct (path, blob), by `TellableFile.bag`: its row, None if it was not read."""
    sizes: list[int]
    """The same with the characters of each."""
    changes: Tensor
    """(m, D_d) float16"""
    change_rows: Tensor
    """(changes of the shard,) int32: each one's row."""


def features_file(shard: Shard, fingerprint: str | None) -> Path:
    """Return where the features of a shard lie; see `read_features`."""
    if fingerprint is None:
        return shard.path / RELEASED_FILE
    return shard.path.parent / FOLDER / fingerprint[:16] / f"{folder_name(shard.name)}.safetensors"


def read_features(shard: Shard, fingerprint: str | None) -> Features | Parts:
    """Return the features of a shard's commits and snapshots, or of their parts.

    fingerprint: of the encoder that read them (`encoder_fingerprint`); None takes the vectors that
        an imported data set came with.
    Raises UserError when there are none, when the file is damaged, or when the repository has been
    mined again since.
    """
    if fingerprint is None:
        file = features_file(shard, None)
        stored = _read(file)
        if stored is None:
            raise UserError(
                f"there are no features of {shard.name}: it came with none", hint=_EMBED
            )
        return _released(shard, stored[0], file)
    tensors, metadata = _finished(shard, fingerprint)
    if metadata.get("of") == _PARTS:
        return _parts(shard, tensors)
    indices = tensors["snapshot_indices"].tolist()
    return Features(
        diffs=tensors["diffs"][tensors["commit_rows"].long()].float(),
        snapshots=dict(zip(indices, tensors["snapshots"].float(), strict=True)),
    )


def read_whole_features(shard: Shard, fingerprint: str | None) -> Features:
    """Return what `read_features` does; raises UserError where only parts were read."""
    features = read_features(shard, fingerprint)
    if isinstance(features, Parts):
        raise UserError(
            f"{shard.name} has features of its files and changes alone",
            hint="export with another encoder's features, or without",
        )
    return features


def shard_digest(shard: Shard) -> str:
    """Return the hex digest of what a shard says it was mined from, and how."""
    text = json.dumps(shard.manifest, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Rows:
    """Vectors by key, in the order in which they were added."""

    def __init__(self, width: int) -> None:
        self._row_of: dict[bytes, int] = {}
        self._vectors = [torch.empty(0, width, dtype=torch.float16)]

    def __contains__(self, key: bytes) -> bool:
        return key in self._row_of

    def __len__(self) -> int:
        return len(self._row_of)

    def add(self, keys: Sequence[bytes], vectors: Tensor) -> None:
        """Add rows; no key may be there already. vectors: (len(keys), width)"""
        for key in keys:
            self._row_of[key] = len(self._row_of)
        self._vectors.append(vectors.to(torch.float16))

    def find(self, keys: Sequence[bytes]) -> Tensor:
        """Return the rows of some keys, int32."""
        return torch.tensor([self._row_of[key] for key in keys], dtype=torch.int32)

    @property
    def vectors(self) -> Tensor:
        """(len, width) float16."""
        self._vectors = [torch.cat(self._vectors)]
        return self._vectors[0]

    @property
    def keys(self) -> Tensor:
        """(len, KEY_BYTES) uint8."""
        data = bytearray(b"".join(self._row_of))
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0).byte()
        return flat.view(-1, KEY_BYTES)


class FeatureStore:
    """One repository's file while it is filled: what was embedded, by key."""

    def __init__(
        self,
        shard: Shard,
        fingerprint: str,
        *,
        precision: str,
        diff_width: int,
        file_width: int,
        adds_up: bool = False,
    ) -> None:
        """Take over the rows of the file that is there, if the same encoder wrote them.

        adds_up: whether each change is a diff of its own, because their features add up
        precision: what the encoder computes in; rows of another one are left behind.
        """
        self._file = features_file(shard, fingerprint)
        self._metadata = {"format": _FORMAT, "encoder": fingerprint, "precision": precision}
        if adds_up:
            self._metadata["of"] = _PARTS
        self._shard = shard_digest(shard)
        self.diffs, self.files = Rows(diff_width), Rows(file_width)
        self.is_finished = False
        """Whether the features of just this shard are there."""
        try:
            tensors, metadata = _read(self._file) or ({}, {})
        except UserError:  # a damaged file is made again
            return
        if {key: metadata.get(key) for key in self._metadata} != self._metadata:
            return
        for rows, name in ((self.diffs, "diff"), (self.files, "file")):
            keys = [bytes(key) for key in tensors[f"{name}_keys"].tolist()]
            rows.add(keys, tensors[f"{name}s"])
        self.is_finished = "commit_rows" in tensors and metadata.get("shard") == self._shard

    def write(self) -> None:
        """Write what is there so far."""
        self._write({}, self._metadata)

    def finish(self, commits: Sequence[bytes], snapshots: Mapping[int, Tensor]) -> None:
        """Write all of it.

        commits: the key of each commit's diff, in their order; or of each change, in the order of
            the shard's table, where the encoder's features add up
        """
        indices = sorted(snapshots)
        vectors = [snapshots[index] for index in indices] or [torch.empty(0, 0)]
        own = {
            "commit_rows": self.diffs.find(commits),
            "snapshot_indices": torch.tensor(indices, dtype=torch.int32),
            "snapshots": torch.stack(vectors).to(torch.float16) if indices else vectors[0].half(),
        }
        self._write(own, {**self._metadata, "shard": self._shard})
        self.is_finished = True

    def _write(self, own: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        tensors = {
            "diff_keys": self.diffs.keys,
            "diffs": self.diffs.vectors,
            "file_keys": self.files.keys,
            "files": self.files.vectors,
            **own,
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_name(f".tmp-{self._file.name}-{os.getpid()}")
        try:
            save_file(tensors, temporary, metadata=metadata)
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(temporary, self._file)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot write {self._file}: {error}", hint="make room, then run the same again"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Return a file's tensors and metadata, None where there is none; UserError when damaged."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}, (  # noqa: SIM118
                stored.metadata() or {}
            )
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is damaged: {error}", hint=f"remove it, then {_EMBED}") from error


def _finished(shard: Shard, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a file that is whole and of just this shard and encoder."""
    file = features_file(shard, fingerprint)
    stored = _read(file)
    if stored is None:
        raise UserError(
            f"there are no features of {shard.name}: this encoder has not read it", hint=_EMBED
        )
    tensors, metadata = stored
    if metadata.get("encoder") != fingerprint:
        raise UserError(f"{file} was made with another encoder", hint=_EMBED)
    if "commit_rows" not in tensors:
        raise UserError(f"the features of {shard.name} are not finished", hint=_EMBED)
    if metadata.get("shard") != shard_digest(shard):
        raise UserError(f"{shard.name} was mined again after it was embedded", hint=_EMBED)
    return tensors, metadata


def _parts(shard: Shard, tensors: Mapping[str, Tensor]) -> Parts:
    row_of = {key.tobytes(): row for row, key in enumerate(tensors["file_keys"].numpy())}
    files, snapshots = shard.table("files"), shard.table("snapshots")
    size_of = {blob: len(text) for blob, text in zip(files["blob"], files["text"], strict=True)}
    distinct = list(dict.fromkeys(zip(snapshots["path"], snapshots["blob"], strict=True)))
    return Parts(
        files=tensors["files"],
        file_rows=[row_of.get(bytes.fromhex(file_key(*each))) for each in distinct],
        sizes=[size_of[blob] for _, blob in distinct],
        changes=tensors["diffs"],
        change_rows=tensors["commit_rows"],
    )


def _released(shard: Shard, tensors: Mapping[str, Tensor], file: Path) -> Features:
    """Return imported vectors: a row for each commit, and one for each snapshot, by index.

    `snapshot_indices` may say which commits the snapshots are of.
    """
    n_commits = len(shard.table("commits")["index"])
    if {"diffs", "snapshots"} - tensors.keys() or len(tensors["diffs"]) != n_commits:
        raise UserError(f"{file} does not fit its shard", hint="import the data set again")
    if "snapshot_indices" in tensors:
        indices = tensors["snapshot_indices"].tolist()
    else:
        indices = sorted(set(shard.table("snapshots")["index"]))
    if len(indices) != len(tensors["snapshots"]):
        raise UserError(f"{file} does not fit its shard", hint="import the data set again")
    return Features(
        diffs=tensors["diffs"].float(),
        snapshots=dict(zip(indices, tensors["snapshots"].float(), strict=True)),
    )
