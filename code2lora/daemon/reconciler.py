"""Advance a repository's stored state to HEAD and publish the adapter for it.

Reads   git (first parents, diffs, snapshots), the state store.
Writes  states, features, anchors and adapters in the state store, adapter directories, and the
        anchors in the repository's git configuration.

state(c) = advance(state(the step before c), features(diff between them)), from
initial(features(snapshot)) at the nearest anchor on c's first-parent chain; the checkpoint's stream
says which commits are steps. A state that was thinned is computed by the same rule.
One lock for each repository. An adapter row is written after its directory has been renamed into
place.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from code2lora.adapters.layout import AdapterMetadata
from code2lora.adapters.prune import is_intact
from code2lora.adapters.publish import publish
from code2lora.daemon.absorbing import Absorber, chunks
from code2lora.daemon.gain import served_use
from code2lora.daemon.lineage import commits_after
from code2lora.daemon.locking import repository_lock
from code2lora.daemon.looking import open_registered
from code2lora.daemon.pruning import prune_repository, thin_repository
from code2lora.errors import UserError
from code2lora.history.gitconfig import add_anchor, anchors
from code2lora.history.model import Commit, History
from code2lora.hypernetwork.checkpoint import LoadedFamily
from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.state import unpack
from code2lora.settings import Settings
from code2lora.state_store import Store
from code2lora.state_store.records import (
    Anchor,
    AnchorRole,
    NewAdapter,
    StateInfo,
    StoredState,
    Use,
    Worktree,
)

_LOOK_AHEAD = 128


@dataclass(frozen=True)
class Refresh:
    """What a refresh did."""

    repository: str
    commit: str | None
    """HEAD as the refresh saw it; None on an unborn branch."""
    absorbed: int
    """Commits newly absorbed."""
    adapter: Path | None
    """The live adapter's directory; None on an unborn branch."""
    backfill: bool
    """Whether older history waits to be replayed."""


@dataclass(frozen=True)
class Backfill:
    """How far the replay of older history is."""

    done: bool
    absorbed: int
    total: int


