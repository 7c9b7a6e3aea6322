"""Checkpoints and anchors: roles, activation, retirement, progress."""

from __future__ import annotations

import pytest

from code2lora.state_store import Store
from tests.state_store.samples import (
    CHECKPOINT,
    ENCODER,
    REPOSITORY,
    anchored,
    commit_id,
    new_adapter,
    new_state,
    register,
)


def test_a_checkpoint_is_stored_at_its_first_use(store: Store) -> None:
    config = {"rank": 8, "targets": ["q_proj"], "dropout": None}
    first = store.register_checkpoint(
        "f" * 64, encoder_fingerprint="e" * 64, name="mini", base_model="tiny", config=config
    )
    again = store.register_checkpoint(
        "f" * 64, encoder_fingerprint="x" * 64, name="other", base_model="other", config={}
    )

    assert again == first == store.checkpoint("f" * 64)
    assert first.config == config and first.encoder_fingerprint == "e" * 64
    assert store.checkpoints() == [first] and store.checkpoint("absent") is None


def test_only_active_and_provisional_anchors_answer(store: Store) -> None:
    register(store)
    for n, role in enumerate(("provisional", "backfill", "active")):
        anchor = store.add_anchor(REPOSITORY, CHECKPOINT, commit_id(0, role), role)  # type: ignore[arg-type]
        store.put_states(anchor.id, [new_state(0, role), new_state(1, role)])
        assert anchor.id == n + 1

    def answers(role: str) -> bool:
        return store.find_state(REPOSITORY, CHECKPOINT, commit_id(1, role)) is not None

    assert [answers(r) for r in ("provisional", "backfill", "active")] == [True, False, True]
    assert [a.role for a in store.active_anchors(REPOSITORY, CHECKPOINT)] == [
        "provisional",
        "active",
    ]
    assert store.state_at(2, commit_id(1, "active")) is None
    at = store.state_at(2, commit_id(1, "backfill"))
    assert at is not None and at.state == new_state(1, "backfill").state


def test_an_anchor_at_the_same_commit_is_the_same_anchor(store: Store) -> None:
    anchor = anchored(store, 2)

    again = store.add_anchor(REPOSITORY, CHECKPOINT, commit_id(0), "backfill", total_commits=5)

    assert again == anchor and store.sizes(REPOSITORY).n_states == 2


def test_activation_replaces_the_provisional_anchor_and_its_states(store: Store) -> None:
    settled = anchored(store, 1, branch="settled")
    provisional = anchored(store, 2, branch="head", role="provisional")
    backfill = anchored(store, 4, branch="old", role="backfill")
    worktree = store.upsert_worktree(REPOSITORY, git_dir="/src/.git", path="/src")
    stale = store.latest_state(provisional.id)
    assert stale is not None
    adapter = store.publish(worktree.id, new_adapter(stale.info.id, "/adapters/1"))

    activated = store.activate_anchor(backfill.id)

    assert activated.role == "active" and activated.updated_at > backfill.updated_at
    roles = {a.id: a.role for a in store.anchors(REPOSITORY, CHECKPOINT)}
    assert roles == {settled.id: "active", provisional.id: "retired", backfill.id: "active"}
    assert store.find_state(REPOSITORY, CHECKPOINT, commit_id(1, "head")) is None
    assert store.latest_state(provisional.id) is None
    assert store.find_state(REPOSITORY, CHECKPOINT, commit_id(3, "old")) is not None
    # What is being served goes on being served until something better is published.
    live = store.live_adapter(worktree.id)
    assert live is not None and (live.id, live.state_id) == (adapter.id, None)
    assert (live.commit, live.checkpoint) == (commit_id(1, "head"), CHECKPOINT)


def test_nothing_is_stored_under_a_retired_anchor_until_it_is_taken_back(store: Store) -> None:
    anchor = anchored(store, 3)
    store.retire_anchor(anchor.id)
    assert store.sizes(REPOSITORY).n_states == 0
    assert store.active_anchors(REPOSITORY, CHECKPOINT) == []

    for refused in (
        lambda: store.put_state(anchor.id, new_state(0)),
        lambda: store.put_states(anchor.id, [new_state(0)]),
        lambda: store.activate_anchor(anchor.id),
    ):
        with pytest.raises(LookupError, match="anchor 1 is gone or retired"):
            refused()

    back = store.add_anchor(REPOSITORY, CHECKPOINT, commit_id(0), "provisional")
    assert (back.id, back.role) == (anchor.id, "provisional")
    store.put_state(anchor.id, new_state(0))
    assert store.sizes(REPOSITORY).n_states == 1


def test_backfill_progress_counts_the_commits_after_the_anchor(store: Store) -> None:
    register(store)
    assert store.backfill_progress(REPOSITORY, CHECKPOINT) is None
    anchor = store.add_anchor(
        REPOSITORY,
        CHECKPOINT,
        commit_id(0),
        "backfill",
        target_commit=commit_id(10),
        total_commits=10,
    )
    begun = store.backfill_progress(REPOSITORY, CHECKPOINT)
    assert begun is not None and (begun.done_commits, begun.latest_at) == (0, None)
    assert begun.anchor == anchor and begun.anchor.total_commits == 10

    store.put_states(anchor.id, [new_state(n) for n in range(4)])
    under_way = store.backfill_progress(REPOSITORY, CHECKPOINT)
    assert under_way is not None and under_way.done_commits == 3
    latest = store.latest_state(anchor.id)
    assert latest is not None and latest.info.step == 3
    assert under_way.latest_at == latest.info.created_at

    store.activate_anchor(anchor.id)
    assert store.backfill_progress(REPOSITORY, CHECKPOINT) is None


def test_features_outlive_the_states_of_a_retired_anchor(store: Store) -> None:
    anchor = anchored(store, 3)
    store.retire_anchor(anchor.id)

    keys = [s.diff_key for s in map(new_state, (1, 2)) if s.diff_key]
    assert len(store.get_features(ENCODER, keys)) == 2
