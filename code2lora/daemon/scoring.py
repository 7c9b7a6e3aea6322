"""Score commits that have been absorbed: what would their lines have cost, before they were told?

Reads   git (the commits' diffs and files), the state store.
Writes  one score for each commit, in one transaction with what the gate serves from then on. A kill
        costs the score of one commit, which the next call computes.

Everything else goes first: before every pass of the decoder, a scorer waits until no request and no
refresh is under way.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from code2lora.daemon.added import AddedRow, added_rows, rows_digest
from code2lora.daemon.gain import next_use, served_use
from code2lora.daemon.lineage import Unscored, unscored_commits
from code2lora.daemon.loading import Models
from code2lora.daemon.looking import open_registered
from code2lora.errors import UserError
from code2lora.history.model import History
from code2lora.history.rules import FileRules
from code2lora.hypernetwork.checkpoint import LoadedFamily
from code2lora.hypernetwork.state import unpack
from code2lora.serving.adapter_cache import LoadedAdapter
from code2lora.serving.completion import AdapterIdentity
from code2lora.serving.engine import Engine
from code2lora.serving.scoring import Losses, score_rows
from code2lora.settings import Settings
from code2lora.state_store import Store
from code2lora.state_store.records import NewScore, StoredState, Worktree

log = logging.getLogger(__name__)

_POLL_S = 0.02


class Precedence:
    """Knows whether work is under way that scoring is to wait for. Thread-safe."""

    def __init__(self, is_ending: Callable[[], bool] = lambda: False) -> None:
        """is_ending: tells whether the worker is about to end; then scoring is given up."""
        self.is_ending = is_ending
        self._lock = threading.Lock()
        self._n = 0

    @contextmanager
    def first(self) -> Iterator[None]:
        """Let what is done inside the block go before."""
        with self._lock:
            self._n += 1
        try:
            yield
        finally:
            with self._lock:
                self._n -= 1

    @property
    def is_free(self) -> bool:
        """Whether nothing is under way."""
        return self._n == 0


@dataclass(frozen=True)
class Scoring:
    """What a call did."""

    done: bool
    """Whether every commit that can be scored is."""
    scored: int
    switched: bool
    """Whether something else is to serve the repository now."""


class Scorer:
    """Scores the newest commits of worktrees with the worker's models. One call at a time."""

    def __init__(
        self, settings: Settings, store: Store, models: Models, precedence: Precedence
    ) -> None:
        self._settings = settings
        self._store = store
        self._models = models
        self._precedence = precedence
        self._refused: set[tuple[str, str]] = set()
        """Repository and commit, where git lacks what would be asked or the model fails."""

    def score(self, worktree_id: int, budget_s: float) -> Scoring:
        """Score what is not scored yet of a worktree's newest commits, for about `budget_s`.

        Raises UserError when the worktree is gone, git cannot be read or a model cannot be loaded.
        """
        worktree = self._store.worktree(worktree_id)
        if worktree is None:
            raise UserError(f"worktree {worktree_id} is not registered", hint="`code2lora init`")
        until_s = time.monotonic() + budget_s
        checkpoint = self._models.checkpoint()
        key = (worktree.repository_id, checkpoint.fingerprint)
        before = served_use(self._settings, self._store, *key)
        n_scored = 0
        done = True
        with open_registered(worktree) as history:
            for one in self._waiting(history, worktree, checkpoint.fingerprint):
                if n_scored and time.monotonic() >= until_s:
                    done = False
                    break
                if not self._score(history, worktree, checkpoint, one, budget_s):
                    done = False
                    break
                n_scored += 1
        switched = served_use(self._settings, self._store, *key) != before
        return Scoring(done=done, scored=n_scored, switched=switched)

    def _waiting(self, history: History, worktree: Worktree, fingerprint: str) -> list[Unscored]:
        limit = self._settings.score_commits
        found = unscored_commits(self._store, history, worktree, fingerprint, limit=limit)
        return [one for one in found if (worktree.repository_id, one.commit) not in self._refused]

    def _score(
        self,
        history: History,
        worktree: Worktree,
        checkpoint: LoadedFamily,
        one: Unscored,
        patience_s: float,
    ) -> bool:
        """Score one commit; False where something else went first for too long."""
        key = (worktree.repository_id, checkpoint.fingerprint)
        if not self._store.known_commits(*key, [one.told]):  # a replay has just replaced it
            return False
        rules = FileRules.named(checkpoint.config.encoder.recipe.rules)
        try:
            told = self._models.reconciler().state_at(worktree.repository_id, one.told)
            rows = added_rows(history, one.commit, rules)
        except UserError as error:
            self._refuse(worktree, one, str(error))
            return True
        if rows:
            self._models.generic_adapter()  # loads the decoder, which is not to count
        began_s = time.perf_counter()
        losses = self._losses(checkpoint, told, rows, patience_s)
        if losses is None:
            return False
        if all(map(math.isfinite, losses.nats)):
            self._record(told, one, rows, losses, (time.perf_counter() - began_s) * 1e3)
        else:
            self._refuse(worktree, one, "the model's scores are not numbers")
        return True

    def _refuse(self, worktree: Worktree, one: Unscored, why: str) -> None:
        """Leave a commit alone for as long as this worker lives."""
        log.warning("commit %s is not scored: %s", one.commit, why)
        self._refused.add((worktree.repository_id, one.commit))

    def _losses(
        self, checkpoint: LoadedFamily, told: StoredState, rows: list[AddedRow], patience_s: float
    ) -> Losses | None:
        """Return what the rows cost the base, the generic and the own adapter."""
        if not rows:
            return Losses(0, (0.0, 0.0, 0.0))
        engine = self._models.loaded_engine()
        adapters = (None, self._models.generic_adapter(), _own(engine, checkpoint, told))
        asked = [(row.above, row.text) for row in rows]
        return score_rows(engine, asked, adapters, may_go_on=self._wait(engine, patience_s))

    def _wait(self, engine: Engine, patience_s: float) -> Callable[[], bool]:
        """Return what waits until nothing else is under way; False: it took too long."""

        def wait() -> bool:
            until_s = time.monotonic() + patience_s
            while not self._precedence.is_free or engine.n_active or engine.n_waiting:
                if time.monotonic() >= until_s or self._precedence.is_ending():
                    return False
                time.sleep(_POLL_S)
            return not self._precedence.is_ending()

        return wait

    def _record(
        self, told: StoredState, one: Unscored, rows: list[AddedRow], losses: Losses, ms: float
    ) -> None:
        key = (told.info.repository_id, told.info.checkpoint)
        base, generic, own = losses.nats
        new = NewScore(
            repository_id=key[0],
            checkpoint=key[1],
            commit=one.commit,
            told=one.told,
            state_sha256=told.info.state_sha256,
            rows_sha256=rows_digest(rows),
            n_rows=len(rows),
            n_tokens=losses.n_tokens,
            base_nats=base,
            generic_nats=generic,
            own_nats=own,
            use=self._store.gate_use(*key),
            took_ms=ms,
        )
        last = self._settings.gain_commits - 1
        earlier = self._store.recent_scores(*key, limit=last) if last else []
        others = [score for score in earlier if score.rows_sha256 != new.rows_sha256]
        self._store.add_score(replace(new, use=next_use(new.use, [new, *others])))


def _own(engine: Engine, checkpoint: LoadedFamily, told: StoredState) -> LoadedAdapter:
    """Return the adapter of a state, which the engine forgets with the caller."""
    info = told.info
    identity = AdapterIdentity(info.repository_id, info.commit, f"told-{info.state_sha256[:12]}")
    return engine.place(identity, checkpoint.family.adapter(unpack(told.state)))
