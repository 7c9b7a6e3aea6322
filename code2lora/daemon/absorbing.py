"""Turn commits into stored states: read diffs, step the GRU, write rows.

Reads   git (diffs, snapshots) and cached features.
Writes  states and features, one transaction for each chunk of steps, so a kill at any line costs
        at most one chunk's work; a commit that has a state keeps it, and one whose state was
        thinned gets its bytes back.

Which commits are steps, and what they are compared with, the checkpoint's stream says. A HEAD that
is none gets a provisional state: that of a step over what came after the last one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from typing import TypeVar

from code2lora.daemon.lineage import commits_after
from code2lora.history.model import Commit, History
from code2lora.history.rules import FileRules
from code2lora.history.stream import Step, stream_named
from code2lora.hypernetwork.checkpoint import LoadedFamily
from code2lora.hypernetwork.family import Reading, State
from code2lora.hypernetwork.state import drift, pack, pack_tensor, unpack, unpack_tensor
from code2lora.state_store import Store
from code2lora.state_store.records import Anchor, NewState, StoredState

T = TypeVar("T")

CHUNK = 32
"""Steps that are read and stored together."""


class Absorber:
    """Computes and stores states with one loaded checkpoint."""

    def __init__(self, store: Store, checkpoint: LoadedFamily) -> None:
        self._store = store
        self._family = checkpoint.family
        self._encoder_fingerprint = checkpoint.encoder_fingerprint
        recipe = checkpoint.config.encoder.recipe
        self._rules = FileRules.named(recipe.rules)
        self._snapshot_rules = FileRules.named(recipe.snapshot_rules or recipe.rules)
        self._stream = stream_named(recipe.stream)

    def initial(self, history: History, anchor: Anchor, commit: Commit) -> StoredState:
        """Compute and store the state at an anchor from the snapshot there.

        Where the anchor is the first step of its history, that step is taken too.
        """
        began_s = time.perf_counter()
        snapshot = history.snapshot(commit.id, self._snapshot_rules)
        reading = self._family.read_snapshot(snapshot)
        opens = self._stream.opens(history, commit)
        opening = self._read(history, [Step(commit, None)])[0] if opens else None
        embedded_s = time.perf_counter()
        state = self._family.initial(reading.features)
        if opening is not None:
            state = self._family.advance(state, opening.reading.features)
        self._store.put_state(
            anchor.id,
            NewState(
                commit=commit.id,
                parent=None,
                step=0,
                state=pack(state),
                committed_at=_committed_at(commit),
                summary=commit.summary,
                diff_key=opening.key if opening else None,
                features=opening.to_cache if opening else None,
                n_tokens=reading.n_tokens,
                n_changed_files=len(snapshot.files),
                embed_ms=(embedded_s - began_s) * 1e3,
                advance_ms=(time.perf_counter() - embedded_s) * 1e3,
            ),
        )
        return self._stored(anchor.id, commit.id)

    def advance(
        self,
        history: History,
        start: StoredState,
        commits: Sequence[Commit],
        *,
        arrive: bool = False,
        until_s: float = math.inf,
        after_chunk: Callable[[], object] = lambda: None,
    ) -> tuple[StoredState, bool]:
        """Store the states of the steps among the commits that follow `start`, oldest first.

        start: of any commit that has a state
        arrive: whether the last commit is to have one too, if need be a provisional one
        until_s: when to stop early, by the monotonic clock; one chunk is done in any case
        after_chunk: called whenever a full chunk is stored

        Returns the newest step's state, and whether the last commit was reached. One transaction
        for each chunk, so a kill costs at most one chunk's work.
        """
        numbers = {commit.id: n for n, commit in enumerate(commits, start.info.step + 1)}
        if start.info.provisional:
            assert start.info.parent is not None
            start = self.kept(history, start.info.anchor_id, start.info.parent)
        anchor_id, parent, state = start.info.anchor_id, start.info.commit, unpack(start.state)
        for chunk in chunks(self._steps(history, start, commits, arrive), CHUNK):
            new = []
            for step, read in zip(chunk, self._read(history, chunk), strict=True):
                began_s = time.perf_counter()
                origin = state if step.base is not None else self._opening(history, step.commit)
                following = self._family.advance(origin, read.reading.features)
                made = _new_state(step, read, following, numbers[step.commit.id], parent)
                advance_ms = (time.perf_counter() - began_s) * 1e3
                new.append(replace(made, advance_ms=advance_ms, drift=drift(state, following)))
                if not step.is_provisional:
                    parent, state = step.commit.id, following
            self._store.put_states(anchor_id, new)
            if len(chunk) == CHUNK:
                after_chunk()
            if time.monotonic() >= until_s and parent != commits[-1].id:
                return self._stored(anchor_id, parent), False
        return self._stored(anchor_id, parent), True

    def kept(self, history: History, anchor_id: int, commit: str) -> StoredState:
        """Return the state of a commit that has one under an anchor.

        One that was thinned is computed again, and stored, from the nearest ancestor that was not.
        Raises UserError when git no longer has what is between.
        """
        nearest = self._store.nearest_kept(anchor_id, commit)
        assert nearest is not None, f"{commit} has no state under anchor {anchor_id}"
        if nearest.info.commit == commit:
            return nearest
        missing = commits_after(history, nearest.info.commit, commit)
        self.advance(history, nearest, missing, arrive=True)
        return self._stored(anchor_id, commit)

    def _steps(
        self, history: History, start: StoredState, commits: Sequence[Commit], arrive: bool
    ) -> Iterator[Step]:
        """Yield the steps that follow `start`, and one that arrives at the last commit."""
        last = start.info.commit
        # A state that a diff led to is a step's; of one that was only read, git is asked.
        begun = start.info.diff_key is not None
        for step in self._stream.steps(history, last, commits, begun=begun):
            yield step
            last = step.commit.id
        if arrive and commits and commits[-1].id != last:
            yield Step(commits[-1], last, is_provisional=True)

    def _opening(self, history: History, commit: Commit) -> State:
        """Return the state that the first step of a history advances."""
        snapshot = history.snapshot(commit.id, self._snapshot_rules)
        return self._family.initial(self._family.read_snapshot(snapshot).features)

    def _stored(self, anchor_id: int, commit: str) -> StoredState:
        stored = self._store.state_at(anchor_id, commit)
        assert stored is not None, f"the state of {commit} was stored just now"
        return stored

    def _read(self, history: History, steps: Sequence[Step]) -> list[_ReadDiff]:
        """Return the features of each step's diff, encoding only content never seen before."""
        began_s = time.perf_counter()
        diffs = [history.diff_between(step.base, step.commit.id, self._rules) for step in steps]
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
    """What was read of one step's diff."""

    key: str
    reading: Reading
    n_files: int
    embed_ms: float
    """Its share of the chunk's time, git's part included."""
    is_new: bool
    """Whether the features are not in the store yet."""

    @property
    def to_cache(self) -> bytes | None:
        """The features, if they are to be stored."""
        return pack_tensor(self.reading.features) if self.is_new else None


def _new_state(step: Step, read: _ReadDiff, state: State, number: int, parent: str) -> NewState:
    return NewState(
        commit=step.commit.id,
        parent=parent,
        step=number,
        state=pack(state),
        committed_at=_committed_at(step.commit),
        summary=step.commit.summary,
        provisional=step.is_provisional,
        diff_key=read.key,
        features=read.to_cache,
        n_tokens=read.reading.n_tokens,
        n_changed_files=read.n_files,
        embed_ms=read.embed_ms,
    )


def chunks(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of at most `size` values."""
    rest = iter(values)
    while chunk := list(islice(rest, size)):
        yield chunk


def _committed_at(commit: Commit) -> datetime:
    return datetime.fromtimestamp(commit.committed_at_s, UTC)
