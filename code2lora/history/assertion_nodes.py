"""Syntax trees into assertions: which calls assert something, and which of their text is asked.

What is asked is the expected value: of an `assert` with a comparison its right side, else all of
it; of a call its last argument, or all arguments where they only make sense together; always up to
the closing parenthesis. An assertion within an asked one is not asked again.
"""

from __future__ import annotations

import ast
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_UNITTEST_WHOLE = _words(
    """
    assertTrue assertFalse assertIsNone assertIsNotNone assertRaises assertRaisesRegex
    assertWarns
    """
)
"""Methods of `self` whose arguments are all asked."""

_UNITTEST_PAIRS = _words(
    """
    assertEqual assertNotEqual assertIs assertIsNot assertIn assertNotIn assertIsInstance
    assertNotIsInstance assertAlmostEqual assertNotAlmostEqual assertDictEqual assertListEqual
    assertTupleEqual assertSetEqual assertSequenceEqual assertRegex assertNotRegex
    assertCountEqual assertLogs assertMultiLineEqual assertGreater assertGreaterEqual assertLess
    assertLessEqual
    """
)
"""Methods of `self` that compare: their last argument is asked."""

MOCK = "mock.assert_*"

_MOCK_CALLS = _words(
    """
    assert_any_await assert_any_call assert_awaited assert_awaited_once assert_awaited_once_with
    assert_awaited_with assert_called assert_called_once assert_called_once_with
    assert_called_with assert_has_awaits assert_has_calls assert_not_awaited assert_not_called
    """
)
"""Methods of unittest.mock: together, their arguments are the call that is expected."""

_PAIRS = frozenset(f"self.{name}" for name in _UNITTEST_PAIRS)
_WHOLE = frozenset(f"self.{name}" for name in _UNITTEST_WHOLE) | {"pytest.raises", "pytest.approx"}

_GAP = r"(?:[\s)\\]|#[^\n\r]*)*"  # what may stand behind an operand: its parentheses, comments
_SPACE = r"(?:[\s\\]|#[^\n\r]*)*"
_AFTER_ASSERT = re.compile("assert" + _SPACE)
_AFTER_CALLEE = re.compile(_GAP + r"\(" + _SPACE)
_AFTER_COMMA = re.compile(_GAP + "," + _SPACE)
_OPERATORS: dict[type[ast.cmpop], re.Pattern[str]] = {
    kind: re.compile(_GAP + operator + _SPACE)
    for kind, operator in (
        (ast.Eq, "=="),
        (ast.NotEq, "!="),
        (ast.Lt, "<"),
        (ast.LtE, "<="),
        (ast.Gt, ">"),
        (ast.GtE, ">="),
        (ast.In, "in"),
        (ast.NotIn, f"not{_SPACE}in"),
        (ast.Is, "is"),
        (ast.IsNot, f"is{_SPACE}not"),
    )
}
_CLOSING = re.compile(_SPACE + r"\)")
_OPENING_OR_COMMENT = re.compile(r"\(|#[^\n\r]*")

_STRING_OR_BREAK = re.compile(
    r'''(?P<string>"""(?:[^\\]|\\.)*?"""|\'\'\'(?:[^\\]|\\.)*?\'\'\'
    |"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<opening>[(\[{]?)(?P<break>(?:\s|\\\r?\n|\#[^\n\r]*)+)(?P<closing>[)\]}]?)''',
    re.DOTALL | re.VERBOSE,
)
_WHITE = re.compile(r"\s+")
_LAST_COMMA = re.compile(r", ?\)\Z")
_LAYOUT = re.compile(r"(?<=[(\[{]) | (?=[)\]},])|,(?= ?[)\]}])")
_MENTION = re.compile("assert|raises|approx")
_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True, slots=True)
class Assertion:
    """One assertion, and the stretch of it that a model may be asked to write."""

    start: int
    """Where the asked stretch begins, in characters of the file."""
    end: int
    target: str
    """The asked stretch on one line: text[start:end] without line ends and comments."""
    type: str
    """`assert`, `self.assertEqual` and the like, `pytest.raises`, `pytest.approx`, `assert_*`
    or `mock.assert_*`."""
    function: str
    """Classes and functions around it, joined by dots; empty on the level of the module."""
    text: str
    """The whole assertion, spaced alike however it was laid out; for comparison only."""

    @property
    def identity(self) -> tuple[str, str, str]:
        """What makes it the same assertion in another version: not where it stands."""
        return self.function, self.type, self.text

    def moved(self, by: int) -> Assertion:
        """Return the same assertion so many characters further on."""
        if by == 0:
            return self
        return Assertion(
            self.start + by, self.end + by, self.target, self.type, self.function, self.text
        )


def find_in_nodes(text: str, nodes: Sequence[ast.AST], scope: str) -> list[Assertion]:
    """Return the assertions among some nodes of a text's tree, in the order of the text.

    scope: the classes and functions around the nodes, joined by dots
    """
    if not _MENTION.search(text):
        return []
    source = _Source(text)
    found: list[Assertion] = []
    waiting = [(node, scope) for node in nodes]
    while waiting:
        node, scope = waiting.pop()
        assertion = _assertion(source, node, scope)
        if assertion is not None:
            found.append(assertion)
            continue
        if isinstance(node, _SCOPES):
            scope = f"{scope}.{node.name}" if scope else node.name
        for name in _fields(type(node)):
            value = getattr(node, name)
            if isinstance(value, list):
                waiting.extend([(each, scope) for each in value if each is not None])
            elif value is not None:
                waiting.append((value, scope))
    found.sort(key=lambda each: each.start)
    return found


_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

