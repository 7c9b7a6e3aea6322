"""Published adapters: generations, what is live, what may be pruned."""

from __future__ import annotations

import pytest

from code2lora.state_store import Store
from code2lora.state_store.records import Adapter
from tests.state_store.samples import (
    CHECKPOINT,
    OTHER_REPOSITORY,
    REPOSITORY,
    anchored,
    commit_id,
    new_adapter,
    new_state,
)


def states_of(store: Store, n: int, repository_id: str = REPOSITORY) -> list[int]:
    """Return the ids of the states of n commits."""
    anchor = anchored(store, n, repository_id=repository_id)
    infos = store.state_infos(repository_id, CHECKPOINT, map(commit_id, range(n)))
    assert anchor.id == infos[commit_id(0)].anchor_id
    return [infos[commit_id(i)].id for i in range(n)]


def test_publishing_records_the_adapter_and_makes_it_live(store: Store) -> None:
    _, state_id = states_of(store, 2)
    worktree = store.upsert_worktree(REPOSITORY, git_dir="/src/.git", path="/src")

    adapter = store.publish(worktree.id, new_adapter(state_id, "/adapters/1"))

    assert adapter == Adapter(
        id=adapter.id,
        repository_id=REPOSITORY,
        state_id=state_id,
        checkpoint=CHECKPOINT,
        commit=commit_id(1),
        generation=1,
        path="/adapters/1",
        sha256="5" * 64,
        n_bytes=1000,
        generate_ms=3.0,
        write_ms=4.0,
        published_at=adapter.published_at,
        pruned_at=None,
    )
    assert store.live_adapter(worktree.id) == adapter == store.adapter(adapter.id)
    event = store.last_success(REPOSITORY)
    assert event is not None and (event.kind, event.worktree_id) == ("published", worktree.id)
    assert event.detail == {"commit": commit_id(1), "generation": 1}


def test_generations_count_up_in_each_repository(store: Store) -> None:
    states = states_of(store, 3)
    (other,) = states_of(store, 1, OTHER_REPOSITORY)

    generations = [
        store.add_adapter(new_adapter(state, f"/adapters/{state}")).generation
        for state in (*states, other)
    ]

    assert generations == [1, 2, 3, 1]
    assert [a.generation for a in store.adapters(REPOSITORY)] == [3, 2, 1]


def test_recording_the_same_directory_again_keeps_its_record(store: Store) -> None:
    first_state, second_state = states_of(store, 2)
    first = store.add_adapter(new_adapter(first_state, "/adapters/1"))

    assert store.add_adapter(new_adapter(first_state, "/adapters/1")) == first
    # Another state with the same bytes leads to the same directory.
    assert store.add_adapter(new_adapter(second_state, "/adapters/1")).id == first.id
    found = store.find_adapter(second_state)
    assert found is not None and found.id == first.id

    assert store.mark_pruned(first.id)
    regenerated = store.add_adapter(new_adapter(first_state, "/adapters/1"))
    assert (regenerated.generation, regenerated.id == first.id) == (2, False)


def test_switching_back_to_a_known_commit_finds_its_adapter(store: Store) -> None:
    states = states_of(store, 2)
    worktree = store.upsert_worktree(REPOSITORY, git_dir="/src/.git", path="/src")
    adapters = [store.publish(worktree.id, new_adapter(s, f"/adapters/{s}")) for s in states]

    known = store.find_adapter(states[0])
    assert known == adapters[0]
    store.set_live(worktree.id, known.id)
    store.set_live(worktree.id, known.id)

    assert store.live_adapter(worktree.id) == adapters[0]
    assert [e.kind for e in store.events(REPOSITORY)] == ["switched", "published", "published"]
    store.set_live(worktree.id, None)
    assert store.live_adapter(worktree.id) is None
    assert [e.kind for e in store.events(REPOSITORY, limit=1)] == ["withdrawn"]
    success = store.last_success(REPOSITORY)
    assert success is not None and success.kind == "switched"


def test_pruning_keeps_the_newest_and_whatever_is_live(store: Store) -> None:
    states = states_of(store, 6)
    one = store.upsert_worktree(REPOSITORY, git_dir="/src/.git", path="/src")
    two = store.upsert_worktree(REPOSITORY, git_dir="/src/.git/worktrees/two", path="/two")
    adapters = [store.add_adapter(new_adapter(s, f"/adapters/{s}")) for s in states]
    store.set_live(one.id, adapters[1].id)
    store.set_live(two.id, adapters[5].id)

    prunable = store.adapters_to_prune(REPOSITORY, keep=2)
    assert [a.generation for a in prunable] == [4, 3, 1]

    assert [store.mark_pruned(a.id) for a in prunable] == [True, True, True]
    assert [a.generation for a in store.adapters(REPOSITORY)] == [6, 5, 2]
    assert len(store.adapters(REPOSITORY, include_pruned=True)) == 6
    assert store.find_adapter(states[0]) is None
    assert store.sizes(REPOSITORY).adapter_bytes == 3000


def test_a_live_adapter_is_not_pruned_and_a_pruned_one_not_made_live(store: Store) -> None:
    states = states_of(store, 2)
    worktree = store.upsert_worktree(REPOSITORY, git_dir="/src/.git", path="/src")
    live = store.publish(worktree.id, new_adapter(states[0], "/adapters/1"))
    other = store.add_adapter(new_adapter(states[1], "/adapters/2"))

    assert store.mark_pruned(live.id) is False
    unchanged = store.adapter(live.id)
    assert unchanged is not None and unchanged.pruned_at is None

    assert store.mark_pruned(other.id) is True
    with pytest.raises(LookupError, match="adapter 2 is gone or pruned"):
        store.set_live(worktree.id, other.id)
    assert store.live_adapter(worktree.id) == live


def test_publishing_for_what_is_gone_leaves_no_trace(store: Store) -> None:
    (state_id,) = states_of(store, 1)

    with pytest.raises(LookupError, match="worktree 9 is gone"):
        store.publish(9, new_adapter(state_id, "/adapters/1"))
    with pytest.raises(LookupError, match="state 99 is gone"):
        store.add_adapter(new_adapter(99, "/adapters/1"))
    assert store.adapters(REPOSITORY, include_pruned=True) == []
    assert store.events(REPOSITORY) == []


def test_an_adapter_serves_only_its_own_repository(store: Store) -> None:
    (state_id,) = states_of(store, 1)
    states_of(store, 1, OTHER_REPOSITORY)
    foreign = store.upsert_worktree(OTHER_REPOSITORY, git_dir="/other/.git", path="/other")

    with pytest.raises(AssertionError, match="an adapter of another repository"):
        store.publish(foreign.id, new_adapter(state_id, "/adapters/1"))
    assert store.adapters(REPOSITORY) == []


def test_replacing_a_state_does_not_lose_its_adapter(store: Store) -> None:
    anchor = anchored(store, 1, role="provisional")
    state = store.put_state(anchor.id, new_state(1))
    adapter = store.add_adapter(new_adapter(state.id, "/adapters/1"))

    store.retire_anchor(anchor.id)

    (kept,) = store.adapters(REPOSITORY)
    assert (kept.id, kept.state_id, kept.commit) == (adapter.id, None, commit_id(1))
