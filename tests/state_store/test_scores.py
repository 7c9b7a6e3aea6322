"""Scores: one for each commit, what the running gain is made of, and what the gate serves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from code2lora.state_store import Store
from code2lora.state_store.records import NewScore
from tests.state_store.samples import (
    CHECKPOINT,
    OTHER_REPOSITORY,
    REPOSITORY,
    anchored,
    commit_id,
    new_adapter,
    register,
)


def new_score(n: int, **changes: object) -> NewScore:
    """Return the n-th commit's score."""
    made = NewScore(
        repository_id=REPOSITORY,
        checkpoint=CHECKPOINT,
        commit=commit_id(n),
        told=commit_id(n - 1),
        state_sha256="5" * 64,
        rows_sha256=f"{n:064x}",
        n_rows=2,
        n_tokens=100 + n,
        base_nats=300.0,
        generic_nats=250.0,
        own_nats=240.5,
        use="own",
        took_ms=12.0,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_score_comes_back_as_it_was_stored(store: Store) -> None:
    register(store)
    stored = store.add_score(new_score(1))

    assert (stored.commit, stored.told, stored.own_nats) == (commit_id(1), commit_id(0), 240.5)
    found = store.scores(REPOSITORY, CHECKPOINT, map(commit_id, range(3)))
    assert found == {commit_id(1): stored}
    assert store.scores(OTHER_REPOSITORY, CHECKPOINT, [commit_id(1)]) == {}
    assert store.scores(REPOSITORY, "another", [commit_id(1)]) == {}


def test_a_commit_keeps_its_first_score(store: Store) -> None:
    register(store)
    first = store.add_score(new_score(1))

    assert store.add_score(new_score(1, own_nats=1.0, use="base")) == first
    assert store.gate_use(REPOSITORY, CHECKPOINT) == "own"


def test_the_last_scores_that_asked_for_anything(store: Store) -> None:
    register(store)
    for n in range(6):
        store.add_score(new_score(n, n_tokens=0 if n == 3 else 100))

    recent = store.recent_scores(REPOSITORY, CHECKPOINT, limit=3)

    assert [score.commit for score in recent] == [commit_id(n) for n in (5, 4, 2)]


def test_a_patch_that_was_rewritten_counts_once_as_it_is_now(store: Store) -> None:
    register(store)
    for n in range(4):
        store.add_score(new_score(n))
    for n in (1, 2):
        rebased = commit_id(n, "rebased")
        store.add_score(new_score(n, commit=rebased))

    recent = store.recent_scores(REPOSITORY, CHECKPOINT, limit=9)

    again = [commit_id(2, "rebased"), commit_id(1, "rebased")]
    assert [score.commit for score in recent] == [*again, commit_id(3), commit_id(0)]


def test_the_gate_is_where_the_last_score_left_it(store: Store) -> None:
    register(store)
    assert store.gate_use(REPOSITORY, CHECKPOINT) == "own"
    store.add_score(new_score(1, use="generic"))
    store.add_score(new_score(2, use="generic", n_tokens=0))
    assert store.gate_use(REPOSITORY, CHECKPOINT) == "generic"
    assert store.gate_use(REPOSITORY, "another") == "own"
    store.add_score(new_score(3, use="base"))
    assert store.gate_use(REPOSITORY, CHECKPOINT) == "base"


def test_a_repository_takes_its_scores_along_and_nothing_else_does(store: Store) -> None:
    anchor = anchored(store, 3)
    store.add_score(new_score(1))
    store.retire_anchor(anchor.id)
    assert store.scores(REPOSITORY, CHECKPOINT, [commit_id(1)])
    with pytest.raises(LookupError):
        store.add_score(new_score(1, repository_id=OTHER_REPOSITORY))

    store.forget_repository(REPOSITORY)
    register(store)
    assert store.scores(REPOSITORY, CHECKPOINT, [commit_id(1)]) == {}


def test_an_adapter_is_found_by_whose_weights_it_has(store: Store) -> None:
    anchored(store, 1)
    [state] = store.state_infos(REPOSITORY, CHECKPOINT, [commit_id(0)]).values()
    own = store.add_adapter(new_adapter(state.id, "/adapters/own"))
    generic = store.add_adapter(replace(new_adapter(state.id, "/adapters/generic"), use="generic"))

    assert store.find_adapter(state.id) == own and own.use == "own"
    assert store.find_adapter(state.id, "generic") == generic
    assert store.find_adapter(state.id, "base") is None
    # Equal weights lie in one directory, which then serves as what was asked for last.
    store.add_adapter(replace(new_adapter(state.id, "/adapters/own"), use="base"))
    found = store.find_adapter(state.id, "base")
    assert found is not None and found.id == own.id
