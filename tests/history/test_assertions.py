from __future__ import annotations

import ast
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from code2lora.history import assertions
from code2lora.history.assertion_nodes import find_in_nodes
from code2lora.history.assertions import (
    NO_FILE,
    Assertion,
    AssertionFinder,
    find_assertions,
    is_test_path,
    new_assertions,
    new_in_commit,
)


def _asked(text: str) -> list[tuple[str, str, str]]:
    """What stands right above each target on its line, the target, and the kind."""
    found = find_assertions(text)
    return [(text[: a.start].rpartition("\n")[2].lstrip(), a.target, a.type) for a in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("assert f(x) == 1", ("assert f(x) == ", "1", "assert")),
        ("assert x", ("assert ", "x", "assert")),
        ("assert not x, 'why'", ("assert ", "not x", "assert")),
        ("assert(x)", ("assert", "(x)", "assert")),
        ("assert x not   in (y)", ("assert x not   in ", "(y)", "assert")),
        ("assert x is not None", ("assert x is not ", "None", "assert")),
        ("assert 1 < x <= 3, 'm'", ("assert 1 < ", "x", "assert")),
        ("assert ((x) == (1 + 2) * 3)", ("assert ((x) == ", "(1 + 2) * 3", "assert")),
        ("assert x == ((1 + 2))", ("assert x == ", "((1 + 2))", "assert")),
        ("self.assertTrue(x)", ("self.assertTrue(", "x)", "self.assertTrue")),
        ("self.assertEqual(a, b)", ("self.assertEqual(a, ", "b)", "self.assertEqual")),
        ("self.assertEqual(a, (b + c))", ("self.assertEqual(a, ", "(b + c))", "self.assertEqual")),
        ("self.assertIn(f(a, b), c)", ("self.assertIn(f(a, b), ", "c)", "self.assertIn")),
        (
            "with self.assertRaises(ValueError) as e: pass",
            ("with self.assertRaises(", "ValueError)", "self.assertRaises"),
        ),
        (
            "with pytest.raises(E, match='m'): pass",
            ("with pytest.raises(", "E, match='m')", "pytest.raises"),
        ),
        ("y = pytest.approx(1, rel=2)", ("y = pytest.approx(", "1, rel=2)", "pytest.approx")),
        ("np.testing.assert_equal(a, b)", ("np.testing.assert_equal(a, ", "b)", "assert_*")),
        ("assert_ok(x)", ("assert_ok(", "x)", "assert_*")),
        (
            "Mock().assert_called_once_with(1, a=2)",
            ("Mock().assert_called_once_with(", "1, a=2)", "mock.assert_*"),
        ),
        ("m.assert_called_with(a=2)", ("m.assert_called_with(", "a=2)", "mock.assert_*")),
        ("é = 'ü'; assert é == 'ö'", ("é = 'ü'; assert é == ", "'ö'", "assert")),
        ("\ufeffassert x == 1", ("\ufeffassert x == ", "1", "assert")),
    ],
)
def test_what_is_asked_of_an_assertion(text: str, expected: tuple[str, str, str]) -> None:
    assert _asked(text) == [expected]


@pytest.mark.parametrize(
    "text",
    [
        "self.assertEqual(a)",
        "self.assertEquals(a, b)",
        "m.assert_called_once()",
        "assert_()",
        "x.assert_(y)",
        "other.raises(E)",
        "raise AssertionError",
    ],
)
def test_what_is_no_assertion_or_has_nothing_to_ask(text: str) -> None:
    assert find_assertions(text) == []


def test_an_assertion_within_another_is_not_a_second_one() -> None:
    assert _asked("assert x == pytest.approx(1)\nself.assertTrue(assert_ok(pytest.approx(2)))") == [
        ("assert x == ", "pytest.approx(1)", "assert"),
        ("self.assertTrue(", "assert_ok(pytest.approx(2)))", "self.assertTrue"),
    ]


