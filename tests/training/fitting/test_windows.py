from __future__ import annotations

import json
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from code2lora.errors import UserError
from code2lora.hypernetwork.encoder_lines import LinesEncoder
from code2lora.training.data.dataset import LINES, RepositoryData, Target
from code2lora.training.data.features import Features
from code2lora.training.fitting.inputs import FrozenInputs, LexicalInputs
from code2lora.training.fitting.items import IGNORED, ItemBuilder, ItemConfig, collate
from code2lora.training.fitting.teacher import Teacher
from code2lora.training.fitting.windows import Window, WindowConfig, WindowSampler, _Draw
from code2lora.training.pretraining.tokenizer import (
    END_OF_TEXT,
    FILE_SEP,
    FIM_MIDDLE,
    FIM_PREFIX,
    FIM_SUFFIX,
)

WINDOWS = WindowConfig(repositories=2, commits=3, states=3, horizon=6, told_share=(0.4, 0.6))


def _sampler(
    data: list[RepositoryData],
    tokenizer: Tokenizer,
    config: WindowConfig = WINDOWS,
    *,
    frozen: bool = False,
    teacher: bool = False,
) -> WindowSampler:
    items = ItemConfig(max_tokens=48, prefix_tokens=16, suffix_tokens=8)
    builder = ItemBuilder(tokenizer, items)
    encoder = LinesEncoder(tokenizer, torch.zeros(tokenizer.get_vocab_size(), 2), LINES)
    inputs = FrozenInputs(3, 5) if frozen else LexicalInputs(encoder)
    shown = Teacher(builder, n_tokens=16) if teacher else None
    return WindowSampler(data, builder, config, inputs=inputs, seed=5, teacher=shown)


def _as_text(window: Window) -> str:
    diffs = [[(ids.tolist(), w.tolist()) for ids, w in diff] for diff in window.diffs]
    snapshot = None if window.snapshot is None else window.snapshot.tolist()
    return repr([window.place, window.repository, snapshot, diffs, window.items, window.positions])


def test_a_restored_sampler_goes_on_as_if_never_stopped(
    data: list[RepositoryData], tokenizer: Tokenizer
) -> None:
    whole = _sampler(data, tokenizer)
    expected = [[_as_text(w) for w in whole.windows(step)] for step in range(12)]

    first = _sampler(data, tokenizer)
    found = [[_as_text(w) for w in first.windows(step)] for step in range(5)]
    second = _sampler(data, tokenizer)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [[_as_text(w) for w in second.windows(step)] for step in range(5, 12)]

    assert found == expected


def test_windows_of_a_step_are_of_different_repositories_and_all_get_their_turn(
    data: list[RepositoryData], tokenizer: Tokenizer
) -> None:
    sampler = _sampler(data, tokenizer)

    steps = [[window.repository for window in sampler.windows(step)] for step in range(12)]

    assert all(len(set(step)) == 2 for step in steps)
    assert {repository for step in steps for repository in step} == {0, 1, 2}


def test_a_window_goes_on_where_the_last_one_ended(
    data: list[RepositoryData], tokenizer: Tokenizer
) -> None:
    config = WindowConfig(repositories=3, commits=3, states=2, restart_share=0.0)
    sampler = _sampler(data, tokenizer, config)
    ends: dict[int, int] = {}
    n_continued = 0
    for step in range(8):
        windows = sampler.windows(step)
        cursors = {int(k): v[1] for k, v in sampler.state_dict().items()}
        for window in windows:
            if window.snapshot is None:
                n_continued += 1
                expected = min(ends[window.repository] + 3, data[window.repository].n_commits - 1)
                assert cursors[window.repository] == expected
                assert 0 not in window.positions
            ends[window.repository] = cursors[window.repository]
            assert len(window.diffs) <= 3
            assert all(0 <= position <= len(window.diffs) for position in window.positions)
    assert n_continued > 3


def test_the_state_at_a_snapshot_is_always_asked(
    data: list[RepositoryData], tokenizer: Tokenizer
) -> None:
    config = WindowConfig(repositories=3, commits=3, states=2, restart_share=1.0)
    sampler = _sampler(data, tokenizer, config)

    windows = [window for step in range(4) for window in sampler.windows(step)]

    assert all(window.snapshot is not None for window in windows)
    assert sum(0 in window.positions for window in windows) == len(windows)


