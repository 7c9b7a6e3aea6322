"""Old states let their bytes go and keep their rows; what is computed again goes back into them."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace

import pytest

from code2lora.state_store import Store, schema
from code2lora.state_store.records import Anchor, NewState
from tests.state_store.samples import (
    CHECKPOINT,
    ENCODER,
    OTHER_REPOSITORY,
    REPOSITORY,
    anchored,
    commit_id,
    new_adapter,
    new_state,
)

LARGE = 1000


def large(n: int, branch: str = "main") -> NewState:
    """Return a state of more than LARGE bytes, with features of as many."""
    return replace(
        new_state(n, branch, size=LARGE + 24), features=bytes(LARGE + n + 1) if n else None
    )


def chain(store: Store, n_states: int, repository_id: str = REPOSITORY) -> Anchor:
    """Return an anchor with large states after it."""
    anchor = anchored(store, repository_id=repository_id)
    store.put_states(anchor.id, [large(n) for n in range(n_states)])
    return anchor


def thin(store: Store, *, keep: int = 10, every: int = 16, limit: int = 1000) -> int:
    return sum(
        store.thin_states(anchor, keep=keep, every=every, over_bytes=LARGE, limit=limit)
        for anchor in store.anchors_to_thin(REPOSITORY, over_bytes=LARGE)
    )


def kept(store: Store, n_states: int, branch: str = "main") -> set[int]:
    """Return which states of a branch have their bytes, by number."""
    found = [
        store.find_state(REPOSITORY, CHECKPOINT, commit_id(n, branch)) for n in range(n_states)
    ]
    return {n for n, state in enumerate(found) if state is not None}


def keys(*numbers: int) -> list[str]:
    return [hashlib.sha256(f"main {n}".encode()).hexdigest() for n in numbers]


def test_the_newest_and_some_of_the_older_states_stay(store: Store) -> None:
    anchor = chain(store, 200)
    commits = [commit_id(n) for n in range(200)]
    infos = store.state_infos(REPOSITORY, CHECKPOINT, commits)
    recent = store.recent_states(REPOSITORY, limit=200)
    lineage = store.lineage(REPOSITORY, CHECKPOINT, commits[-1], limit=999)

    assert thin(store, limit=70) == 70
    assert thin(store) == 177 - 70
    assert thin(store) == 0

    # Those that the newest ones were advanced from stay as well.
    expected = {*range(0, 200, 16), *range(189, 200)}
    assert kept(store, 200) == expected
    sizes = store.sizes(REPOSITORY)
    assert (sizes.n_states, sizes.n_kept_states) == (200, len(expected))
    assert sizes.state_bytes == len(expected) * (LARGE + 24)
    # What only tells of states tells the same.
    assert store.state_infos(REPOSITORY, CHECKPOINT, commits) == infos
    assert store.recent_states(REPOSITORY, limit=200) == recent
    assert store.lineage(REPOSITORY, CHECKPOINT, commits[-1], limit=999) == lineage
    assert store.known_commits(REPOSITORY, CHECKPOINT, commits) == set(commits)
    latest = store.latest_state(anchor.id)
    assert latest is not None and latest.info.step == 199
    store.check()


def test_features_go_with_their_states_unless_a_kept_one_shares_them(store: Store) -> None:
    anchor = chain(store, 40)
    cached = set(store.get_features(ENCODER, keys(*range(1, 40))))
    shared, old = keys(5)[0], keys(6)[0]
    again = replace(large(1, "topic"), parent=commit_id(38), step=39, diff_key=shared)
    store.put_state(anchor.id, replace(again, features=None))

    thin(store)

    gone = {n for n in range(40) if n not in kept(store, 40)}
    assert gone >= {5, 6}
    expected = cached - set(keys(*gone)) | {shared}
    assert old not in expected
    assert set(store.get_features(ENCODER, cached)) == expected


def test_what_is_small_stays_for_ever(store: Store) -> None:
    anchored(store, 100)
    assert thin(store) == 0
    assert kept(store, 100) == set(range(100))

    chain(store, 30, OTHER_REPOSITORY)
    assert thin(store) == 0  # another repository's
    assert store.sizes(OTHER_REPOSITORY).n_kept_states == 30


def test_what_worktrees_stand_on_and_are_served_from_stays(store: Store) -> None:
    chain(store, 60)
    standing, moved = (
        store.upsert_worktree(REPOSITORY, git_dir=f"/src/{name}", path=None) for name in "ab"
    )
    unborn = store.upsert_worktree(REPOSITORY, git_dir="/src/c", path=None)
    store.set_head(standing.id, commit_id(5), "main")
    store.set_head(moved.id, commit_id(999), "main")
    store.set_head(unborn.id, None, "main")
    served = store.find_state(REPOSITORY, CHECKPOINT, commit_id(7))
    assert served is not None
    store.publish(moved.id, new_adapter(served.info.id, "/adapters/1"))

    thin(store)

    assert kept(store, 60) == {0, 5, 7, 16, 32, 48, *range(49, 60)}


def test_between_steps_no_state_is_further_from_a_kept_one(store: Store) -> None:
    """Steps have gaps here, so that none may fall on a round number."""
    anchor = anchored(store)
    steps = [n for n in range(200) if n % 16 not in (0, 1, 2)]
    parent: str | None = None
    for n in [0, *steps]:
        store.put_state(anchor.id, replace(large(n), parent=parent))
        parent = commit_id(n)
    head = replace(large(200), parent=parent, provisional=True)
    store.put_states(
        anchor.id, [head, *(replace(large(n), parent=parent) for n in range(201, 240))]
    )

    thin(store)

    assert kept(store, 190) == {0, *range(19, 190, 16)}
    assert 200 not in kept(store, 201)  # nothing is advanced from it


def test_the_nearest_kept_state_is_where_to_start_from(store: Store) -> None:
    anchor = chain(store, 50)
    store.put_states(
        anchor.id, [replace(large(20, "topic"), parent=commit_id(19)), large(21, "topic")]
    )
    thin(store, keep=1)

    def nearest(commit: str) -> int | None:
        found = store.nearest_kept(anchor.id, commit)
        return None if found is None else found.info.step

    assert kept(store, 50) == {0, 16, 32, 48}
    assert kept(store, 22, "topic") == {20, 21}
    assert [nearest(commit_id(n)) for n in (0, 15, 16, 19, 33, 49)] == [0, 0, 16, 16, 32, 48]
    assert nearest(commit_id(21, "topic")) == 21
    assert nearest(commit_id(99)) is None
    latest = store.latest_state(anchor.id)
    assert latest is not None and latest.info.commit == commit_id(21, "topic")


def test_a_thinned_state_is_not_taken_from_an_anchor_that_does_not_answer(store: Store) -> None:
    chain(store, 12)
    near = store.add_anchor(REPOSITORY, CHECKPOINT, commit_id(3), "active")
    shifted = [replace(large(n), step=n - 3, state=bytes(n)) for n in range(3, 12)]
    store.put_states(near.id, [replace(shifted[0], parent=None), *shifted[1:]])
    store.thin_states(near.id, keep=1, every=100, over_bytes=0, limit=100)

    info = store.state_infos(REPOSITORY, CHECKPOINT, [commit_id(8)])[commit_id(8)]

    assert info.anchor_id == near.id
    assert store.find_state(REPOSITORY, CHECKPOINT, commit_id(8)) is None


def test_what_is_computed_again_goes_back_into_the_rows(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    anchor = chain(store, 40)
    before = store.state_infos(REPOSITORY, CHECKPOINT, [commit_id(n) for n in range(40)])
    thin(store)

    assert store.put_states(anchor.id, [large(n) for n in range(1, 6)]) == 0

    assert kept(store, 7) == {0, 1, 2, 3, 4, 5}
    found = store.find_state(REPOSITORY, CHECKPOINT, commit_id(5))
    assert found is not None and found.state == large(5).state
    assert store.state_infos(REPOSITORY, CHECKPOINT, list(before)) == before
    assert set(store.get_features(ENCODER, keys(*range(1, 6)))) == set(keys(*range(1, 6)))
    assert caplog.messages == []
    assert thin(store) == 5


def test_other_bytes_than_before_are_taken_with_their_digest(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    anchor = chain(store, 40)
    thin(store)
    before = store.state_infos(REPOSITORY, CHECKPOINT, [commit_id(5)])[commit_id(5)]
    rounded = replace(large(5), state=b"rounded otherwise", drift=9.0, summary="other")

    with caplog.at_level(logging.WARNING):
        store.put_state(anchor.id, rounded)

    found = store.find_state(REPOSITORY, CHECKPOINT, commit_id(5))
    digest = hashlib.sha256(rounded.state).hexdigest()
    assert found is not None and found.state == rounded.state
    assert found.info == replace(before, state_sha256=digest)
    assert caplog.messages == [
        f"the state of commit {commit_id(5)} is now {digest[:12]}, but was "
        f"{before.state_sha256[:12]}: computed by other versions or on another device"
    ]


def test_the_schema_before_thinning_is_upgraded_with_its_states(
    any_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(schema, "SCHEMA_REVISION", "0003")
        with Store.open(any_url) as store:
            chain(store, 60)
            head = store.upsert_worktree(REPOSITORY, git_dir="/src/.git", path="/src")
            newest = store.find_state(REPOSITORY, CHECKPOINT, commit_id(59))
            assert newest is not None
            store.publish(head.id, new_adapter(newest.info.id, "/adapters/1"))
            before = store.recent_states(REPOSITORY, limit=99)
            with pytest.raises(Exception, match=r"(?i)null"):
                thin(store)

    with Store.open(any_url) as store:
        store.check()
        assert store.recent_states(REPOSITORY, limit=99) == before
        for n in range(60):
            found = store.find_state(REPOSITORY, CHECKPOINT, commit_id(n))
            assert found is not None and found.state == large(n).state
        live = store.live_adapter(head.id)
        assert live is not None and live.state_id == newest.info.id
        assert thin(store) == 60 - len({0, 16, 32, 48, *range(49, 60)})
