"""States and features: chains, look-ups, idempotence, round trips."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from code2lora.errors import UserError
from code2lora.state_store import Store
from code2lora.state_store.records import Features, NewState
from tests.state_store.samples import (
    CHECKPOINT,
    ENCODER,
    EPOCH,
    OTHER_REPOSITORY,
    REPOSITORY,
    anchored,
    commit_id,
    new_state,
    register,
)


def test_a_state_comes_back_as_it_was_put(store: Store) -> None:
    anchor = anchored(store, 1)
    new = new_state(1)

    info = store.put_state(anchor.id, new)
    found = store.find_state(REPOSITORY, CHECKPOINT, new.commit)

    assert found is not None and found.info == info and found.state == new.state
    for name in ("commit", "parent", "step", "diff_key", "n_tokens", "n_changed_files"):
        assert getattr(info, name) == getattr(new, name)
    for name in ("embed_ms", "advance_ms", "drift", "committed_at", "summary"):
        assert getattr(info, name) == getattr(new, name)
    assert (info.repository_id, info.checkpoint) == (REPOSITORY, CHECKPOINT)
    assert info.created_at > EPOCH
    assert new.diff_key is not None
    assert store.get_features(ENCODER, [new.diff_key, "absent"]) == {
        new.diff_key: Features(key=new.diff_key, blob=new.features or b"", n_tokens=10)
    }


def test_putting_a_commit_again_changes_nothing(store: Store) -> None:
    anchor = anchored(store, 3)
    before = store.recent_states(REPOSITORY, limit=9)

    again = store.put_state(anchor.id, replace(new_state(2), state=b"other", summary="other"))

    assert again == before[0]
    assert store.put_states(anchor.id, [new_state(n) for n in range(3)]) == 0
    assert store.recent_states(REPOSITORY, limit=9) == before
    found = store.find_state(REPOSITORY, CHECKPOINT, commit_id(2))
    assert found is not None and found.state == new_state(2).state


def test_a_run_of_states_is_stored_whole_or_not_at_all(store: Store) -> None:
    anchor = anchored(store, 1)
    run = [new_state(n) for n in range(1, 700)]  # more than one batch of parameters

    with pytest.raises(AssertionError, match="is step 9, but its parent"):
        store.put_states(anchor.id, [*run, replace(run[-1], commit=commit_id(9999), step=9)])
    assert store.sizes(REPOSITORY).n_states == 1
    assert store.get_features(ENCODER, [s.diff_key for s in run if s.diff_key]) == {}

    assert store.put_states(anchor.id, [new_state(0), *run]) == 699
    assert store.sizes(REPOSITORY).n_states == 700
    assert len(store.get_features(ENCODER, [s.diff_key for s in run if s.diff_key])) == 699


def test_a_provisional_state_answers_and_leads_nowhere(store: Store) -> None:
    anchor = anchored(store, 2)
    head = replace(new_state(4), parent=commit_id(1), provisional=True)
    step = replace(new_state(5), parent=commit_id(1))

    assert store.put_state(anchor.id, head).provisional
    with pytest.raises(AssertionError, match=r"its parent .* provisional=True"):
        store.put_state(anchor.id, replace(step, parent=head.commit))
    found = store.find_state(REPOSITORY, CHECKPOINT, head.commit)
    latest = store.latest_state(anchor.id)
    store.put_state(anchor.id, step)

    assert found is not None and found.state == head.state
    assert latest is not None and latest.info.commit == commit_id(1)
    lineages = {
        commit: [info.step for info in store.lineage(REPOSITORY, CHECKPOINT, commit, limit=9)]
        for commit in (head.commit, step.commit)
    }
    assert lineages == {head.commit: [4, 1, 0], step.commit: [5, 1, 0]}


def test_an_anchor_is_never_provisional(store: Store) -> None:
    anchor = anchored(store)
    with pytest.raises(AssertionError):
        store.put_state(anchor.id, replace(new_state(0), provisional=True))


@pytest.mark.parametrize(
    "wrong",
    [
        replace(new_state(2), parent=None),
        replace(new_state(2), parent=commit_id(7)),
        replace(new_state(2), step=1),
        replace(new_state(0, "other")),
    ],
    ids=["no parent", "unknown parent", "wrong step", "a second beginning"],
)
def test_a_state_must_continue_a_chain_to_its_anchor(store: Store, wrong: NewState) -> None:
    anchor = anchored(store, 2)

    with pytest.raises(AssertionError):
        store.put_state(anchor.id, wrong)
    assert store.sizes(REPOSITORY).n_states == 2


def test_states_are_kept_apart_by_repository_and_checkpoint(store: Store) -> None:
    anchored(store, 2)
    register(store, OTHER_REPOSITORY)
    store.register_checkpoint(
        "checkpoint-2", encoder_fingerprint=ENCODER, name="mini", base_model="tiny", config={}
    )

    assert store.find_state(OTHER_REPOSITORY, CHECKPOINT, commit_id(1)) is None
    assert store.find_state(REPOSITORY, "checkpoint-2", commit_id(1)) is None
    assert store.known_commits(OTHER_REPOSITORY, CHECKPOINT, [commit_id(1)]) == set()
    assert store.recent_states(OTHER_REPOSITORY, limit=5) == []


def test_known_commits_answers_for_any_number_of_commits(store: Store) -> None:
    anchored(store, 4)
    asked = [commit_id(n) for n in range(2, 2000)]

    known = store.known_commits(REPOSITORY, CHECKPOINT, asked)

    assert known == {commit_id(2), commit_id(3)}
    assert store.known_commits(REPOSITORY, CHECKPOINT, []) == set()
    infos = store.state_infos(REPOSITORY, CHECKPOINT, asked)
    assert {commit: info.step for commit, info in infos.items()} == {
        commit_id(2): 2,
        commit_id(3): 3,
    }


def test_where_anchors_overlap_the_nearest_settled_one_answers(store: Store) -> None:
    far = anchored(store, 6)
    near = store.add_anchor(REPOSITORY, CHECKPOINT, commit_id(3), "provisional")
    shifted = [replace(new_state(n), step=n - 3) for n in (3, 4, 5)]
    shifted[0] = replace(shifted[0], parent=None)
    store.put_states(near.id, shifted)

    def answering() -> set[int]:
        found = store.find_state(REPOSITORY, CHECKPOINT, commit_id(5))
        infos = store.state_infos(REPOSITORY, CHECKPOINT, [commit_id(5)])
        lineage = store.lineage(REPOSITORY, CHECKPOINT, commit_id(5), limit=1)
        assert found is not None
        return {found.info.anchor_id, infos[commit_id(5)].anchor_id, lineage[0].anchor_id}

    assert answering() == {far.id}  # the other is only provisional
    store.activate_anchor(near.id)
    assert answering() == {near.id}


def test_lineage_follows_first_parents_through_a_branch(store: Store) -> None:
    anchor = anchored(store, 5)
    fork = [replace(new_state(3, "topic"), parent=commit_id(2)), new_state(4, "topic")]
    store.put_states(anchor.id, fork)

    lineage = store.lineage(REPOSITORY, CHECKPOINT, commit_id(4, "topic"), limit=10)

    expected = [commit_id(4, "topic"), commit_id(3, "topic"), *map(commit_id, (2, 1, 0))]
    assert [info.commit for info in lineage] == expected
    assert store.lineage(REPOSITORY, CHECKPOINT, commit_id(4), limit=2) == [
        store.state_infos(REPOSITORY, CHECKPOINT, [commit_id(n)])[commit_id(n)] for n in (4, 3)
    ]
    assert store.lineage(REPOSITORY, CHECKPOINT, commit_id(99), limit=10) == []


def test_recent_states_come_newest_first_without_their_bytes(store: Store) -> None:
    anchored(store, 8)
    recent = store.recent_states(REPOSITORY, limit=3)

    assert [info.step for info in recent] == [7, 6, 5]
    assert not any(isinstance(getattr(recent[0], f), bytes) for f in recent[0].__slots__)


def test_sizes_count_states_and_kept_adapters(store: Store) -> None:
    anchor = anchored(store, 4)
    store.put_state(anchor.id, new_state(4, size=1000))

    sizes = store.sizes(REPOSITORY)
    assert (sizes.n_states, sizes.state_bytes) == (5, 4 * 64 + 1000)
    assert (sizes.n_adapters, sizes.adapter_bytes) == (0, 0)


def test_features_keep_what_was_there_first(store: Store) -> None:
    first = [Features(key=f"k{n}", blob=b"first", n_tokens=n) for n in range(600)]
    store.put_features(ENCODER, first)
    store.put_features(
        ENCODER,
        [Features(key="k0", blob=b"second", n_tokens=5), Features(key="new", blob=b"", n_tokens=0)],
    )
    store.put_features("encoder-2", [Features(key="k0", blob=b"of another", n_tokens=1)])

    found = store.get_features(ENCODER, [*(f.key for f in first), "new"])
    assert found == {f.key: f for f in first} | {"new": Features(key="new", blob=b"", n_tokens=0)}
    assert store.get_features("encoder-2", ["k0", "k1"])["k0"].blob == b"of another"


def test_unused_features_are_deleted_once_they_are_old_enough(store: Store) -> None:
    anchored(store, 3)
    used = [s.diff_key for s in map(new_state, (1, 2)) if s.diff_key]
    store.put_features(ENCODER, [Features(key="old", blob=b"o", n_tokens=1)])
    between = store._now()
    store.put_features(ENCODER, [Features(key="young", blob=b"y", n_tokens=1)])
    store.put_features("encoder-2", [Features(key=used[0], blob=b"z", n_tokens=1)])

    assert store.delete_unused_features(created_before=between) == 1
    assert set(store.get_features(ENCODER, [*used, "old", "young"])) == {*used, "young"}

    assert store.delete_unused_features(created_before=store._now()) == 2
    assert set(store.get_features(ENCODER, [*used, "young"])) == set(used)


def test_a_state_whose_bytes_changed_on_disk_is_not_handed_out(
    file_store: Store, path: Path
) -> None:
    anchored(file_store, 2)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE states SET state = zeroblob(64) WHERE step = 1")
    db.close()

    with pytest.raises(UserError) as caught:
        file_store.find_state(REPOSITORY, CHECKPOINT, commit_id(1))

    assert caught.value.message == (
        f"the database {path} is damaged: "
        f"the state of commit {commit_id(1)} has changed since it was stored"
    )


def test_times_come_back_in_utc_from_any_zone(store: Store) -> None:
    anchor = anchored(store, 1)
    local = EPOCH.astimezone(timezone(timedelta(hours=-9, minutes=-30)))

    info = store.put_state(anchor.id, replace(new_state(1), committed_at=local))

    assert info.committed_at == EPOCH and info.committed_at.utcoffset() == timedelta(0)
    with pytest.raises(Exception, match="naive datetime"):
        store.put_state(anchor.id, replace(new_state(2), committed_at=EPOCH.replace(tzinfo=None)))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store.open(f"sqlite:///{tmp_path_factory.mktemp('shared') / 'state.db'}") as store:
        anchored(store, 1)
        yield store


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    state=st.binary(max_size=20_000),
    features=st.binary(max_size=5_000),
    summary=st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    drift=st.none() | st.floats(0, 2),
    committed_at=st.datetimes(timezones=st.timezones()),
)
def test_blobs_text_numbers_and_times_round_trip(shared: Store, **values: object) -> None:
    (anchor,) = shared.active_anchors(REPOSITORY, CHECKPOINT)
    latest = shared.recent_states(REPOSITORY, limit=1)[0]
    new = replace(
        new_state(latest.step + 1),
        parent=latest.commit,
        **values,  # type: ignore[arg-type]
    )

    info = shared.put_state(anchor.id, new)
    found = shared.find_state(REPOSITORY, CHECKPOINT, new.commit)

    assert found is not None and (found.info, found.state) == (info, new.state)
    assert (info.summary, info.drift) == (new.summary, new.drift)
    # Times that a clock change makes ambiguous equal nothing in another zone (PEP 495).
    assert info.committed_at == new.committed_at.astimezone(UTC)
    assert new.diff_key is not None
    assert shared.get_features(ENCODER, [new.diff_key])[new.diff_key].blob == new.features
