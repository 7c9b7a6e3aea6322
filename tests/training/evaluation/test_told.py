from __future__ import annotations

import pygit2
from hypothesis import given
from hypothesis import strategies as st

from code2lora.training.data.dataset import RepositoryData
from code2lora.training.data.shards import Shard
from code2lora.training.evaluation.told import apply_patch, told_texts

TEXT = st.builds(
    lambda lines, end: "\n".join(lines) + end,
    st.lists(st.sampled_from(["a", "b", "", "-c", "+d", "@@ e", "f\r", "\\ g", " h"]), max_size=30),
    st.sampled_from(["", "\n"]),
)


@given(TEXT, TEXT)
def test_a_patch_makes_the_new_text_of_the_old_one(old: str, new: str) -> None:
    patch = pygit2.Patch.create_from(old, new)
    assert apply_patch(old, patch.data.decode()) == new


def test_a_patch_that_does_not_fit_is_refused() -> None:
    patch = pygit2.Patch.create_from("a\nb\n", "a\nc\n").data.decode()
    assert apply_patch("a\nx\n", patch) is None
    assert apply_patch("", patch) is None


def test_replayed_files_are_those_of_the_next_snapshot(
    data: list[RepositoryData], shards: list[Shard]
) -> None:
    for shard, each in zip(shards, data, strict=True):
        changes = shard.table("changes")
        first, second = each.anchors[:2]
        without = RepositoryData.__new__(RepositoryData)
        without.__dict__.update(each.__dict__, anchors=[first])  # as if it had no later snapshot

        replayed = told_texts(without, changes, first, second, frozenset())

        assert replayed == {file.path: each.texts[file.text] for file in each.files(second)}
        assert replayed != told_texts(each, changes, first, first, frozenset())


def test_what_is_held_out_is_never_told(data: list[RepositoryData], shards: list[Shard]) -> None:
    each, changes = data[0], shards[0].table("changes")
    hidden = each.files(each.anchors[0])[0].path

    told = told_texts(each, changes, each.anchors[0], each.n_commits - 1, frozenset({hidden}))

    assert told and hidden not in told
