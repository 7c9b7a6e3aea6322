from __future__ import annotations

from dataclasses import replace

import pytest

from code2lora.training.data.dataset import RepositoryData, Target
from code2lora.training.data.shards import Rows, Shard
from code2lora.training.evaluation.evaluate import EvaluateConfig, held_out_files
from code2lora.training.evaluation.suites import (
    CROSS_REPO,
    IN_REPO,
    OUT_OF_TIME,
    SUITES,
    first_evaluated,
    suite_cases,
)

CONFIG = EvaluateConfig(
    recent_commits=3, replay_commits=1, out_of_time_gap=2, file_items=3, commit_items=4
)


def nothing_leaked(data: RepositoryData, target: Target) -> bool:
    return False


class OtherShard(Shard):
    """A shard whose table of commits is another."""

    commits: Rows

    def table(self, name: str) -> Rows:
        return self.commits if name == "commits" else super().table(name)


def with_split(shard: Shard, split: list[str] | None) -> Shard:
    other = OtherShard(shard.name, shard.path, shard.manifest)
    columns = {k: v for k, v in shard.table("commits").items() if k != "split"}
    object.__setattr__(other, "commits", columns | ({} if split is None else {"split": split}))
    return other


def test_cross_repo_asks_what_comes_next_and_what_was_left_out(
    data: list[RepositoryData], shards: list[Shard]
) -> None:
    cases = suite_cases(CROSS_REPO, shards, data, CONFIG, nothing_leaked)

    assert [case.name for case in cases] == [each.name for each in data]
    for case in cases:
        assert case.told_up_to == case.data.n_commits - 1 - 3
        assert case.held_out == held_out_files(case.data, case.anchor, CONFIG)
        told = case.told()
        for question in case.questions:
            if question.kind == "file":
                assert question.path in case.held_out and question.path not in told
                assert question.distance == 0
            else:
                assert question.distance == question.index - case.told_up_to
                assert 1 <= question.distance <= 3
            assert question.target.strip()
            assert not question.prefix.endswith(question.target)
        kinds = [question.kind for question in case.questions]
        assert kinds.count("file") <= 3 and 1 <= kinds.count("commit") <= 4


def test_out_of_time_asks_long_after_what_was_told(
    data: list[RepositoryData], shards: list[Shard]
) -> None:
    cases = suite_cases(OUT_OF_TIME, shards, data, CONFIG, nothing_leaked)

    assert cases
    for case in cases:
        assert case.told_up_to == case.data.n_commits - 1 - 3 - 2
        assert not case.held_out
        assert {question.kind for question in case.questions} <= {"commit", "assertion"}
        assert all(question.distance >= 2 for question in case.questions)
    # A history that is too short for the gap is left out.
    far = replace(CONFIG, out_of_time_gap=100)
    assert suite_cases(OUT_OF_TIME, shards, data, far, nothing_leaked) == []


def test_in_repo_asks_what_training_left_alone(
    data: list[RepositoryData], shards: list[Shard]
) -> None:
    n = data[0].n_commits
    split = ["train"] * (n - 4) + ["ir_val"] * 2 + ["ir_test"] * 2
    split_shards = [with_split(shard, split) for shard in shards]

    cases = suite_cases(IN_REPO, split_shards, data, CONFIG, nothing_leaked)

    assert cases
    for case in cases:
        assert case.told_up_to == n - 5
        assert all(question.index >= n - 4 for question in case.questions)


def test_without_a_split_the_last_fifth_is_asked(shards: list[Shard]) -> None:
    assert first_evaluated(with_split(shards[0], None)) == int(9 * 0.8)
    assert first_evaluated(with_split(shards[0], ["train"] * 9)) == 9


def test_a_repository_that_is_all_training_is_not_asked(
    data: list[RepositoryData], shards: list[Shard]
) -> None:
    every = [
        with_split(shard, ["train"] * shard_data.n_commits)
        for shard, shard_data in zip(shards, data, strict=True)
    ]
    assert suite_cases(IN_REPO, every, data, CONFIG, nothing_leaked) == []


@pytest.mark.parametrize("suite", SUITES)
def test_a_leaked_target_is_never_asked(
    suite: str, data: list[RepositoryData], shards: list[Shard]
) -> None:
    before = suite_cases(suite, shards, data, CONFIG, nothing_leaked)
    victim = before[0].questions[0]

    def leaked(repository: RepositoryData, target: Target) -> bool:
        text = repository.texts[target.file]
        return text[: target.start] == victim.prefix and target.path == victim.path

    after = suite_cases(suite, shards, data, CONFIG, leaked)

    left = [q for case in after if case.name == before[0].name for q in case.questions]
    assert victim not in left
    assert suite_cases(suite, shards, data, CONFIG, lambda *_: True) == []


@pytest.mark.parametrize("suite", SUITES)
def test_the_seed_fixes_the_questions(
    suite: str, data: list[RepositoryData], shards: list[Shard]
) -> None:
    one, again = (suite_cases(suite, shards, data, CONFIG, nothing_leaked) for _ in range(2))
    other = suite_cases(suite, shards, data, replace(CONFIG, seed=2), nothing_leaked)

    assert [case.key() for case in one] == [case.key() for case in again]
    assert [case.key() for case in one] != [case.key() for case in other]
