"""Turn a written text and the wanted one into scores from 0 to 1; strings alone, no models.

Two protocols, side by side. `ours` treats every prediction alike: as many lines as were asked for,
white space collapsed, and nothing else is learnt from the reference. `paper` is the published
harness's, for comparison with its figures: it cuts a prediction at its first `#`, and at commas and
spaces where the reference has none, so a model that writes too much is helped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher

from code2lora.training.evaluation.codebleu import codebleu

METRICS = ("exact_match", "edit_similarity", "codebleu")
PROTOCOLS = ("ours", "paper")

_FIM_MARKERS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Written:
    """The scores of one prediction under one protocol."""

    exact_match: float
    edit_similarity: float
    codebleu: float


def score(prediction: str, reference: str, protocol: str, *, python: bool = True) -> Written:
    """Return the scores of a prediction.

    protocol: one of PROTOCOLS   python: whether the reference is Python, which CodeBLEU parses
    """
    if protocol == "paper":
        wanted = paper_reference(reference)
        found = paper_prediction(prediction, reference)
        equal = paper_normal(found) == paper_normal(wanted)
    else:
        wanted, found = reference.strip(), first_lines(prediction, reference.strip()).strip()
        equal = normal(found) == normal(wanted)
    if not wanted:
        # A comment, of which the paper's rules leave nothing: every comment would be right.
        return Written(0.0, 0.0, 0.0)
    return Written(
        float(equal),
        edit_similarity(found, wanted),
        codebleu(found, wanted, python=python),
    )


def n_lines(reference: str) -> int:
    """Return how many lines a reference asks for; white space around it does not count."""
    return reference.strip().count("\n") + 1


def first_lines(prediction: str, reference: str) -> str:
    """Return as many lines of a prediction as the reference has, from its first text on."""
    lines = prediction.lstrip("\r\n").split("\n")
    return "\n".join(lines[: n_lines(reference)])


def normal(text: str) -> str:
    """Return what `ours` compares: white space collapsed, no punctuation at the end of text."""
    collapsed = _SPACE.sub(" ", text.strip())
    return collapsed.rstrip(",;: ") or collapsed


def edit_similarity(prediction: str, reference: str) -> float:
    """Return difflib's ratio of two texts; two empty ones are equal.

    The published figures are difflib's. Faster libraries compute the ratio of another distance.
    """
    return SequenceMatcher(None, prediction, reference).ratio()


def paper_reference(reference: str) -> str:
    """Return the reference as the paper's protocol compares it: cut at its first `#`, stripped."""
    return reference.split("#", 1)[0].strip()


def paper_prediction(prediction: str, reference: str) -> str:
    """Return a prediction as the paper's protocol compares it; the reference decides what is cut.

    In its order: FIM markers out; the first line alone for a reference of one line; cut at the
    first `#`; cut at the first comma where the reference has none; the first word where the
    reference is one word.
    """
    for marker in _FIM_MARKERS:
        prediction = prediction.replace(marker, "")
    if "\n" not in reference.strip():
        prediction = prediction.strip().split("\n", 1)[0]
    prediction = prediction.split("#", 1)[0].strip()
    wanted = paper_reference(reference)
    if "," not in wanted:
        prediction = prediction.split(",", 1)[0].strip()
    found = prediction.split()
    if len(wanted.split()) == 1 and len(found) > 1:
        prediction = found[0]
    return prediction


def paper_normal(text: str) -> str:
    """Return what the paper's protocol tests for equality."""
    text = text.strip().rstrip(":, \t").replace(", ", ",").replace(" ,", ",")
    return _SPACE.sub(" ", text)
