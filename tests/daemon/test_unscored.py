"""Which commits are to be scored, and what their own adapter was told, without any model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from code2lora.daemon.looking import unscored
from code2lora.settings import Settings
from code2lora.state_store import Store
from tests.cli.conftest import CHECKPOINT, Known
from tests.daemon.conftest import fill
from tests.gitrepo import GitRepo


@pytest.fixture
def known(tmp_path: Path, repo: GitRepo) -> Iterator[Known]:
    settings = Settings(
        config_dir=tmp_path / "c", state_dir=tmp_path / "s", data_dir=tmp_path / "d"
    )
    settings.prepare()
    with Store.open(settings.resolved_database_url) as store:
        yield Known(settings, store, repo)


def found(known: Known, limit: int = 16, checkpoint: str = CHECKPOINT) -> list[tuple[str, str]]:
    """Return what is found, as (commit, what was told)."""
    pairs = unscored(known.store, known.worktree, checkpoint, limit)
    return [(one.commit, one.told) for one in pairs]


def test_the_newest_ones_down_to_the_anchor_oldest_first(known: Known) -> None:
    commits = fill(known.repo, 6)
    known.absorb(commits[1:])
    assert found(known) == [], "nothing is published"
    known.publish(commits[-1])

    pairs = list(zip(commits[2:], commits[1:], strict=False))
    assert found(known) == pairs
    assert found(known, limit=2) == pairs[-2:]
    assert found(known, limit=0) == []
    assert found(known, checkpoint="another") == []
    known.score([commits[3], commits[5]])
    assert found(known) == [pairs[0], pairs[2]]


def test_what_came_after_the_live_adapter_waits_for_its_own(known: Known) -> None:
    commits = fill(known.repo, 4)
    known.absorb(commits[:3])
    known.publish(commits[2])
    assert [commit for commit, _ in found(known)] == commits[1:3]


def test_the_first_commit_of_all_has_nothing_to_be_scored_by(known: Known) -> None:
    commits = fill(known.repo, 1)
    known.absorb(commits)
    known.publish(commits[0])
    assert found(known) == []


def test_between_steps_the_nearest_state_before_counts(known: Known) -> None:
    commits = fill(known.repo, 6)
    known.absorb(commits, between={1, 2, 4}, provisional={5})
    known.publish(commits[5])
    assert found(known) == [
        (commits[1], commits[0]),
        (commits[2], commits[0]),
        (commits[3], commits[0]),
        (commits[4], commits[3]),
        (commits[5], commits[3]),
    ]
    assert found(known, limit=1) == [(commits[5], commits[3])]