def test_a_target_over_several_lines_is_flattened_and_its_place_is_true() -> None:
    text = (
        "def test_é():\n"
        "    self.assertEqual(\n"
        "        call(1, 2),  # why\n"
        "        {\n"
        '            "a  b": 1,  # one\n'
        "            'c': (2,),\n"
        "        },\n"
        "    )\n"
    )

    (found,) = find_assertions(text)

    assert found.target == "{\"a  b\": 1, 'c': (2,),})"
    assert text[: found.start].endswith("# why\n        ")
    assert text[found.start : found.end].startswith("{\n") and text[found.end :] == "\n"
    assert found.function == "test_é"


def test_functions_and_classes_around_an_assertion_are_named() -> None:
    text = (
        "assert a\n"
        "class TestX(Base):\n"
        "    @decorated\n"
        "    def test_one(self):\n"
        "        def inner():\n"
        "            assert b\n"
        "        assert c\n"
        "    class Nested:\n"
        "        async def test_two(self):\n"
        "            async with x:\n"
        "                assert d\n"
        "    def test_three(self): assert e\n"
        "if x:\n"
        "    def test_four():\n"
        "        assert f\n"
    )

    assert [(a.target, a.function) for a in find_assertions(text)] == [
        ("a", ""),
        ("b", "TestX.test_one.inner"),
        ("c", "TestX.test_one"),
        ("d", "TestX.Nested.test_two"),
        ("e", "TestX.test_three"),
        ("f", "test_four"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "assert x ==",
        "assert x == '\0'",
        "assert '\ud800'",
        "assert " + "(" * 5000,
        "assert " + "-" * 100_000 + "1",
        "assert x == " + " + ".join(["1"] * 50_000),
        "assert x" + ".a" * 50_000 + " == 1",
        "\n".join(" " * i + "if x:" for i in range(2000)),
        "assert x\n  assert y\n",
        "x = '''\n" + "def f():\n" * 3000,
    ],
    ids=lambda text: text[:14].replace("\0", "NUL"),
)
def test_what_is_no_python_has_no_assertions(text: str) -> None:
    assert find_assertions(text) == []


def test_a_strange_but_valid_escape_warns_nobody() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [a.target for a in find_assertions(r"assert x == '\d'")] == [r"'\d'"]


def test_time_grows_with_the_size_of_the_file_and_not_its_square() -> None:
    def duration_s(n: int) -> float:
        text = "class T(C):\n    def test_a(self):\n" + "        assert é == 'ü'\n" * n
        found = []
        for _ in range(3):  # the quickest is the one that nothing disturbed
            start = time.process_time()
            assert len(find_assertions(text)) == n
            found.append(time.process_time() - start)
        return min(found)

    # Ten times the size: ten times the time, where a quadratic walk takes a hundred times.
    assert duration_s(10_000) < 40 * max(duration_s(1_000), 0.005)


_PIECES = st.sampled_from(
    [
        "def test_a():\n",
        "class TestB(Case):\n",
        "class C: pass\n",
        "    def test_b(self):\n",
        "    @mark\n",
        "@mark(\n",
        ")\n",
        "    x = 1\n",
        "        assert a == b\n",
        "    assert a == é\n",
        "assert (c ==\n",
        "  d)\n",
        '    """text\n',
        '"""\n',
        "        '''def test_c():\n",
        "'''\n",
        "x = 1 \\\n",
        "# comment\n",
        "    # comment\n",
        "if x:\n",
        "else:\n",
        "\n",
        "\tassert tab\n",
        "async def test_d():\r\n",
        "        return\n",
        "  def odd(self): assert o\n",
    ]
)


def _by_whole_file(text: str) -> list[Assertion]:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return []
    return find_in_nodes(text, tree.body, "")


_FINDER = AssertionFinder()


@settings(max_examples=600, deadline=None)
@given(st.lists(_PIECES, max_size=14))
def test_a_file_taken_apart_has_the_assertions_of_the_whole(pieces: list[str]) -> None:
    text = "".join(pieces)

    assert _FINDER.parse(text).assertions() == _by_whole_file(text)


