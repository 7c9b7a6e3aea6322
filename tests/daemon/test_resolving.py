"""Which repository a completion is for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from code2lora.daemon.resolving import StoreResolver
from code2lora.errors import UserError
from code2lora.serving.answering import Known
from code2lora.state_store import Store

ONE, TWO, THREE = "1" * 32, "2" * 32, "3" * 32


class Unloaded:
    """Models with an engine that is never asked for an adapter."""

    def loaded_engine(self) -> Unloaded:
        return self

    def adapter(self, path: Path) -> None:
        raise AssertionError(f"{path} was asked for")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(f"sqlite:///{tmp_path / 'state.db'}") as opened:
        yield opened


@pytest.fixture
def resolver(store: Store) -> StoreResolver:
    return StoreResolver(store, cast(Any, Unloaded()))


def follow(store: Store, repository_id: str, path: str, name: str) -> None:
    store.add_repository(repository_id, path=path, name=name)
    store.upsert_worktree(repository_id, git_dir=f"{path}/.git", path=path)


def refused(resolver: StoreResolver, repository: str | None, *files: str) -> tuple[str, str | None]:
    with pytest.raises(UserError) as caught:
        resolver.resolve(repository, None, "own", files)
    return caught.value.message, caught.value.hint


NO_ADAPTER = "the repository has no adapter yet"
"""Said once the repository is known."""


def test_by_id_name_or_not_at_all(resolver: StoreResolver, store: Store) -> None:
    assert refused(resolver, None) == ("no repository is registered", "`code2lora init`")
    follow(store, ONE, "/src/alpha", "alpha")
    for name in (ONE, f"{ONE}:1", "alpha", "alpha:1", None):
        assert refused(resolver, name)[0] == NO_ADAPTER, name
    assert refused(resolver, "beta")[0] == "repository 'beta' is not registered"
    assert resolver.resolve("beta", None, "base") is None


def test_two_are_not_guessed_between(resolver: StoreResolver, store: Store) -> None:
    follow(store, ONE, "/src/alpha", "alpha")
    follow(store, TWO, "/src/beta", "beta")
    assert refused(resolver, None) == (
        "no repository is named",
        "ask for a model such as `...@alpha` or `...@beta`",
    )
    follow(store, THREE, "/old/beta", "beta")
    message, hint = refused(resolver, "beta")
    assert message == "2 repositories are named 'beta'"
    assert hint is not None and TWO in hint and THREE in hint


def test_files_tell_the_repository_they_are_in(resolver: StoreResolver, store: Store) -> None:
    follow(store, ONE, "/src/alpha", "alpha")
    follow(store, TWO, "/src/alpha/vendor/beta", "beta")
    assert resolver._guess(["/src/alpha/a.py", "relative.py"]) == ONE
    assert resolver._guess(["/src/alpha/vendor/beta/b.py"]) == TWO
    for files in (["/src/alphabet/a.py"], ["/src/alpha/a.py", "/src/alpha/vendor/beta/b.py"], []):
        assert refused(resolver, None, *files)[0] == "no repository is named"


def test_the_repositories_that_can_be_asked_for(resolver: StoreResolver, store: Store) -> None:
    follow(store, ONE, "/src/alpha", "alpha")
    follow(store, TWO, "/src/beta", "beta")
    store.remove_repository(TWO)
    assert resolver.known() == [Known(ONE, "alpha")]
