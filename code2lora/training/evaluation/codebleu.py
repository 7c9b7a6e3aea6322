"""CodeBLEU of two pieces of code: n-grams, keywords, syntax and data flow, a quarter each.

The definition is Ren et al., 2020 (arXiv 2009.10297). The package `codebleu` needs a tree-sitter
of before 2024, so the parts are computed here: n-grams over the tokens of a regular expression,
syntax and data flow over Python's own `ast`. Three things follow, and make figures differ a little
from the package's:

* A fragment that does not parse as Python, and any other language, has no syntax and no data flow.
  The mean is then taken over the parts that the reference has, where the package counts a 0.
* N-grams are smoothed (one is added to both counts above unigrams), since most targets are a few
  tokens long and have no 4-gram at all.
* Nodes are those of `ast`, which are fewer than tree-sitter's.
"""

from __future__ import annotations

import ast
import keyword
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from textwrap import dedent

from code2lora.training.evaluation.contexts import parse

_TOKEN = re.compile(r"[A-Za-z_]\w*|\d+(?:\.\d+)?|\S")
_MAX_N = 4
_KEYWORD_WEIGHT, _OTHER_WEIGHT = 1.0, 0.2
_OTHER_KEYWORDS = (
    "break case catch class const continue default delete do else enum export extends final fn for "
    "func function if impl import in interface let match mod new package private protected public "
    "return static struct super switch this throw trait try type use var void while"
)
_KEYWORDS = frozenset(keyword.kwlist) | frozenset(_OTHER_KEYWORDS.split())

_Gram = tuple[str, ...]


def codebleu(prediction: str, reference: str, *, python: bool = True) -> float:
    """Return the CodeBLEU of a prediction: 1 where the two are equal, 0 where one is empty.

    python: whether the reference is Python; without it n-grams and keywords alone count
    """
    if not prediction.strip() or not reference.strip():
        return 0.0
    if prediction.strip() == reference.strip():
        return 1.0
    found, wanted = _TOKEN.findall(prediction), _TOKEN.findall(reference)
    parts = [_bleu(found, wanted, None), _bleu(found, wanted, _KEYWORDS)]
    tree = _fragment(reference) if python else None
    if tree is not None:
        other = _fragment(prediction)
        for part in (_shapes, _flow):
            expected = part(tree)
            if expected:
                parts.append(_share(part(other), expected))
    return sum(parts) / len(parts)


def _bleu(found: Sequence[str], wanted: Sequence[str], keywords: frozenset[str] | None) -> float:
    """Return smoothed BLEU-4 with the brevity penalty.

    keywords: given for the weighted form, in which a unigram counts by whether it is one
    """
    logs = []
    for n in range(1, _MAX_N + 1):
        grams, possible = _grams(found, n), _grams(wanted, n)
        weigh = n == 1 and keywords is not None
        weights = {g: _weight(g, keywords) if weigh else 1.0 for g in grams}
        matched = sum(weights[g] * min(count, possible[g]) for g, count in grams.items())
        total = sum(weights[g] * count for g, count in grams.items())
        if n > 1:
            matched, total = matched + 1, total + 1
        if not matched:
            return 0.0
        logs.append(math.log(matched / total))
    brevity = min(1.0, math.exp(1 - len(wanted) / len(found)))
    return brevity * math.exp(sum(logs) / _MAX_N)


def _grams(tokens: Sequence[str], n: int) -> Counter[_Gram]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _weight(gram: _Gram, keywords: frozenset[str] | None) -> float:
    return _KEYWORD_WEIGHT if keywords and gram[0] in keywords else _OTHER_WEIGHT


def _fragment(text: str) -> ast.AST | None:
    """Return the tree of a fragment: as it is, or with the bracket or the body that it lacks."""
    text = dedent(text).strip()
    for whole in (text, f"({text}", text.rstrip(")"), f"{text}\n    pass"):
        tree = parse(whole)
        if tree is not None and tree.body:
            return tree
    return None


def _share(found: Counter[str], wanted: Counter[str]) -> float:
    """Return the share of what is wanted that was found."""
    return sum((found & wanted).values()) / sum(wanted.values())


def _shapes(tree: ast.AST | None) -> Counter[str]:
    """Return every subtree by its kinds of nodes, names left out; none of one too deep to walk."""
    shapes: Counter[str] = Counter()
    try:
        if tree is not None:
            _shape(tree, shapes)
    except RecursionError:
        shapes.clear()
    return shapes


def _shape(node: ast.AST, shapes: Counter[str]) -> str:
    inner = [_shape(child, shapes) for child in ast.iter_child_nodes(node)]
    shape = f"{type(node).__name__}({','.join(inner)})"
    if not isinstance(node, ast.expr_context):
        shapes[shape] += 1
    return shape


def _flow(tree: ast.AST | None) -> Counter[str]:
    """Return which variable comes from which, variables numbered in the order they turn up."""
    edges: Counter[str] = Counter()
    if tree is None:
        return edges
    numbers: dict[str, int] = {}
    for node in ast.walk(tree):
        for left, right in _assigned(node):
            target = numbers.setdefault(left, len(numbers))
            sources = sorted(numbers.setdefault(name, len(numbers)) for name in right)
            edges[f"{target} from {sources}"] += 1
    return edges


def _assigned(node: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Yield (variable, the names that its new value is made of) of an assignment or a loop."""
    if isinstance(node, ast.Assign):
        targets, value = node.targets, node.value
    elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value is not None:
        targets, value = [node.target], node.value
    elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
        targets, value = [node.target], node.iter
    else:
        return
    names = _names(value)
    for target in targets:
        for name in _names(target):
            yield name, names


def _names(node: ast.AST) -> list[str]:
    """Return the names in an expression, each once, in the order they stand."""
    found: Mapping[str, None] = dict.fromkeys(
        each.id for each in ast.walk(node) if isinstance(each, ast.Name)
    )
    return list(found)
