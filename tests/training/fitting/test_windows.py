from __future__ import annotations

import json
import random

import pytest
from tokenizers import Tokenizer

from code2lora.training.data.bags import Weights
from code2lora.training.data.dataset import RepositoryData
from code2lora.training.fitting.items import IGNORED, ItemBuilder, ItemConfig, collate
from code2lora.training.fitting.windows import Window, WindowConfig, WindowSampler
from code2lora.training.pretraining.tokenizer import FILE_SEP, FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX

WINDOWS = WindowConfig(repositories=2, commits=3, states=3, horizon=6, told_share=(0.4, 0.6))
N_VOCABULARY = 330


def _sampler(
    data: list[RepositoryData], tokenizer: Tokenizer, config: WindowConfig = WINDOWS
) -> WindowSampler:
    items = ItemConfig(max_tokens=48, prefix_tokens=16, suffix_tokens=8)
    builder = ItemBuilder(tokenizer, items)
    return WindowSampler(data, builder, config, n_vocabulary=N_VOCABULARY, seed=5)


def _as_text(window: Window) -> str:
    def weights(values: tuple[Weights, ...]) -> list[object]:
        return [(ids.tolist(), each.tolist()) for ids, each in values]

    snapshot = None if window.snapshot is None else window.snapshot.tolist()
    told = [window.repository, snapshot, weights(window.added), weights(window.removed)]
    return repr([*told, window.items, window.positions])


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
            assert len(window.added) <= 3
            assert all(0 <= position <= len(window.added) for position in window.positions)
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
    """Every row is checked against the cursor that it was drawn for."""
    asked: list[tuple[str, int]] = []
    sampler = _sampler(data, tokenizer)
    draw = sampler._item

    def checked(repository: RepositoryData, cursor, told_up_to: int, rng: random.Random):  # type: ignore[no-untyped-def]
        def choice(targets):  # type: ignore[no-untyped-def]
            for target in targets:
                if target.kind == "commit":
                    assert target.index > told_up_to
                else:
                    assert target.path in cursor.held_out
                    told = repository.told_files(cursor.anchor, cursor.held_out)
                    assert target.file not in {file.text for file in told}
                asked.append((target.kind, target.index))
            return targets[0]

        monkeypatch.setattr(rng, "choice", choice)
        item = draw(repository, cursor, told_up_to, rng)
        monkeypatch.undo()
        return item

    sampler._item = checked  # type: ignore[method-assign]
    for step in range(12):
        sampler.windows(step)

    assert {kind for kind, _ in asked} == {"commit", "file"}


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
