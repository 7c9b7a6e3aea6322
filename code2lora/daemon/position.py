"""Tell where one worktree stands: HEAD, the nearest stored state, what serves, and which model.

Reads the state store and git, and a model's configuration. Torch-free: it answers when the daemon
is dead and the model is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from code2lora.daemon.gain import Standing, standing
from code2lora.daemon.lineage import serving_checkpoint
from code2lora.errors import UserError
from code2lora.history.model import Commit, Head, History
from code2lora.hypernetwork.config import CheckpointConfig
from code2lora.hypernetwork.identity import read_config
from code2lora.hypernetwork.models import ModelPaths, resolve_model
from code2lora.settings import Settings
from code2lora.state_store import Store
from code2lora.state_store.records import (
    Adapter,
    Anchor,
    BackfillProgress,
    Checkpoint,
    StateInfo,
    Worktree,
)

MAX_BEHIND = 200
"""Commits walked back from HEAD in search of one whose state is stored."""


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The stored state nearest to HEAD."""

    info: StateInfo
    anchor: Anchor | None
    """What its states begin at; None once it has been deleted."""
    behind: int
    """Commits from HEAD back to it."""

    @property
    def anchor_commit(self) -> str:
        """What its states begin at."""
        return self.anchor.commit if self.anchor else self.info.commit

    @property
    def anchor_role(self) -> str:
        """What the anchor is for; `retired` once it has been deleted."""
        return self.anchor.role if self.anchor else "retired"


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a worktree stands."""

    head: Head
    recent: Sequence[Commit]
    """HEAD and its nearest first parents, newest first; empty on an unborn branch."""
    live: Adapter | None
    checkpoint: Checkpoint | None
    """The one whose states the repository is served from; None before the first."""
    infos: Mapping[str, StateInfo]
    """Commit -> state, of those of `recent` that have one."""
    nearest: Nearest | None
    backfill: BackfillProgress | None
    standing: Standing | None
    """What the running gain is and what serves for it; None before the first state."""

    @property
    def is_current(self) -> bool:
        """Whether the live adapter is HEAD's."""
        return self.live is not None and self.live.commit == self.head.commit


def read_head(history: History) -> tuple[Head, list[Commit]]:
    """Return HEAD and its nearest first parents, itself first. Raises UserError as git does."""
    head = history.head()
    if head.commit is None:
        return head, []
    return head, list(islice(history.first_parents(head.commit), MAX_BEHIND + 1))


def position(
    settings: Settings, store: Store, worktree: Worktree, head: Head, recent: Sequence[Commit]
) -> Position:
    """Return where a worktree stands.

    head, recent: as `read_head` gives them; without commits where git cannot be read
    """
    repository_id = worktree.repository_id
    live = store.live_adapter(worktree.id)
    checkpoint = serving_checkpoint(store, repository_id, live)
    if checkpoint is None:
        infos, backfill, served = {}, None, None
    else:
        fingerprint = checkpoint.fingerprint
        infos = store.state_infos(repository_id, fingerprint, [commit.id for commit in recent])
        backfill = store.backfill_progress(repository_id, fingerprint)
        served = standing(settings, store, repository_id, fingerprint)
    return Position(
        head=head,
        recent=recent,
        live=live,
        checkpoint=checkpoint,
        infos=infos,
        nearest=_nearest(store, recent, infos),
        backfill=backfill,
        standing=served,
    )


def shown_model(
    settings: Settings, checkpoint: Checkpoint | None
) -> tuple[ModelPaths, CheckpointConfig] | None:
    """Return the model that serves, or will; None when its files cannot be read."""
    try:
        model = resolve_model(settings.model, settings.models_dir)
        if checkpoint is not None and model.name != checkpoint.name:
            model = resolve_model(checkpoint.name, settings.models_dir)
        return model, read_config(model.hypernetwork)
    except UserError:
        return None


def _nearest(
    store: Store, recent: Sequence[Commit], infos: Mapping[str, StateInfo]
) -> Nearest | None:
    for behind, commit in enumerate(recent):
        if (info := infos.get(commit.id)) is not None:
            return Nearest(info=info, anchor=store.anchor(info.anchor_id), behind=behind)
    return None
