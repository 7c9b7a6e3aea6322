from __future__ import annotations

import json
from pathlib import Path

import pytest

from code2lora.errors import UserError
from code2lora.training.data import leakage, shards
from code2lora.training.data.leakage import Leak, find_leaks, read_leaks, write_leaks
from code2lora.training.split import bucket, cross_repo_split, in_repo_splits

TRAINED, ALSO_TRAINED, HELD_OUT = (
    next(f"test/{i}" for i in range(start, 999) if (bucket(f"test/{i}") < 8) is trained)
    for start, trained in ((0, True), (200, True), (0, False))
)


def _shard(root: Path, name: str, targets: list[tuple[str, int, str, str]]) -> None:
    """Write a shard of ten commits; targets: kind, index, text above, text of the target."""
    tables = shards.empty_tables()
    splits = in_repo_splits(10)
    for index, split in enumerate(splits):
        shards.append(
            tables["commits"],
            index=index,
            commit=f"{index:040}",
            committed_at_s=index,
            split=split,
            n_added=0,
            n_modified=0,
        )
    for row, (kind, index, above, target) in enumerate(targets):
        text = above + target
        shards.append(tables["files"], blob=f"{row:040}", text=text)
        shards.append(
            tables["targets"],
            kind=kind,
            index=index,
            path=f"{row}.py",
            blob=f"{row:040}",
            start=len(above),
            end=len(text),
            target=None,
            absent=0,
            function=None,
            assertion_type=None,
            event=None,
        )
        same = above.rpartition("\n")[2] + target if kind == "assertion" else target
        pair, digest = leakage.digests(above, target, same)
        shards.append(tables["checks"], pair=pair, same=digest, leaked=False)
    leakage.mark_seen(tables["checks"], tables["targets"], splits)
    shards.write_shard(root, name, tables, {"head": "0" * 40, "settings": {}})


def test_what_a_later_commit_repeats_of_the_training_part_is_marked(tmp_path: Path) -> None:
    above = "import x\n" * 30
    _shard(
        tmp_path,
        TRAINED,
        [
            ("assertion", 0, above + "assert f(1) == ", "2"),
            ("commit", 1, above, "make_widget(alpha)\n"),
            ("assertion", 8, "other\nassert f(1)  == ", "2"),  # the same assertion elsewhere
            ("assertion", 8, above + "assert f(1) == ", "3"),  # another value
            ("commit", 9, "moved\n", "make_widget( alpha )\n"),
            ("commit", 9, "fresh\n", "make_gadget(beta)\n"),
            ("file", 9, above, "make_widget(alpha)\n"),  # never asked here
            ("assertion", 7, above + "assert f(1) == ", "2"),  # training itself may repeat
        ],
    )

    leaks = find_leaks(tmp_path)

    assert leaks.leaks == {
        TRAINED: frozenset(
            {
                Leak("assertion", 8, "2.py", len("other\nassert f(1)  == ")),
                Leak("commit", 9, "4.py", len("moved\n")),
            }
        )
    }
    assert (leaks.n_targets, leaks.n_in_repository, leaks.n_across) == (5, 2, 0)


def test_copies_of_another_repository_are_found_and_common_phrases_are_not(tmp_path: Path) -> None:
    vendored = "".join(f"name_{i} = vendored({i})\n" for i in range(40))
    _shard(
        tmp_path,
        TRAINED,
        [
            ("commit", 0, vendored, "copied(lines)\n"),
            ("assertion", 0, "a = 1\nassert x is ", "None"),
        ],
    )
    _shard(
        tmp_path,
        HELD_OUT,
        [
            ("commit", 0, "changed\n" + vendored.replace("    ", "\t"), "copied(lines)\n"),
            ("assertion", 3, "b = 2\nassert x is ", "None"),
            ("file", 4, "elsewhere\n", "copied(lines)\n"),
        ],
    )
    _shard(tmp_path, ALSO_TRAINED, [("commit", 0, vendored, "copied(lines)\n")])

    leaks = find_leaks(tmp_path)

    assert leaks.leaks == {
        HELD_OUT: frozenset({Leak("commit", 0, "0.py", len("changed\n" + vendored))})
    }
    assert (leaks.n_targets, leaks.n_in_repository, leaks.n_across) == (3, 0, 1)


def test_a_copy_between_two_that_are_trained_on_is_not_asked_of_the_later_commits(
    tmp_path: Path,
) -> None:
    _shard(tmp_path, TRAINED, [("commit", 9, "above\n", "copied(lines)\n")])
    assert not find_leaks(tmp_path).leaks  # its own row does not give it away

    _shard(tmp_path, ALSO_TRAINED, [("commit", 2, "above\n", "copied(lines)\n")])
    assert set(find_leaks(tmp_path).leaks) == {TRAINED}


def test_what_was_found_is_kept_and_found_again_without_its_file(tmp_path: Path) -> None:
    _shard(
        tmp_path,
        TRAINED,
        [("commit", 0, "above\n", "again()\n"), ("commit", 9, "above\n", "again()\n")],
    )

    written = write_leaks(tmp_path)

    assert read_leaks(tmp_path) == written
    first = (tmp_path / leakage.FILE).read_bytes()
    write_leaks(tmp_path)
    assert (tmp_path / leakage.FILE).read_bytes() == first
    (tmp_path / leakage.FILE).unlink()
    assert read_leaks(tmp_path) == written


def test_a_damaged_file_is_a_user_error(tmp_path: Path) -> None:
    for content in ("{", json.dumps({"leaks": {}}), "[]"):
        (tmp_path / leakage.FILE).write_text(content)
        with pytest.raises(UserError, match="cannot read"):
            read_leaks(tmp_path)


def test_commits_are_split_in_time_and_repositories_by_name() -> None:
    for n, expected in ((0, ""), (1, "t"), (2, "tt"), (3, "tvx"), (5, "tttvx"), (19, None)):
        splits = in_repo_splits(n)
        letters = "".join({"train": "t", "ir_val": "v", "ir_test": "x"}[each] for each in splits)
        assert letters == ("t" * 15 + "v" + "xxx" if expected is None else expected)
    assert {cross_repo_split(f"test/{i}") for i in range(99)} == {"train", "cr_val", "cr_test"}
    assert all(
        (cross_repo_split(f"A/{i}") == "cr_test") is (bucket(f"a/{i}") == 9) for i in range(99)
    )
