from __future__ import annotations

from dataclasses import replace

import pytest

from code2lora.errors import UserError
from code2lora.serving.completion import CompletionRequest
from code2lora.serving.model import BaseModel, ControlTokens
from code2lora.serving.prompt import CHARACTERS_PER_TOKEN, build_prompt, well_formed


def ids(
    model: BaseModel, prompt: str, suffix: str | None = None, *, room: int = 100, n_new: int = 10
) -> list[int]:
    request = CompletionRequest(prompt=prompt, suffix=suffix, max_tokens=n_new)
    made, allowed = build_prompt(model, request, context_tokens=room)
    assert len(made) + allowed <= room
    return made


def text(model: BaseModel, prompt: str, suffix: str | None = None, *, room: int = 100) -> str:
    return model.decode(ids(model, prompt, suffix, room=room))


def test_fim_puts_the_marks_where_qwen_does(model: BaseModel) -> None:
    c = model.control
    assert ids(model, "def ", "pass") == [
        c.fim_prefix,
        *model.encode("def "),
        c.fim_suffix,
        *model.encode("pass"),
        c.fim_middle,
    ]


def test_an_empty_suffix_means_plain_continuation(model: BaseModel) -> None:
    assert ids(model, "def f", "") == model.encode("def f")


@pytest.mark.parametrize("suffix", [None, "", "ignored"])
def test_a_prompt_that_is_already_fim_passes_through(model: BaseModel, suffix: str | None) -> None:
    prompt = "<|repo_name|>x\n<|file_sep|>a.py\n<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"
    assert ids(model, prompt, suffix) == model.encode(prompt)
    assert model.control.file_sep in model.encode(prompt)


def test_with_a_suffix_the_names_of_control_tokens_are_text(model: BaseModel) -> None:
    prompt = 'END = "<|endoftext|>"\nMARK = "<|fim_prefix|>" + '
    made = ids(model, prompt, "<|fim_middle|>\n")
    assert [i for i in made if i in model.end_ids] == [
        model.control.fim_prefix,
        model.control.fim_suffix,
        model.control.fim_middle,
    ]
    assert (
        model.decode(made) == f"<|fim_prefix|>{prompt}<|fim_suffix|><|fim_middle|>\n<|fim_middle|>"
    )


def test_a_plain_prompt_loses_its_left_part(model: BaseModel) -> None:
    prompt = "".join(f"x{i}\n" for i in range(99))
    made = ids(model, prompt, room=40, n_new=10)
    assert len(made) == 30
    assert prompt.endswith(model.decode(made))


def test_what_competes_for_room_is_cut_three_to_one(model: BaseModel) -> None:
    made = text(model, "7" * 200, "8" * 200, room=43)  # less 10 new and 3 marks: 30
    assert made == f"<|fim_prefix|>{'7' * 23}<|fim_suffix|>{'8' * 7}<|fim_middle|>"


def test_a_cut_keeps_what_is_nearest_to_the_cursor(model: BaseModel) -> None:
    made = text(model, "0123456789" * 20 + "!", "?" + "0123456789" * 20, room=43)
    assert "789!<|fim_suffix|>?012345<|fim_middle|>" in made


@pytest.mark.parametrize(
    ("prefix", "suffix", "n_prefix", "n_suffix"), [(2, 200, 2, 28), (200, 2, 28, 2)]
)
def test_a_short_side_leaves_its_room_to_the_other(
    model: BaseModel, prefix: int, suffix: int, n_prefix: int, n_suffix: int
) -> None:
    made = text(model, "7" * prefix, "8" * suffix, room=43)
    assert (made.count("7"), made.count("8")) == (n_prefix, n_suffix)


def test_a_written_fim_prompt_is_cut_without_losing_its_marks(model: BaseModel) -> None:
    prompt = f"<|repo_name|>head<|fim_prefix|>{'7' * 90}<|fim_suffix|>{'8' * 90}<|fim_middle|>"
    made = text(model, prompt, room=43)
    assert made == f"<|fim_prefix|>{'7' * 23}<|fim_suffix|>{'8' * 7}<|fim_middle|>"


def test_other_files_go_before_any_of_the_prefix(model: BaseModel) -> None:
    prompt = f"<|repo_name|>{'0' * 50}<|fim_prefix|>777<|fim_suffix|>8<|fim_middle|>"
    made = text(model, prompt, room=43)
    assert made == "0" * 26 + "<|fim_prefix|>777<|fim_suffix|>8<|fim_middle|>"


def test_a_long_completion_takes_at_most_half_of_a_full_window(model: BaseModel) -> None:
    request = CompletionRequest(prompt="7" * 500, max_tokens=10_000)
    made, allowed = build_prompt(model, request, context_tokens=100)
    assert (len(made), allowed) == (50, 50)
    made, allowed = build_prompt(model, replace(request, prompt="7" * 9), context_tokens=100)
    assert (len(made), allowed) == (9, 91)


def test_text_far_from_the_cursor_is_not_even_tokenized(
    model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = BaseModel.encode
    monkeypatch.setattr(
        BaseModel, "encode", lambda self, text: seen.append(len(text)) or encode(self, text)
    )
    ids(model, "7" * 1_000_000, "8" * 1_000_000, room=100)
    assert max(seen) == 100 * CHARACTERS_PER_TOKEN


def test_an_empty_prompt_is_the_beginning_of_a_document(model: BaseModel) -> None:
    assert ids(model, "") == [model.tokenizer.token_to_id("<|endoftext|>")]
    with pytest.raises(UserError, match="the prompt is empty"):
        ids(replace(model, separator_id=None), "")


def test_what_the_tokenizer_puts_first_stays_first(model: BaseModel) -> None:
    other = replace(model, begin_ids=(7,))
    assert ids(other, "1" * 200, room=40)[:2] == [7, model.encode("1")[0]]
    assert ids(other, "1", "2")[:2] == [7, model.control.fim_prefix]


def test_a_model_without_fim_tokens_says_so(model: BaseModel) -> None:
    other = replace(model, control=ControlTokens(None, None, None, None, None, None))
    with pytest.raises(UserError) as caught:
        ids(other, "a", "b")
    assert caught.value.message == (
        "this model cannot fill in the middle: its tokenizer has no FIM tokens"
    )
    assert caught.value.hint == "send the prompt without a suffix"
    assert ids(other, "a", "") == model.encode("a")


def test_characters_cut_in_two_by_an_editor_are_mended(model: BaseModel) -> None:
    assert well_formed("a\ud83d\ude00b") == "a😀b"
    assert well_formed("a\ud83d") == "a\ufffd"
    assert model.decode(ids(model, "a\ud83d", "\ude00b")).count("\ufffd") == 2
