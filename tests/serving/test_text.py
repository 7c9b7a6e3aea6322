from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from code2lora.serving.model import BaseModel
from code2lora.serving.text import StopFilter, TextDecoder


def pieces_of(model: BaseModel, ids: list[int], context: list[int]) -> list[str]:
    decoder = TextDecoder(model.decode, context)
    return [decoder.push(token) for token in ids]


def test_an_emoji_comes_in_one_piece(model: BaseModel) -> None:
    ids = model.encode("a 😀é!")
    assert len(ids) == 1 + 1 + 4 + 2 + 1, "the emoji is four tokens, or this tests nothing"
    shown = [piece for piece in pieces_of(model, ids, model.encode("x")) if piece]
    assert shown == ["a", " ", "😀", "é", "!"]


@settings(deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\ufffd")),
    before=st.text(st.characters(exclude_categories=("Cs",)), max_size=3),
)
def test_pieces_join_to_the_text_and_none_is_broken(
    model: BaseModel, text: str, before: str
) -> None:
    ids = model.encode_text(text)
    pieces = pieces_of(model, ids, model.encode_text(before)[-1:])
    assert "".join(pieces) == model.decode(ids)
    assert "\ufffd" not in "".join(pieces)


@settings(deadline=None)
@given(data=st.data())
def test_every_prefix_of_the_tokens_shows_a_prefix_of_the_text(
    model: BaseModel, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, 255), max_size=40))  # mostly broken bytes
    shown = list(accumulate(pieces_of(model, ids, [])))
    assert all(model.decode(ids).startswith(text) for text in shown)
    unfinished = model.decode(ids).removeprefix(shown[-1] if shown else "")
    assert set(unfinished) <= {"\ufffd"}


def test_an_unfinished_character_at_the_end_is_not_shown(model: BaseModel) -> None:
    assert pieces_of(model, model.encode("é😀")[:-1], []) == ["", "é", "", "", ""]


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    stop_filter = StopFilter(stops)
    shown = [stop_filter.push(piece) for piece in pieces]
    return [*shown, stop_filter.finish()], stop_filter.stopped


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "stopped"),
    [
        (["\n\n"], ["a\n", "\nb", "c"], ["a", "", "", ""], True),
        (["\n\n"], ["a\n", "b\n"], ["a", "\nb", "\n"], False),
        (["end"], ["the e", "nd of"], ["the ", "", ""], True),
        (["end"], ["the e", "mpty"], ["the ", "empty", ""], False),
        (["cd", "bcx"], ["ab", "cd"], ["a", "b", ""], True),
        (["", "b"], ["ab"], ["a", ""], True),
        ([], ["ab", "c"], ["ab", "c", ""], False),
    ],
)
def test_stop_strings_that_span_pieces(
    stops: list[str], pieces: list[str], shown: list[str], stopped: bool
) -> None:
    assert run(stops, pieces) == (shown, stopped)


@settings(deadline=None)
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("ab", max_size=5), max_size=8),
)
def test_the_text_ends_before_the_first_stop_however_it_is_cut(
    stops: list[str], pieces: list[str]
) -> None:
    shown, stopped = run(stops, pieces)
    text = "".join(pieces)
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))]
    assert stopped == bool(ends)
    if ends:
        whole = text[: ends[0]]
        text = min((whole.removesuffix(s) for s in stops if whole.endswith(s)), key=len)
    assert "".join(shown) == text