class Reconciler:
    """Brings worktrees of many repositories to their HEADs with one loaded model."""

    def __init__(
        self, settings: Settings, store: Store, name: str, checkpoint: LoadedFamily
    ) -> None:
        self._settings = settings
        self._store = store
        self._checkpoint = checkpoint
        self._family = checkpoint.family
        self._fingerprint = checkpoint.fingerprint
        self._absorber = Absorber(store, checkpoint)
        store.register_checkpoint(
            checkpoint.fingerprint,
            encoder_fingerprint=checkpoint.encoder_fingerprint,
            name=name,
            base_model=checkpoint.config.base.id,
            config=asdict(checkpoint.config),
        )

    # -- what callers ask for ---------------------------------------------------------------

    def refresh(self, worktree_id: int) -> Refresh:
        """Absorb what is new up to a worktree's HEAD and make that commit's adapter live.

        Raises UserError, and records it as a failure, when the history cannot be read or the
        adapter cannot be written.
        """
        worktree = self._store.worktree(worktree_id)
        if worktree is None:
            raise UserError(f"worktree {worktree_id} is not registered", hint="`code2lora init`")
        with self._reading(worktree) as history:
            done = self._refresh(history, worktree)
        self._store.resolve_failures(worktree.repository_id, worktree_id=worktree.id)
        return done

    def backfill(self, repository_id: str, budget_s: float) -> Backfill:
        """Replay older history for about `budget_s` seconds.

        When it has reached its target, it replaces the provisional anchors, and every worktree is
        to be refreshed. Raises UserError, and records it, when the history cannot be read.
        """
        replay = self._store.backfill_progress(repository_id, self._fingerprint)
        worktree = self._any_worktree(repository_id)
        if replay is None or worktree is None:
            return Backfill(done=True, absorbed=0, total=0)
        with self._reading(worktree) as history:
            return self._backfill(history, replay.anchor, budget_s)

    def adapter_at(self, repository_id: str, commit: str) -> Lora:
        """Regenerate the adapter of a commit that has a state.

        Raises UserError when it has none, or git lacks what a thinned one is computed from.
        """
        return self._family.adapter(unpack(self.state_at(repository_id, commit).state))

    def state_at(self, repository_id: str, commit: str) -> StoredState:
        """Return the state of a commit, computed again from git if it was thinned.

        Raises UserError when it has none, or git lacks what that takes.
        """
        found = self._store.find_state(repository_id, self._fingerprint, commit)
        if found is not None:
            return found
        self._info(repository_id, commit)  # says so if it has none
        worktree = self._any_worktree(repository_id)
        if worktree is None:
            raise UserError(
                f"the state of commit {commit[:12]} is computed from git, but the repository is "
                "not where it was",
                hint="`code2lora refresh` in it, or give a newer commit",
            )
        with (
            repository_lock(self._settings, repository_id),
            open_registered(worktree) as history,
        ):
            return self._state(history, repository_id, commit)

    # -- refresh ----------------------------------------------------------------------------

    def _refresh(self, history: History, worktree: Worktree) -> Refresh:
        head = history.head()
        self._store.set_head(worktree.id, head.commit, head.branch)
        if head.commit is None:
            return Refresh(worktree.repository_id, None, 0, None, backfill=False)
        absorbed = self._absorb_up_to(history, worktree.repository_id, head.commit)
        self._replan_replay(history, worktree.repository_id, head.commit)
        path = self._publish(history, worktree, head.commit)
        replay = self._store.backfill_progress(worktree.repository_id, self._fingerprint)
        return Refresh(
            worktree.repository_id, head.commit, absorbed, path, backfill=replay is not None
        )

    def _absorb_up_to(self, history: History, repository_id: str, commit: str) -> int:
        """Store the commit's state and every one that leads to it; return how many were new.

        A provisional state is a starting point too: it knows the step that it came from.
        """
        is_new = not self._store.active_anchors(repository_id, self._fingerprint)
        recorded = frozenset(anchors(history)) if is_new else None
        # Without any anchor to find, only as much history is walked as will be replayed.
        limit = self._settings.backfill_commits + 1 if is_new and not recorded else None
        missing: list[Commit] = []  # newest first
        for chunk in chunks(history.first_parents(commit, limit=limit), _LOOK_AHEAD):
            known = self._store.known_commits(
                repository_id, self._fingerprint, [walked.id for walked in chunk]
            )
            if not known and recorded is None:  # part of the database may have been lost
                recorded = frozenset(anchors(history))
            for walked in chunk:
                if walked.id in known:
                    if missing:
                        start = self._state(history, repository_id, walked.id)
                        self._arrive(history, start, missing)
                    return len(missing)
                if recorded and walked.id in recorded:  # start where it once started
                    anchor = self._add_anchor(repository_id, walked.id, "active")
                    start = self._absorber.initial(history, anchor, walked)
                    self._arrive(history, start, missing)
                    return len(missing) + 1
                missing.append(walked)
        self._anchor_here(history, repository_id, missing)
        return 1

    def _arrive(self, history: History, start: StoredState, missing: list[Commit]) -> None:
        """Advance to the newest of the commits (newest first) that follow `start`."""
        thin = partial(thin_repository, self._store, start.info.repository_id, self._settings)
        self._absorber.advance(history, start, missing[::-1], arrive=True, after_chunk=thin)

    def _anchor_here(self, history: History, repository_id: str, ancestry: list[Commit]) -> None:
        """Anchor at the newest of `ancestry` (newest first); older history is replayed later."""
        newest = ancestry[0]
        anchor = self._add_anchor(repository_id, newest.id, "provisional")
        self._absorber.initial(history, anchor, newest)
        if anchor.role == "backfill":  # HEAD went back to where a replay began
            self._settle(history, anchor)
        else:
            self._plan_replay(history, anchor, ancestry)

    def _plan_replay(self, history: History, anchor: Anchor, ancestry: list[Commit]) -> None:
        """Have the history that leads to a provisional anchor replayed, unless it is already."""
        back = min(self._settings.backfill_commits, len(ancestry) - 1)
        if not back:
            self._settle(history, anchor)
            return
        replays = self._store.anchors(anchor.repository_id, self._fingerprint, roles=("backfill",))
        if {replay.commit for replay in replays} & {commit.id for commit in ancestry}:
            return  # one that is under way will reach this commit too
        self._store.add_anchor(
            anchor.repository_id,
            self._fingerprint,
            ancestry[back].id,
            "backfill",
            target_commit=anchor.commit,
            total_commits=back,
        )

    def _replan_replay(self, history: History, repository_id: str, commit: str) -> None:
        """Plan a replay for a provisional anchor whose own was given up."""
        anchor = self._store.anchor(self._info(repository_id, commit).anchor_id)
        if anchor is None or anchor.role != "provisional":
            return
        if self._store.backfill_progress(repository_id, self._fingerprint) is None:
            limit = self._settings.backfill_commits + 1
            ancestry = list(history.first_parents(anchor.commit, limit=limit))
            self._plan_replay(history, anchor, ancestry)

    # -- backfill ---------------------------------------------------------------------------

    def _backfill(self, history: History, anchor: Anchor, budget_s: float) -> Backfill:
        assert anchor.target_commit is not None and anchor.total_commits is not None
        deadline_s = time.monotonic() + budget_s
        state, missing = self._resume(history, anchor, anchor.target_commit)
        thin = partial(thin_repository, self._store, anchor.repository_id, self._settings)
        state, done = self._absorber.advance(
            history, state, missing, until_s=deadline_s, after_chunk=thin
        )
        if not done:
            return Backfill(done=False, absorbed=state.info.step, total=anchor.total_commits)
        self._settle(history, anchor)
        return Backfill(done=True, absorbed=anchor.total_commits, total=anchor.total_commits)

    def _settle(self, history: History, anchor: Anchor) -> None:
        """Let an anchor's states answer from now on, in place of the provisional anchors'."""
        add_anchor(history, anchor.commit)
        self._store.activate_anchor(anchor.id)

    def _resume(
        self, history: History, anchor: Anchor, target: str
    ) -> tuple[StoredState, list[Commit]]:
        """Return the last replayed state and the commits after it, oldest first.

        Raises UserError when they are not ancestors, or gone; the next refresh plans another.
        """
        latest = self._store.latest_state(anchor.id)
        reached = latest.info.commit if latest else anchor.commit
        try:
            missing = commits_after(history, reached, target)
        except UserError as error:  # rewritten and collected as garbage
            self._store.retire_anchor(anchor.id)
            raise UserError(
                f"the replay stopped: {error.message}", hint="`code2lora refresh` starts another"
            ) from error
        if latest is None:
            latest = self._absorber.initial(history, anchor, history.commit(anchor.commit))
        return latest, missing

    # -- states -----------------------------------------------------------------------------

    def _add_anchor(self, repository_id: str, commit: str, role: AnchorRole) -> Anchor:
        return self._store.add_anchor(repository_id, self._fingerprint, commit, role)

    def _state(self, history: History, repository_id: str, commit: str) -> StoredState:
        """Return a commit's state, computed again if it was thinned. Raises UserError if none."""
        info = self._info(repository_id, commit)
        return self._absorber.kept(history, info.anchor_id, commit)

    def _info(self, repository_id: str, commit: str) -> StateInfo:
        """Return what is known of a commit's state. Raises UserError when there is none."""
        infos = self._store.state_infos(repository_id, self._fingerprint, [commit])
        if commit not in infos:
            raise UserError(
                f"no state is stored for commit {commit[:12]}",
                hint="`code2lora log` lists the commits that have one",
            )
        return infos[commit]

    def _any_worktree(self, repository_id: str) -> Worktree | None:
        """Return a worktree that is there, to read the repository by."""
        worktrees = self._store.worktrees(repository_id)
        return next((w for w in worktrees if Path(w.git_dir).is_dir()), None)

    # -- adapters ---------------------------------------------------------------------------

    def _publish(self, history: History, worktree: Worktree, commit: str) -> Path:
        """Make the commit's adapter live, writing it unless it is on disk already."""
        began_s = time.perf_counter()
        info = self._info(worktree.repository_id, commit)
        use = served_use(self._settings, self._store, worktree.repository_id, self._fingerprint)
        known = self._store.find_adapter(info.id, use)
        if known is not None and is_intact(Path(known.path), known.sha256):
            self._store.set_live(worktree.id, known.id)
            return Path(known.path)
        if use == "own":
            state = self._absorber.kept(history, info.anchor_id, commit)
            info, lora = state.info, self._family.adapter(unpack(state.state))
        else:
            lora = self._substitute(use)
        generated_s = time.perf_counter()
        base = self._checkpoint.config.base
        written = publish(
            lora,
            AdapterMetadata(
                repository=worktree.repository_id,
                commit=commit,
                state_sha256=info.state_sha256,
                checkpoint=self._fingerprint,
                base_model=base.id,
                base_revision=base.revision,
                base_fingerprint=base.fingerprint,
                use=use,
            ),
            self._settings.adapters_dir,
            n_layers=base.n_layers,
        )
        self._store.publish(
            worktree.id,
            NewAdapter(
                state_id=info.id,
                path=str(written.path),
                sha256=written.sha256,
                n_bytes=written.n_bytes,
                generate_ms=(generated_s - began_s) * 1e3,
                write_ms=(time.perf_counter() - generated_s) * 1e3,
                use=use,
            ),
        )
        prune_repository(self._store, worktree.repository_id, self._settings)
        return written.path

    def _substitute(self, use: Use) -> Lora:
        """Return the weights that serve in place of a state's own."""
        generic = self._family.generic()
        if use == "generic":
            return generic
        # An adapter that adds nothing, so that whoever serves by its name serves the base.
        nothing = {target: torch.zeros_like(b) for target, b in generic.b.items()}
        return replace(generic, b=nothing)

    # -- helpers ----------------------------------------------------------------------------

    @contextmanager
    def _reading(self, worktree: Worktree) -> Iterator[History]:
        """Hold the repository's lock with its history open; record what a person must mend."""
        with repository_lock(self._settings, worktree.repository_id):
            try:
                with open_registered(worktree) as history:
                    yield history
            except UserError as error:
                self._store.record_failure(
                    worktree.repository_id,
                    "refresh",
                    error.message,
                    hint=error.hint,
                    worktree_id=worktree.id,
                )
                raise