def test_parts_are_parsed_once_and_forgotten_when_they_are_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = "class T:\n    def test_a(self):\n        assert a\n"
    edits = [head + f"    def test_b(self):\n        assert b == {i}\n" for i in range(100)]
    n_parsed = 0
    parse = assertions._parse

    def counted(text: str) -> ast.Module | None:
        nonlocal n_parsed
        n_parsed += "assert a" in text
        return parse(text)

    monkeypatch.setattr(assertions, "_parse", counted)
    finder = AssertionFinder()
    for text in edits[:50]:
        assert len(finder.parse(text).assertions()) == 2
    assert n_parsed == 1

    monkeypatch.setattr(assertions, "MAX_CACHED_CHARS", 300)
    for text in edits[50:]:
        assert len(finder.parse(text).assertions()) == 2
    assert n_parsed > 1


def test_an_edit_above_a_move_and_another_layout_make_nothing_new() -> None:
    before = (
        "def test_a():\n    assert f(1) == 'x'\n    assert g\n\n"
        "class T:\n    def test_b(self):\n        self.assertEqual(a, b)\n"
    )
    after = (
        "import json\nimport os\n\n"
        "class T:\n    def test_b(self):\n        if x:\n"
        "            self.assertEqual(\n                a,\n                b,\n            )\n\n"
        'def test_renamed():\n    assert g\n    assert f(1) == "x"\n'
    )

    assert len(find_assertions(after)) == 3
    assert new_assertions(find_assertions(before), find_assertions(after)) == []


def test_new_assertions_are_added_or_modified() -> None:
    before = "def test_a():\n    assert f(1) == 2\n    assert kept\n"
    after = (
        "def test_a():\n    assert f(1) == 3\n    assert kept\n    assert kept\n"
        "def test_b():\n    assert f(1) == 4\n"
    )

    new = new_assertions(find_assertions(before), find_assertions(after))

    assert [(a.function, a.target, event) for a, event in new] == [
        ("test_a", "3", "modified"),
        ("test_a", "kept", "added"),
        ("test_b", "4", "added"),
    ]
    assert new[1][0].start == find_assertions(after)[2].start  # the second of the two


def test_an_assertion_that_went_to_another_file_of_the_commit_is_not_new() -> None:
    finder = AssertionFinder()
    one = finder.parse("def test_a():\n    assert f(1) == 2\n    assert other\n")
    rest = finder.parse("def test_a():\n    assert other\n")
    moved = finder.parse("def test_z():\n    assert f(1) == 2\n    assert fresh == 1\n")

    for files in ([(one, rest), (NO_FILE, moved)], [(NO_FILE, moved), (one, rest)]):
        new = new_in_commit(files)

        assert sorted(a.target for found in new for a, _ in found) == ["1"]
    assert [len(found) for found in new_in_commit([(NO_FILE, moved)])] == [2]


@settings(max_examples=200, deadline=None)
@given(st.lists(_PIECES, max_size=10), st.lists(_PIECES, max_size=10))
def test_a_commit_of_one_file_has_what_the_file_has(old: list[str], new: list[str]) -> None:
    before, after = (_FINDER.parse("".join(pieces)) for pieces in (old, new))

    (found,) = new_in_commit([(before, after)])

    expected = new_assertions(before.assertions(), after.assertions())
    assert [(a.identity, event) for a, event in found] == [(a.identity, e) for a, e in expected]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("tests/unit/a.py", True),
        ("test_a.py", True),
        ("src/latest/a.PY", True),
        ("src/a.py", False),
        ("tests/a.txt", False),
        ("venv/tests/a.py", False),
        ("build/test_a.py", False),
    ],
)
def test_test_files_are_known_by_their_path(path: str, expected: bool) -> None:
    assert is_test_path(path) is expected