def test_what_is_asked_is_never_told(
    data: list[RepositoryData], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row is checked against the window that it was drawn for."""
    asked: set[str] = set()
    told: set[int] = set()
    sampler = _sampler(data, tokenizer)
    draw = _Draw.target

    def checked(self: _Draw, position: int) -> Target | None:
        target = draw(self, position)
        if target is not None and target.kind == "commit":
            assert target.index > self.begin.index + position
        elif target is not None:
            assert target.path in self.begin.held_out
            files = self._data.told_files(self.begin.anchor, self.begin.held_out)
            assert target.file not in {file.text for file in files}
        asked.update([] if target is None else [target.kind])
        told.add(position)
        return target

    monkeypatch.setattr(_Draw, "target", checked)
    for step in range(12):
        sampler.windows(step)

    assert asked == {"commit", "file"}
    assert len(told) > 2


def test_inputs_that_cannot_hold_out_are_asked_for_later_commits_only(
    data: list[RepositoryData], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in data:
        snapshots = {anchor: torch.ones(3) for anchor in each.anchors}
        monkeypatch.setattr(each, "features", Features(torch.ones(each.n_commits, 5), snapshots))
    sampler = _sampler(data, tokenizer, frozen=True)
    kinds: set[str] = set()
    draw = _Draw.target

    def noted(self: _Draw, position: int) -> Target | None:
        target = draw(self, position)
        if target is not None:
            assert target.index > self.begin.index + position
            kinds.add(target.kind)
        return target

    monkeypatch.setattr(_Draw, "target", noted)
    windows = [window for step in range(8) for window in sampler.windows(step)]

    assert kinds == {"commit"}
    assert all(cursor[2] == [] for cursor in sampler.state_dict().values())
    assert any(window.items for window in windows)


def test_some_places_of_a_step_are_those_of_all(
    data: list[RepositoryData], tokenizer: Tokenizer
) -> None:
    config = WindowConfig(repositories=3, commits=3, states=3, horizon=6)
    whole, part = (_sampler(data, tokenizer, config) for _ in range(2))

    for step in range(6):
        expected = [_as_text(window) for window in whole.windows(step)]
        found = [_as_text(window) for window in part.windows(step, [step % 3])]
        assert found == [expected[step % 3]]
    assert part.state_dict() == whole.state_dict()


def test_a_window_without_commits_always_begins_at_a_snapshot(
    data: list[RepositoryData], tokenizer: Tokenizer
) -> None:
    config = WindowConfig(repositories=2, commits=0, items_per_state=3, restart_share=0.0)
    sampler = _sampler(data, tokenizer, config)

    windows = [window for step in range(6) for window in sampler.windows(step)]

    assert all(window.snapshot is not None and not window.diffs for window in windows)
    assert {p for window in windows for p in window.positions} == {0}
    assert max(len(window.items) for window in windows) == 3


def test_what_a_teacher_shows_stands_in_front_and_was_told(
    data: list[RepositoryData], tokenizer: Tokenizer
) -> None:
    config = WindowConfig(
        repositories=2, commits=3, states=3, taught_share=1.0, told_share=(0.5, 0.6), horizon=6
    )
    sampler = _sampler(data, tokenizer, config, teacher=True)

    windows = [window for step in range(8) for window in sampler.windows(step)]

    pairs = [pair for w in windows for pair in zip(w.items, w.taught, strict=True)]
    taught = [(item, shown) for item, shown in pairs if shown is not None]
    assert len(taught) > len(pairs) / 2
    for item, shown in taught:
        assert shown.ids[-len(item.ids) :] == item.ids
        assert shown.n_asked == item.n_asked
        text = tokenizer.decode(list(shown.ids[: -len(item.ids)]), skip_special_tokens=False)
        assert text.startswith(FILE_SEP) and text.endswith(FILE_SEP)
        assert ".py\n" in text


def test_too_few_repositories_are_refused(data: list[RepositoryData], tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="1 repositories, but a step takes 2"):
        _sampler(data[:1], tokenizer)


def test_a_continuation_asks_for_the_span_alone(tokenizer: Tokenizer) -> None:
    config = ItemConfig(
        max_tokens=64, prefix_tokens=6, suffix_tokens=6, header_share=0.0, hole_share=0.0
    )
    text = "def amber():\n    pass\nanchor = make_almond(1)\nrest\n"
    start, end = text.index("anchor"), text.index("rest")

    item = ItemBuilder(tokenizer, config).completion(text, "a.py", start, end, random.Random(1))

    assert item is not None
    assert item.n_given == 6
    assert text[:start].endswith(tokenizer.decode(list(item.ids[: item.n_given])))
    assert tokenizer.decode(list(item.ids[item.n_given :])) == text[start:end]


def test_a_hole_has_prefix_suffix_and_middle_in_the_base_models_order(tokenizer: Tokenizer) -> None:
    config = ItemConfig(
        max_tokens=96, prefix_tokens=30, suffix_tokens=30, header_share=1.0, hole_share=1.0
    )
    text = "amber = 1\nanchor = 2\nalmond = 3\n"

    item = ItemBuilder(tokenizer, config).completion(text, "a.py", 10, 21, random.Random(1))

    assert item is not None
    assert tokenizer.decode(list(item.ids), skip_special_tokens=False) == (
        f"{FILE_SEP}a.py\n{FIM_PREFIX}amber = 1\n{FIM_SUFFIX}almond = 3\n{FIM_MIDDLE}anchor = 2\n"
    )
    assert tokenizer.decode(list(item.ids[item.n_given :])) == "anchor = 2\n"


def test_text_that_spells_a_control_token_is_not_asked_for(tokenizer: Tokenizer) -> None:
    builder = ItemBuilder(tokenizer, ItemConfig())
    text = f"x = '{FIM_MIDDLE}'\n"

    assert builder.chunk(text, "a.py", 0, random.Random(1)) is None
    assert builder.completion(text, "a.py", 0, len(text), random.Random(1)) is None


def test_collated_labels_are_the_asked_tokens(tokenizer: Tokenizer) -> None:
    config = ItemConfig(max_tokens=12, prefix_tokens=4, suffix_tokens=4, header_share=0.0)
    builder = ItemBuilder(tokenizer, config)
    items = [
        item
        for text in ("amber\n", "anchor = almond\nanchor = almond\nanchor = almond\n")
        if (item := builder.chunk(text, "a.py", 0, random.Random(1))) is not None
    ]

    tokens, labels = collate(items)

    assert tokens.shape == labels.shape == (2, 12)
    for row, item in enumerate(items):
        asked = labels[row][labels[row] != IGNORED].tolist()
        assert asked == list(item.ids[item.n_given :])
        assert labels[row, 0] == IGNORED


def test_a_row_without_room_for_what_is_asked_is_refused() -> None:
    with pytest.raises(ValueError, match="more than three quarters of max_tokens 64"):
        ItemConfig(max_tokens=64)


def test_an_assertion_is_asked_after_the_text_above_and_then_the_end(tokenizer: Tokenizer) -> None:
    builder = ItemBuilder(tokenizer, ItemConfig(max_tokens=24, prefix_tokens=8, suffix_tokens=4))
    text = "def test_amber():\n" * 9 + "    assert anchor(1) == almond\n"
    start = text.index("almond")

    item = builder.assertion(text, start, "almond")

    assert item is not None
    assert len(item.ids) == 24
    assert text[:start].endswith(tokenizer.decode(list(item.ids[: item.n_given])))
    asked = tokenizer.decode(list(item.ids[item.n_given :]), skip_special_tokens=False)
    assert asked == f"almond{END_OF_TEXT}"


def test_an_answer_that_leaves_no_room_for_the_text_above_is_not_asked(
    tokenizer: Tokenizer,
) -> None:
    builder = ItemBuilder(tokenizer, ItemConfig(max_tokens=24, prefix_tokens=8, suffix_tokens=4))

    assert builder.assertion("x = ", 4, "anchor almond " * 12) is None
    assert builder.assertion("x = ", 4, "") is None


def test_a_tokenizer_without_holes_and_separators_is_asked_plain_continuations() -> None:
    words = {"</s>": 0, "<unk>": 1, "a": 2, "b": 3, "c": 4, "d": 5}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = ItemConfig(
        max_tokens=16, prefix_tokens=8, suffix_tokens=4, hole_share=1.0, header_share=1.0
    )
    builder = ItemBuilder(plain, config)

    item = builder.completion("a b c d", "a.py", 4, 5, random.Random(1))
    assertion = builder.assertion("a b", 3, "c")

    assert not builder.has_holes
    assert item is not None and item.ids == (2, 3, 4) and item.n_given == 2
    assert assertion is not None and assertion.ids == (2, 3, 4, 0)


def test_a_tokenizer_without_an_end_is_a_user_error() -> None:
    plain = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))

    with pytest.raises(UserError, match="no token that ends a text"):
        ItemBuilder(plain, ItemConfig())
    assert ItemBuilder(plain, ItemConfig(), end_id=0).assertion("a" * 9, 9, "b") is not None


@pytest.mark.parametrize("from_first", [True, False])
def test_a_window_of_frozen_features_begins_where_commits_follow(
    from_first: bool,
    data: list[RepositoryData],
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for each in data:
        anchors = [0, 2, each.n_train - 1]
        snapshots = {anchor: torch.ones(3) for anchor in anchors}
        monkeypatch.setattr(each, "anchors", anchors)
        monkeypatch.setattr(each, "features", Features(torch.ones(each.n_commits, 5), snapshots))
    config = WindowConfig(repositories=3, commits=3, restart_share=1.0, from_first=from_first)
    sampler = _sampler(data, tokenizer, config, frozen=True)

    begun = set()
    for step in range(9):
        assert all(window.diffs for window in sampler.windows(step))
        begun |= {anchor for anchor, *_ in sampler.state_dict().values()}

    assert begun == ({0} if from_first else {0, 2})
