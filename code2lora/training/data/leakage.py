"""Find what an evaluation must not ask, because training has seen it.

Reads   shards (`shards.py`).
Writes  `leakage.json` in the folder of the shards.

A target is known again by two digests, both blind to white space: `pair` of the text right above it
and of itself, `same` of the whole assertion, or of the target where it is none. Within a repository
either gives a target away, for its commits are split by time and later ones repeat earlier ones.
Across repositories only the pair does: it finds vendored and forked copies, and `assert x is None`
is no copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from code2lora.errors import UserError
from code2lora.training.data.shards import Rows, Shard, read_shards

if TYPE_CHECKING:
    from code2lora.training.data.dataset import RepositoryData, Target

PREFIX_TAIL_CHARS = 160
"""How much of the text above a target counts, white space left out."""

FILE = "leakage.json"
"""In the folder of the shards."""

_SPACE = re.compile(r"\s+")
_TAIL_SLACK = 8
Digests = npt.NDArray[np.int64]


def digests(prefix: str, target: str, same: str) -> tuple[int, int]:
    """Return a target's `pair` and `same`.

    prefix: the text above the target
    same: what makes it the same wherever it stands: the whole assertion, or the target itself
    """
    tail = _SPACE.sub("", prefix[-PREFIX_TAIL_CHARS * _TAIL_SLACK :])[-PREFIX_TAIL_CHARS:]
    return _digest(f"{tail}\0{_SPACE.sub('', target)}"), _digest(_SPACE.sub("", same))


def _digest(text: str) -> int:
    found = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(found, "little", signed=True)


def mark_seen(checks: Rows, targets: Rows, splits: Sequence[str]) -> None:
    """Set `leaked` of the targets that later commits share with a repository's training part.

    Those of kind `file` are left alone: they are only asked of repositories that nothing was
    trained on, and every snapshot repeats most of the one before.

    checks, targets: the tables of those names; splits: of each commit
    """
    is_train = np.array([splits[index] == "train" for index in targets["index"]], dtype=bool)
    is_asked = ~is_train & np.array([kind != "file" for kind in targets["kind"]], dtype=bool)
    leaked = np.zeros(len(is_train), dtype=bool)
    for column in ("pair", "same"):
        found = np.asarray(checks[column], dtype=np.int64)
        leaked |= is_asked & np.isin(found, found[is_train])
    checks["leaked"] = leaked.tolist()


@dataclass(frozen=True, slots=True, order=True)
class Leak:
    """One target that an evaluation must not ask."""

    kind: str
    index: int
    path: str
    start: int


@dataclass(frozen=True)
class Leaks:
    """The targets of a folder of shards that no evaluation may ask. Calling it tells of one."""

    n_targets: int
    """All that an evaluation could ask: of held-out repositories every one, of the others those of
    later commits."""
    n_in_repository: int
    """Seen in the training part of their own repository."""
    n_across: int
    """Seen in another repository that may be trained on, and not in their own."""
    leaks: Mapping[str, frozenset[Leak]]
    """By repository."""

    def __call__(self, data: RepositoryData, target: Target) -> bool:
        """Tell whether a target of a repository was seen in training."""
        leak = Leak(target.kind, target.index, target.path, target.start)
        return leak in self.leaks.get(data.name, frozenset())


def find_leaks(mined: Path) -> Leaks:
    """Look through all shards of a folder. Raises UserError when there are none."""
    rows = [_Rows.of(shard) for shard in read_shards(mined)]
    trained = [each for each in rows if each.may_be_trained_on]
    distinct = [np.unique(each.pairs) for each in trained]
    known, n_repositories = np.unique(np.concatenate([_NO_ROWS, *distinct]), return_counts=True)
    n_targets = n_in = n_across = 0
    leaks: dict[str, frozenset[Leak]] = {}
    for each in rows:
        own = np.unique(each.pairs) if each.may_be_trained_on else _NO_ROWS
        elsewhere = each.is_asked & _is_known(each.pairs, known, n_repositories, own)
        within = each.is_asked & each.leaked
        n_targets += int(each.is_asked.sum())
        n_in += int(within.sum())
        n_across += int((elsewhere & ~within).sum())
        found = frozenset(each.leak(int(row)) for row in np.flatnonzero(within | elsewhere))
        if found:
            leaks[each.name] = found
    return Leaks(n_targets, n_in, n_across, leaks)


def write_leaks(mined: Path) -> Leaks:
    """Look through all shards of a folder and keep what was found beside them."""
    found = find_leaks(mined)
    content = {
        "n_targets": found.n_targets,
        "n_in_repository": found.n_in_repository,
        "n_across": found.n_across,
        "leaks": {
            name: [astuple(leak) for leak in sorted(leaks)]
            for name, leaks in sorted(found.leaks.items())
        },
    }
    temporary = mined / f".tmp-{FILE}-{os.getpid()}"
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(temporary, mined / FILE)
    return found


def read_leaks(mined: Path) -> Leaks:
    """Return what `write_leaks` kept, or look for it if it kept nothing.

    Raises UserError when the file is damaged, or when there is nothing mined.
    """
    try:
        content = json.loads((mined / FILE).read_text(encoding="utf-8"))
        leaks = content.pop("leaks")
        by_name = {name: frozenset(Leak(*leak) for leak in found) for name, found in leaks.items()}
        return Leaks(leaks=by_name, **content)
    except FileNotFoundError:
        return find_leaks(mined)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"cannot read {mined / FILE}: {error}", hint="remove it; it is made again"
        ) from error


_NO_ROWS: Digests = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class _Rows:
    """One repository's targets, as far as they are compared."""

    name: str
    may_be_trained_on: bool
    pairs: Digests
    leaked: npt.NDArray[np.bool_]
    is_asked: npt.NDArray[np.bool_]
    columns: tuple[Sequence[str], Sequence[int], Sequence[str], Sequence[int]]

    @staticmethod
    def of(shard: Shard) -> _Rows:
        checks, targets = shard.table("checks"), shard.table("targets")
        splits = shard.table("commits")["split"]
        may_be_trained_on = shard.split == "train"
        is_asked = np.ones(len(targets["kind"]), dtype=bool)
        if may_be_trained_on:
            later = [splits[index] != "train" for index in targets["index"]]
            is_asked = np.array(later, dtype=bool)
        return _Rows(
            shard.name,
            may_be_trained_on,
            np.asarray(checks["pair"], dtype=np.int64),
            np.asarray(checks["leaked"], dtype=bool),
            is_asked,
            (targets["kind"], targets["index"], targets["path"], targets["start"]),
        )

    def leak(self, row: int) -> Leak:
        kind, index, path, start = self.columns
        return Leak(kind[row], index[row], path[row], start[row])


def _is_known(
    pairs: Digests, known: Digests, n_repositories: npt.NDArray[np.intp], own: Digests
) -> npt.NDArray[np.bool_]:
    """Tell which pairs occur in a repository that may be trained on, other than their own."""
    if not len(known):
        return np.zeros(len(pairs), dtype=bool)
    at = np.minimum(np.searchsorted(known, pairs), len(known) - 1)
    n_times = np.where(known[at] == pairs, n_repositories[at], 0)
    found: npt.NDArray[np.bool_] = n_times > np.isin(pairs, own)
    return found
