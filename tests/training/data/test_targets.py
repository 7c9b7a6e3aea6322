from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from code2lora.training.data.targets import (
    Span,
    TargetConfig,
    added_runs,
    blocks,
    choose,
    identifiers,
    spans_of_lines,
)
from tests.gitrepo import GitRepo


def test_identifiers_leave_out_keywords_builtins_and_short_names() -> None:
    assert identifiers("return print(max_depth, xy, self.walk)") == {"max_depth", "walk"}


def test_added_runs_are_the_lines_that_the_new_file_has_there(repo: GitRepo) -> None:
    old = "".join(f"line {i}\n" for i in range(40))
    lines = old.splitlines(keepends=True)
    new = [*lines[:3], "new a\n", "new b\n", *lines[3:20], *lines[21:30], "swap\n", *lines[31:]]
    new_text = "".join(new) + "last, no newline"
    repo.commit({"f.txt": old})
    repo.commit({"f.txt": new_text})
    patch = repo.git("diff", "-U3", "HEAD~1", "HEAD") + "\n"

    runs = added_runs(patch)

    new_lines = new_text.split("\n")
    found = [new_lines[first:last] for first, last in runs]
    assert found == [["new a", "new b"], ["swap"], ["last, no newline"]]


def test_added_runs_of_a_new_file_are_all_of_it(repo: GitRepo) -> None:
    repo.commit({"a": "1\n"})
    repo.commit({"f.txt": "x\n\ny\n"})

    assert added_runs(repo.git("diff", "HEAD~1", "HEAD") + "\n") == [(0, 3)]


def test_added_runs_of_a_deletion_are_none(repo: GitRepo) -> None:
    repo.commit({"a": "1\n2\n", "b": "3\n"})
    repo.commit({"a": None})

    assert added_runs(repo.git("diff", "HEAD~1", "HEAD") + "\n") == []


def test_a_span_counts_what_others_use_and_the_prefix_hides() -> None:
    text = "import shown_name\n\nuse(shown_name, hidden_name, local_name)\n"
    config = TargetConfig(min_chars=1)
    counts = {"shown_name": 3, "hidden_name": 2, "local_name": 1}

    (span,) = spans_of_lines(text, [(2, 3)], counts, identifiers(text), config)

    # local_name is used by this file alone, shown_name stands above: hidden_name is left
    assert span == Span(start=19, end=len(text), absent=1)
    assert text[span.start : span.end] == "use(shown_name, hidden_name, local_name)\n"


def test_an_identifier_beyond_the_prefix_is_hidden() -> None:
    text = "shown_name\n" + "#\n" * 50 + "shown_name = 1\n"
    config = TargetConfig(min_chars=1, prefix_chars=40)

    (span,) = spans_of_lines(text, [(51, 52)], {"shown_name": 2}, {"shown_name"}, config)

    assert span.absent == 1


@given(st.lists(st.sampled_from(["a\n", "\n", "bb\n", "\x0cpage\n", "caf\u2028e\n"]), max_size=60))
def test_blocks_cover_every_line_once(lines: list[str]) -> None:
    runs = blocks("".join(lines), max_lines=7)

    assert [i for first, last in runs for i in range(first, last)] == list(range(len(lines)))
    assert all(last - first <= 7 for first, last in runs)


@given(st.lists(st.sampled_from(["a = 1\n", "\n", "\x0cpage\n", "caf\u2028e\n"]), max_size=60))
def test_spans_of_all_blocks_are_the_text(lines: list[str]) -> None:
    text = "".join(lines)
    config = TargetConfig(min_chars=0)

    spans = spans_of_lines(text, blocks(text, max_lines=5), {}, set(), config)

    assert "".join(text[span.start : span.end] for span in spans) == text


def test_choose_prefers_what_needs_the_repository_and_keeps_a_control() -> None:
    spans = [Span(i, i + 1, absent=i % 2) for i in range(20)]

    chosen = choose(spans, most=8, present_share=0.25, key="k")

    assert sum(span.absent == 0 for span in chosen) == 2
    assert len(chosen) == 8
    assert chosen == choose(list(reversed(spans)), most=8, present_share=0.25, key="k")