# Fields without expressions that run: names, constants, contexts, types, operators.
_PLAIN_FIELDS = _words(
    """
    annotation arg attr ctx id is_async keys kwarg name names op ops pattern returns simple
    type_comment type_params vararg
    """
)
_FIELDS: dict[type[ast.AST], tuple[str, ...]] = {
    ast.Constant: (),
    ast.Import: (),
    ast.ImportFrom: (),
    ast.JoinedStr: (),  # before Python 3.12, what is in it has no true positions
    ast.Name: (),
}


def _fields(kind: type[ast.AST]) -> tuple[str, ...]:
    fields = _FIELDS.get(kind)
    if fields is None:
        fields = _FIELDS[kind] = tuple(name for name in kind._fields if name not in _PLAIN_FIELDS)
    return fields


class _Misplaced(Exception):
    """The text is not what the tree says of it."""


class _Source:
    """A text and where its lines begin, so that a position of the tree is one of the text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._is_ascii = text.isascii()
        self._starts = [0, *(match.end() for match in _LINE_END.finditer(text)), len(text)]
        self._columns: dict[int, array[int]] = {}

    def offset(self, line: int, column: int) -> int:
        """Return the character at a line, counted from 1, and a column in bytes of UTF-8."""
        start = self._starts[line - 1]
        if self._is_ascii:
            return start + column
        columns = self._columns.get(line)
        if columns is None:
            columns = array("l")
            for i, character in enumerate(self.text[start : self._starts[line]]):
                columns.extend([i] * len(character.encode()))
            columns.append(columns[-1] + 1 if columns else 0)
            self._columns[line] = columns
        return start + columns[column]

    def start(self, node: ast.expr | ast.stmt) -> int:
        return self.offset(node.lineno, node.col_offset)

    def end(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.offset(node.end_lineno, node.end_col_offset)

    def behind(self, pattern: re.Pattern[str], position: int) -> int:
        """Return the end of what stands at a position."""
        match = pattern.match(self.text, position)
        if match is None:
            raise _Misplaced
        return match.end()

    def end_with_parentheses(self, first: int, node: ast.expr) -> int:
        """Return where an operand ends that begins at `first`, perhaps before its node does."""
        end = self.end(node)
        for match in _OPENING_OR_COMMENT.finditer(self.text, first, self.start(node)):
            if match[0] == "(":
                end = self.behind(_CLOSING, end)
        return end


def _assertion(source: _Source, node: ast.AST, scope: str) -> Assertion | None:
    if not isinstance(node, (ast.Assert, ast.Call)):
        return None
    try:
        asked = _asked_of(source, node)
    except _Misplaced:
        return None
    if asked is None:
        return None
    kind, start, end = asked
    target = one_line(source.text[start:end])
    if isinstance(node, ast.Call):
        target = _LAST_COMMA.sub(")", target)
    whole = one_line(source.text[source.start(node) : source.end(node)])
    alike = _LAYOUT.sub("", _WHITE.sub(" ", whole)).replace("'", '"')
    return Assertion(start, end, target, kind, scope, alike)


def _asked_of(source: _Source, node: ast.Assert | ast.Call) -> tuple[str, int, int] | None:
    """Return the kind of an assertion, and where what is asked of it begins and ends."""
    if isinstance(node, ast.Assert):
        return "assert", *_asked_of_assert(source, node)
    kind = _kind_of(node.func)
    if kind is None or not _has_arguments(kind, node):
        return None
    whole = kind in _WHOLE or kind == MOCK
    start = (
        source.behind(_AFTER_CALLEE, source.end(node.func))
        if whole
        else _last_argument(source, node)
    )
    return kind, start, source.end(node)


def _asked_of_assert(source: _Source, node: ast.Assert) -> tuple[int, int]:
    test = node.test
    if isinstance(test, ast.Compare):
        operand = test.comparators[0]
        start = source.behind(_OPERATORS[type(test.ops[0])], source.end(test.left))
    else:
        operand = test
        start = source.behind(_AFTER_ASSERT, source.start(node))
    return start, source.end_with_parentheses(start, operand)


def _has_arguments(kind: str, node: ast.Call) -> bool:
    if kind == MOCK:
        return bool(node.args or node.keywords)
    return len(node.args) >= (2 if kind in _PAIRS else 1)


def _kind_of(callee: ast.expr) -> str | None:
    if isinstance(callee, ast.Name):
        name, is_method = callee.id, False
    elif isinstance(callee, ast.Attribute):
        name, is_method = callee.attr, True
        qualified = f"{callee.value.id}.{name}" if isinstance(callee.value, ast.Name) else name
        if qualified in _WHOLE or qualified in _PAIRS:
            return qualified
    else:
        return None
    if not name.startswith("assert_") or name == "assert_":
        return None
    return MOCK if is_method and name in _MOCK_CALLS else "assert_*"


def _last_argument(source: _Source, node: ast.Call) -> int:
    """Return where the last positional argument begins, with the parentheses around it."""
    last = node.args[-1]
    begin = source.start(last)
    others = [*node.args[:-1], *(keyword.value for keyword in node.keywords)]
    before = [source.end(each) for each in others if source.start(each) < begin]
    if before:
        return source.behind(_AFTER_COMMA, max(before))
    return source.behind(_AFTER_CALLEE, source.end(node.func))


def one_line(code: str) -> str:
    """Return a stretch of code on one line, without the comments in it."""
    if "\n" not in code and "\r" not in code:
        return code
    return _STRING_OR_BREAK.sub(_on_one_line, code)


def _on_one_line(match: re.Match[str]) -> str:
    string: str = match["string"]
    if string:
        return _WHITE.sub(" ", string) if "\n" in string else string
    tight = match["opening"] or match["closing"]
    return f"{match['opening']}{'' if tight else ' '}{match['closing']}"
