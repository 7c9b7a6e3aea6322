"""Events and failures: order, filters, counting, resolution, pruning."""

from __future__ import annotations

import pytest

from code2lora.state_store import Store
from code2lora.state_store.records import Failure
from tests.state_store.samples import OTHER_REPOSITORY, REPOSITORY, commit_id, register


def test_events_come_newest_first_by_repository_and_kind(store: Store) -> None:
    register(store)
    register(store, OTHER_REPOSITORY)
    worktree = store.upsert_worktree(REPOSITORY, git_dir="/src/.git", path="/src")
    store.record_event("supervisor started")
    detail = {"commits": 3, "seconds": 0.5, "why": None, "paths": ["caf\udce9"]}
    store.record_event("absorbed", repository_id=REPOSITORY, worktree_id=worktree.id, detail=detail)
    store.record_event("absorbed", repository_id=OTHER_REPOSITORY)
    store.record_event("pruned", repository_id=REPOSITORY)

    assert [e.kind for e in store.events()] == [
        "pruned",
        "absorbed",
        "absorbed",
        "supervisor started",
    ]
    assert [e.kind for e in store.events(REPOSITORY)] == ["pruned", "absorbed"]
    assert len(store.events(limit=3)) == 3
    (absorbed,) = store.events(REPOSITORY, kinds=["absorbed"])
    assert (absorbed.worktree_id, absorbed.detail) == (worktree.id, detail)
    assert store.last_success(REPOSITORY) is None


def test_the_same_failure_is_counted_until_it_is_resolved(store: Store) -> None:
    register(store)

    def fail() -> Failure:
        return store.record_failure(
            REPOSITORY, "embed", "no memory", commit=commit_id(1), hint="close a program"
        )

    first, second = fail(), fail()
    assert (second.id, second.n_times) == (first.id, 2)
    assert second.first_at == first.at < second.at

    other = store.record_failure(REPOSITORY, "embed", "no memory", commit=commit_id(2))
    assert other.id != first.id
    assert store.failures(REPOSITORY) == [other, second]

    assert store.resolve_failures(REPOSITORY) == 2
    assert store.resolve_failures(REPOSITORY) == 0
    assert store.failures(REPOSITORY) == []
    last = store.last_failure(REPOSITORY)
    assert last is not None and last.id == other.id and last.resolved_at is not None
    again = fail()
    assert (again.id == first.id, again.n_times) == (False, 1)


def test_failures_of_one_worktree_are_resolved_apart(store: Store) -> None:
    register(store)
    one = store.upsert_worktree(REPOSITORY, git_dir="/src/.git", path="/src")
    two = store.upsert_worktree(REPOSITORY, git_dir="/src/.git/worktrees/two", path="/two")
    store.record_failure(REPOSITORY, "publish", "disk full", worktree_id=one.id)
    store.record_failure(REPOSITORY, "publish", "disk full", worktree_id=two.id)

    assert store.resolve_failures(REPOSITORY, worktree_id=one.id) == 1
    (left,) = store.failures(REPOSITORY)
    assert left.worktree_id == two.id


def test_events_and_failures_outlive_their_worktree(store: Store) -> None:
    register(store)
    worktree = store.upsert_worktree(REPOSITORY, git_dir="/src/.git", path="/src")
    store.record_event("absorbed", repository_id=REPOSITORY, worktree_id=worktree.id)
    store.record_failure(REPOSITORY, "publish", "disk full", worktree_id=worktree.id)

    store.remove_worktree(worktree.id)

    assert [e.worktree_id for e in store.events(REPOSITORY)] == [None]
    assert [f.worktree_id for f in store.failures(REPOSITORY)] == [None]


def test_pruning_the_journal_keeps_open_failures_and_the_last_success(store: Store) -> None:
    register(store)
    for kind in ("published", "published", "absorbed"):
        store.record_event(kind, repository_id=REPOSITORY)
    store.record_failure(REPOSITORY, "embed", "settled")
    store.resolve_failures(REPOSITORY)
    store.record_failure(REPOSITORY, "embed", "open")
    moment = store._now()
    store.record_event("absorbed", repository_id=REPOSITORY)

    assert store.prune_journal(before=moment) == 3

    assert [e.kind for e in store.events(REPOSITORY)] == ["absorbed", "published"]
    assert [f.message for f in store.failures(REPOSITORY, include_resolved=True)] == ["open"]


def test_a_failure_of_a_forgotten_repository_is_refused(store: Store) -> None:
    with pytest.raises(LookupError, match="is gone"):
        store.record_failure(REPOSITORY, "embed", "no")
