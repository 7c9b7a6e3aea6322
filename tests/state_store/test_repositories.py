"""Repositories and worktrees: registration, moving, removal, forgetting."""

from __future__ import annotations

import os

import pytest

from code2lora.state_store import Store
from code2lora.state_store.records import Repository, Worktree
from tests.state_store.samples import (
    CHECKPOINT,
    ENCODER,
    EPOCH,
    OTHER_REPOSITORY,
    REPOSITORY,
    anchored,
    commit_id,
    new_adapter,
    register,
)

TABLES_OF_A_REPOSITORY = (
    "repositories", "worktrees", "anchors", "states", "adapters", "events", "failures",
)  # fmt: skip


def test_a_repository_is_registered_once_and_follows_its_folder(store: Store) -> None:
    first = store.add_repository(REPOSITORY, path="/old/place", name="project")
    moved = store.add_repository(REPOSITORY, path="/new/place", name="renamed")

    assert moved == Repository(
        id=REPOSITORY,
        path="/new/place",
        name="renamed",
        created_at=first.created_at,
        removed_at=None,
    )
    assert store.repositories() == [moved]
    assert store.repository(REPOSITORY) == moved
    assert store.repository(OTHER_REPOSITORY) is None


def test_a_removed_repository_keeps_its_states_and_comes_back(store: Store) -> None:
    anchored(store, 3)
    store.upsert_worktree(REPOSITORY, git_dir="/src/.git", path="/src")

    store.remove_repository(REPOSITORY)
    assert store.repositories() == [] and store.worktrees() == []
    (removed,) = store.repositories(include_removed=True)
    assert removed.removed_at is not None and removed.removed_at > EPOCH

    assert store.add_repository(REPOSITORY, path="/src", name="project").removed_at is None
    assert store.find_state(REPOSITORY, CHECKPOINT, commit_id(2)) is not None


def test_worktrees_are_known_by_their_git_directory(store: Store) -> None:
    register(store)
    main = store.upsert_worktree(REPOSITORY, git_dir="/src/.git", path="/src")
    bare = store.upsert_worktree(REPOSITORY, git_dir="/bare.git", path=None)
    again = store.upsert_worktree(REPOSITORY, git_dir="/src/.git", path="/moved")

    assert again == Worktree(
        id=main.id,
        repository_id=REPOSITORY,
        git_dir="/src/.git",
        path="/moved",
        head_commit=None,
        head_branch=None,
        live_adapter_id=None,
        updated_at=again.updated_at,
    )
    assert again.updated_at > main.updated_at
    assert store.worktrees(REPOSITORY) == [again, bare]
    assert store.find_worktree("/src/.git") == again == store.worktree(main.id)

    store.remove_worktree(main.id)
    assert store.worktrees() == [bare]


def test_a_git_directory_taken_over_by_another_repository_starts_afresh(store: Store) -> None:
    anchored(store)
    register(store, OTHER_REPOSITORY)
    old = store.upsert_worktree(REPOSITORY, git_dir="/src/.git", path="/src")
    store.set_head(old.id, commit_id(1), "main")

    new = store.upsert_worktree(OTHER_REPOSITORY, git_dir="/src/.git", path="/src")

    assert new.repository_id == OTHER_REPOSITORY and new.head_commit is None
    assert store.worktrees() == [new]


def test_set_head_records_commit_and_branch(store: Store) -> None:
    register(store)
    worktree = store.upsert_worktree(REPOSITORY, git_dir="/src/.git", path="/src")

    store.set_head(worktree.id, commit_id(1), "topic")
    seen = store.worktree(worktree.id)
    assert seen is not None and (seen.head_commit, seen.head_branch) == (commit_id(1), "topic")

    store.set_head(worktree.id, None, None)
    seen = store.worktree(worktree.id)
    assert seen is not None and (seen.head_commit, seen.head_branch) == (None, None)


def test_forgetting_a_repository_removes_its_rows_and_no_others(store: Store) -> None:
    for repository_id in (REPOSITORY, OTHER_REPOSITORY):
        anchor = anchored(store, 3, repository_id=repository_id, branch=repository_id)
        git_dir = f"/src/{repository_id}"
        worktree = store.upsert_worktree(repository_id, git_dir=git_dir, path=None)
        state = store.latest_state(anchor.id)
        assert state is not None
        store.publish(worktree.id, new_adapter(state.info.id, f"/adapters/{repository_id}"))
        store.record_failure(repository_id, "embed", "no", worktree_id=worktree.id)
    before = _count_rows(store)

    assert store.forget_repository(REPOSITORY) is True
    assert store.forget_repository(REPOSITORY) is False

    after = _count_rows(store)
    assert {t: (before[t], after[t]) for t in TABLES_OF_A_REPOSITORY} == {
        "repositories": (2, 1),
        "worktrees": (2, 1),
        "anchors": (2, 1),
        "states": (6, 3),
        "adapters": (2, 1),
        "events": (2, 1),
        "failures": (2, 1),
    }
    assert store.find_state(REPOSITORY, CHECKPOINT, commit_id(2, REPOSITORY)) is None
    assert store.find_state(OTHER_REPOSITORY, CHECKPOINT, commit_id(2, OTHER_REPOSITORY))
    # Features belong to no repository; what no state uses any more goes by itself.
    assert store.delete_unused_features(created_before=store._now()) == 2
    assert len(store.get_features(ENCODER, _feature_keys(store))) == 2
    store.check()


def _count_rows(store: Store) -> dict[str, int]:
    with store._reading() as db:
        return {
            table: db.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one()
            for table in TABLES_OF_A_REPOSITORY
        }


def _feature_keys(store: Store) -> list[str]:
    with store._reading() as db:
        return list(db.exec_driver_sql("SELECT key FROM features").scalars())


def test_writers_learn_that_what_they_refer_to_is_gone(store: Store) -> None:
    register(store)

    with pytest.raises(LookupError, match=r"repository \w+ is gone"):
        store.upsert_worktree(OTHER_REPOSITORY, git_dir="/src/.git", path="/src")
    with pytest.raises(LookupError, match="worktree 7 is gone"):
        store.set_head(7, None, None)
    with pytest.raises(LookupError, match=r"repository \w+ is gone"):
        store.add_anchor(OTHER_REPOSITORY, CHECKPOINT, commit_id(0), "active")


@pytest.mark.parametrize("name", [b"/src/caf\xc3\xa9", b"/src/caf\xe9", b"/100%/percent:"])
def test_any_path_comes_back_exactly(store: Store, name: bytes) -> None:
    path = os.fsdecode(name)
    register(store)
    worktree = store.upsert_worktree(REPOSITORY, git_dir=path, path=path)

    found = store.find_worktree(path)
    assert found == worktree
    assert os.fsencode(found.path or "") == os.fsencode(found.git_dir) == name


def test_text_that_no_database_can_keep_is_shown_with_question_marks(store: Store) -> None:
    added = store.add_repository(REPOSITORY, path="/src", name="caf\udce9")
    assert added.name == "caf?"

    failure = store.record_failure(REPOSITORY, "embed", "NUL \0 here")
    assert failure.message == "NUL ? here"
