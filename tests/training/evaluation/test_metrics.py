from __future__ import annotations

import math
from difflib import SequenceMatcher

import pytest
from hypothesis import given
from hypothesis import strategies as st

from code2lora.training.evaluation.codebleu import codebleu
from code2lora.training.evaluation.metrics import (
    edit_similarity,
    first_lines,
    n_lines,
    paper_prediction,
    paper_reference,
    score,
)

CODE = st.text(alphabet="ab1(),.# =\n<|fim_prefix|>", max_size=30)
LINE = st.text(alphabet="ab1(),. =", min_size=1, max_size=20).filter(lambda text: text.strip())


@pytest.mark.parametrize(
    ("prediction", "reference", "ours", "paper"),
    [
        ("foo(1)", "foo(1)", 1, 1),
        ("  foo( 1 )  ", "foo( 1 )", 1, 1),
        ("a + f(1, 2)", "a + f(1,2)", 0, 1),  # only the paper's rule joins at commas
        ("f(1, 2)", "f(1,2)", 0, 0),  # and it keeps the first word, as the reference is one
        ("x  ==\t1", "x == 1", 1, 1),
        ("value:", "value", 1, 1),
        ("value;", "value", 1, 0),
        ("1\nmore = 2", "1", 1, 1),
        ("1\nmore = 2", "1\nless = 2", 0, 0),
        ("True, msg", "True", 0, 1),  # cut at a comma that the reference has not
        ("True or False", "True", 0, 1),  # cut to one word, as the reference is one
        ("True # why", "True", 0, 1),
        ("x['#']", "x['#']", 1, 1),
        ("x['#1']", "x['#2']", 0, 1),  # cut inside a string, on both sides
        ("<|fim_suffix|>True", "True", 0, 1),
        ("", "True", 0, 0),
        ("# one", "# two", 0, 0),  # the paper's rules would leave nothing to compare
        ("", ":", 0, 1),
    ],
)
def test_exact_match_of_both_protocols(
    prediction: str, reference: str, ours: int, paper: int
) -> None:
    assert score(prediction, reference, "ours").exact_match == ours
    assert score(prediction, reference, "paper").exact_match == paper


def test_as_many_lines_count_as_were_asked_for() -> None:
    assert n_lines("\n  a\n  b\n") == 2
    assert first_lines("\n\n  a\n  c\n  d", "a\nb") == "  a\n  c"
    assert score("a\nb\nc", "a\nb\n", "ours").exact_match == 1


def test_edit_similarity_is_difflibs() -> None:
    assert edit_similarity("abcd", "bcde") == pytest.approx(2 * 3 / 8)
    assert edit_similarity("", "") == 1
    # Where the longest common subsequence says 4 of 8, difflib's blocks find 3.
    assert edit_similarity("tide", "diet") == SequenceMatcher(None, "tide", "diet").ratio()


@given(CODE, LINE, LINE)
def test_our_rules_learn_nothing_from_the_reference_but_its_lines(
    prediction: str, one: str, other: str
) -> None:
    assert first_lines(prediction, one) == first_lines(prediction, other)
    # What follows the asked lines changes nothing.
    whole = first_lines(prediction, one)
    assert score(whole + "\nmore", one, "ours") == score(whole, one, "ours") or not whole.strip()


@given(CODE, LINE)
def test_the_papers_rules_cut_and_never_add(prediction: str, reference: str) -> None:
    cut = paper_prediction(prediction, reference)
    assert paper_prediction(cut, reference) == cut or "<|" in prediction
    assert "#" not in cut
    if "," not in reference:
        assert "," not in cut
    if len(reference.split()) == 1:
        assert len(cut.split()) <= 1


@given(LINE)
def test_the_reference_itself_is_always_right(reference: str) -> None:
    for protocol in ("ours", "paper"):
        found = score(reference, reference, protocol)
        assert found.exact_match == 1
        assert 0 <= found.codebleu <= 1
    assert score(reference, reference, "ours").edit_similarity == 1
    assert paper_reference(reference) == paper_prediction(reference, reference)


def test_codebleu_of_a_case_worked_out_by_hand() -> None:
    # unigrams 2 of 3; bigrams (1 + 1) of (2 + 1); trigrams (0 + 1) of (1 + 1); 4-grams 1 of 1
    bleu = math.prod([2 / 3, 2 / 3, 1 / 2, 1]) ** (1 / 4)
    assert codebleu("a = b", "a = c", python=False) == pytest.approx(bleu)
    # The trees and the data flow are the same: one variable comes from another.
    assert codebleu("a = b", "a = c") == pytest.approx((2 * bleu + 1 + 1) / 4)
    # `a = a` has other data flow and the same tree.
    same = codebleu("a = a", "a = c")
    assert same == pytest.approx((2 * bleu + 1 + 0) / 4)


def test_codebleu_weighs_keywords() -> None:
    # unigrams: `return` is right and weighs 1, the name is wrong and weighs 0.2
    plain = math.prod([1 / 2, 1 / 2, 1, 1]) ** (1 / 4)
    weighted = math.prod([1 / 1.2, 1 / 2, 1, 1]) ** (1 / 4)
    found = codebleu("return b", "return c", python=False)
    assert found == pytest.approx((plain + weighted) / 2)


def test_codebleu_of_too_short_a_prediction_is_less() -> None:
    whole, short = "f(a, b, c)", "f(a"
    assert codebleu(short, whole, python=False) < math.exp(1 - 8 / 3) + 1e-9


@pytest.mark.parametrize("text", ["(" * 300, "not " * 900 + "x", "\0", "a\\'b", "-" * 700 + "x"])
def test_codebleu_survives_what_no_parser_likes(text: str) -> None:
    assert 0 <= codebleu(text, "x = 1") <= 1
    assert 0 <= codebleu("x = 1", text) <= 1


def test_codebleu_ends() -> None:
    assert codebleu("", "x") == codebleu("x", " ") == 0
    assert codebleu(" x = 1\n", "x = 1") == 1
