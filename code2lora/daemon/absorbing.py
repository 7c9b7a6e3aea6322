"""Turn commits into stored states: read diffs, step the GRU, write rows.

Reads   git (diffs, snapshots) and cached features.
Writes  states and features, one transaction for each chunk of commits, so a kill at any line costs
        at most one chunk's work; a commit that has a state keeps it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import TypeVar

from code2lora.history.model import Commit, History
from code2lora.history.rules import FileRules
from code2lora.hypernetwork.checkpoint import LoadedFamily
from code2lora.hypernetwork.family import Reading
from code2lora.hypernetwork.state import drift, pack, pack_tensor, unpack, unpack_tensor
from code2lora.state_store import Store
from code2lora.state_store.records import Anchor, NewState, StoredState

T = TypeVar("T")

CHUNK = 32
"""Commits that are read and stored together."""


class Absorber:
    """Computes and stores states with one loaded checkpoint."""

    def __init__(self, store: Store, checkpoint: LoadedFamily) -> None:
        self._store = store
        self._family = checkpoint.family
        self._encoder_fingerprint = checkpoint.encoder_fingerprint
        self._rules = FileRules.named(checkpoint.config.encoder.recipe.rules)

    def initial(self, history: History, anchor: Anchor, commit: Commit) -> StoredState:
        """Compute and store the state at an anchor from the snapshot there."""
        began_s = time.perf_counter()
        snapshot = history.snapshot(commit.id, self._rules)
        reading = self._family.read_snapshot(snapshot)
        embedded_s = time.perf_counter()
        state = self._family.initial(reading.features)
        self._store.put_state(
            anchor.id,
            NewState(
                commit=commit.id,
                parent=None,
                step=0,
                state=pack(state),
                committed_at=_committed_at(commit),
                summary=commit.summary,
                n_tokens=reading.n_tokens,
                n_changed_files=len(snapshot.files),
                embed_ms=(embedded_s - began_s) * 1e3,
                advance_ms=(time.perf_counter() - embedded_s) * 1e3,
            ),
        )
        return self._stored(anchor.id, commit.id)

    def advance(
        self, history: History, start: StoredState, commits: Sequence[Commit]
    ) -> StoredState:
        """Store the states of the commits that follow `start`, oldest first; return the last.

        One transaction for each chunk, so a kill costs at most one chunk's work.
        """
        info, state = start.info, unpack(start.state)
        parent, step = info.commit, info.step
        for chunk in chunks(commits, CHUNK):
            new = []
            for commit, read in zip(chunk, self._read(history, chunk), strict=True):
                began_s = time.perf_counter()
                following = self._family.advance(state, read.reading.features)
                advance_ms = (time.perf_counter() - began_s) * 1e3
                step += 1
                new.append(
                    NewState(
                        commit=commit.id,
                        parent=parent,
                        step=step,
                        state=pack(following),
                        committed_at=_committed_at(commit),
                        summary=commit.summary,
                        diff_key=read.key,
                        features=pack_tensor(read.reading.features) if read.is_new else None,
                        n_tokens=read.reading.n_tokens,
                        n_changed_files=read.n_files,
                        embed_ms=read.embed_ms,
                        advance_ms=advance_ms,
                        drift=drift(state, following),
                    )
                )
                parent, state = commit.id, following
            self._store.put_states(info.anchor_id, new)
        return self._stored(info.anchor_id, parent)

    def _stored(self, anchor_id: int, commit: str) -> StoredState:
        stored = self._store.state_at(anchor_id, commit)
        assert stored is not None, f"the state of {commit} was stored just now"
        return stored

    def _read(self, history: History, commits: Sequence[Commit]) -> list[_ReadDiff]:
        """Return the features of each commit's diff, encoding only content never seen before."""
        began_s = time.perf_counter()
        diffs = [history.diff(commit.id, self._rules) for commit in commits]
        keys = [self._family.diff_key(diff) for diff in diffs]
        cached = self._store.get_features(self._encoder_fingerprint, keys)
        new = {key: diff for key, diff in zip(keys, diffs, strict=True) if key not in cached}
        readings = dict(zip(new, self._family.read_diffs(list(new.values())), strict=True))
        for key, known in cached.items():
            readings[key] = Reading(unpack_tensor(known.blob), known.n_tokens)
        each_ms = (time.perf_counter() - began_s) * 1e3 / len(diffs)
        return [
            _ReadDiff(key, readings[key], len(diff.changes), each_ms, is_new=key in new)
            for key, diff in zip(keys, diffs, strict=True)
        ]


@dataclass(frozen=True)
class _ReadDiff:
    """What was read of one commit's diff."""

    key: str
    reading: Reading
    n_files: int
    embed_ms: float
    """Its share of the chunk's time, git's part included."""
    is_new: bool
    """Whether the features are not in the store yet."""


def chunks(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of at most `size` values."""
    rest = iter(values)
    while chunk := list(islice(rest, size)):
        yield chunk


def _committed_at(commit: Commit) -> datetime:
    return datetime.fromtimestamp(commit.committed_at_s, UTC)
