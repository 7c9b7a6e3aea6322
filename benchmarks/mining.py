"""Measure how fast histories are mined for assertions, and compare with the released pipeline.

    python benchmarks/mining.py GIT_DIR... [--repeats 3] [--released DIR] [--sample 2]

Each repository is mined whole, in this one process, into parquet in a temporary folder: every
first-parent commit that changes an assertion, its diff of production code, each new assertion.

With --released, the authors' package (`pip download --no-deps code2lora==0.3.3`, unpacked into DIR)
does its part of the same in the same run: its walk and its extraction, no file written. Then every
item that it emits is looked for among ours; what differs is counted by cause, and some are shown.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import random
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from code2lora.history.assertion_nodes import MOCK, find_in_nodes
from code2lora.history.assertions import Assertion, find_assertions, is_test_path, new_assertions
from code2lora.history.model import FileVersions
from code2lora.history.open import open_history
from code2lora.history.stream import TEST_RULES
from code2lora.training.data.mining import MineConfig, Repository, mine
from code2lora.training.data.shards import Shard, read_shards

CONFIG = MineConfig(
    stream="assertions",
    commits=0,
    kinds=("assertion",),
    rules="paper",
    snapshot_rules="paper-snapshot",
    max_change_chars=1_000_000_000,
)

Place = tuple[str, str, int]
"""Commit, path, and where the target begins."""


@dataclass(frozen=True)
class Item:
    """One thing to write, as one of the two emits it."""

    commit: str
    path: str
    prefix: str
    target: str
    type: str
    line: int
    column: int


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return a result, and the seconds that it took by the clock and of this processor."""
    start, start_cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - start, time.process_time() - start_cpu


def ours(shard: Shard) -> dict[Place, Item]:
    """Return what was mined, by place."""
    files, table, commits = (shard.table(name) for name in ("files", "targets", "commits"))
    text_of = dict(zip(files["blob"], files["text"], strict=True))
    items = {}
    for values in zip(*table.values(), strict=True):
        row = dict(zip(table, values, strict=True))
        text, start = text_of[row["blob"]], row["start"]
        commit = commits["commit"][row["index"]]
        target = text[start : row["end"]] if row["target"] is None else row["target"]
        item = Item(commit, row["path"], text[:start], target, row["assertion_type"], 0, 0)
        items[commit, row["path"], start] = item
    return items


def load_released(folder: Path) -> Callable[[Path], list[Item]]:
    """Return a function that runs the released pipeline on a git directory."""
    package = types.ModuleType("c2l")  # its own __init__ would import torch and more
    package.__path__ = [str(folder / "c2l")]
    sys.modules["c2l"] = package
    process_repo = importlib.import_module("c2l.git_pipeline").process_repo

    def run(git_dir: Path) -> list[Item]:
        return [
            Item(
                commit.sha,
                qna.test_file,
                qna.prefix,
                qna.target,
                qna.assertion_type,
                qna.lineno,
                qna.col_offset,
            )
            for commit in process_repo(git_dir).commits
            for qna in commit.qnas
        ]

    return run


class Versions:
    """The test files that commits changed, before and after, and what our rules find in them."""

    def __init__(self, git_dir: Path) -> None:
        self._history = open_history(git_dir)
        self._commits: dict[str, dict[str, FileVersions]] = {}
        self._nodes: dict[str, dict[tuple[int, int, bool], ast.AST]] = {}
        self._found: dict[str, list[Assertion]] = {}

    def of(self, commit: str) -> dict[str, FileVersions]:
        """Return path -> versions of the changed test files."""
        if commit not in self._commits:
            changed = self._history.changed_files(commit, TEST_RULES, is_test_path)
            self._commits[commit] = {v.after.path: v for v in changed.files if v.after is not None}
        return self._commits[commit]

    def node(self, text: str, item: Item) -> ast.AST | None:
        """Return the node that an item of the released pipeline was made from."""
        if text not in self._nodes:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                walked = ast.walk(ast.parse(text))
            self._nodes[text] = {
                (node.lineno, node.col_offset, isinstance(node, ast.Assert)): node
                for node in walked
                if isinstance(node, (ast.Assert, ast.Call))
            }
        return self._nodes[text].get((item.line, item.column, item.type == "assert"))

    def assertions(self, text: str) -> list[Assertion]:
        """Return what our rules find in a text."""
        if text not in self._found:
            self._found[text] = find_assertions(text)
        return self._found[text]


def cause(item: Item, versions: Versions, mined: dict[Place, Item]) -> tuple[str, Place | None]:
    """Return how an item of the released pipeline relates to ours, and its place if it has one."""
    both = versions.of(item.commit).get(item.path)
    if both is None or both.after is None:
        return "in a file that the rename detection of git takes for unchanged", None
    text = both.after.text
    node = versions.node(text, item)
    own = [] if node is None else find_in_nodes(text, [node], "")
    if not own:
        return "nothing to ask: our rules see no assertion", None
    start, end = own[0].start, own[0].end
    place = (item.commit, item.path, start)
    found = {each.start: each for each in versions.assertions(text)}
    if start not in found:
        return "part of another assertion, so a second item for one", None
    if place in mined:
        return written_otherwise(item, mined[place], text[start:end]), place
    return re_emitted(found[start], both, versions, item), None


def re_emitted(found: Assertion, both: FileVersions, versions: Versions, item: Item) -> str:
    """Return why an assertion that a file has is not new there."""
    before = versions.assertions(both.before.text) if both.before else []
    assert both.after is not None
    new = {each.start for each, _ in new_assertions(before, versions.assertions(both.after.text))}
    if found.start in new:
        elsewhere = (v.before for v in versions.of(item.commit).values() if v.before is not None)
        texts = {each.text for file in elsewhere for each in versions.assertions(file.text)}
        if found.text in texts:
            return "moved from another file of the commit"
        return "went and came back: asked of an earlier commit, or moved from a file that went"
    identities = {each.identity for each in before}
    if found.identity not in identities:
        return "moved or its function renamed, itself unchanged"
    return "emitted again after an edit above it"


def written_otherwise(item: Item, own: Item, source: str) -> str:
    """Return how the text of an item differs from ours for the same new assertion."""
    if item.prefix == own.prefix and item.target == own.target:
        return SAME
    if item.prefix.endswith("(, "):
        return "one-argument form: its prefix ends in `(, `"
    line = item.prefix.rpartition("\n")[2]
    if not line.isascii() and item.column != len(line) - len(line.lstrip()):
        return "bytes taken for characters in a line that is not ASCII"
    if own.type == MOCK:
        return "a mock's expected call: all arguments are asked, not the last"
    if _bare(item.target) != _bare(own.target):
        if _bare(item.target).strip("()") == _bare(own.target).strip("()"):
            return "parentheses around the value are left out"
        return "later arguments or keywords of the call are left out"
    if _bare(item.prefix) == _bare(own.prefix):
        return "laid out otherwise: theirs is rebuilt on one line, ours is the file's own text"
    return "the text above is rebuilt: comments, parentheses or quotes of it are lost"


SAME = "the same item"


def _bare(text: str) -> str:
    return "".join(text.split()).replace(",)", ")")


def only_ours(item: Item, kept: set[str]) -> str:
    """Return why the released pipeline lacks one of our items."""
    if item.type == MOCK:
        return "only ours: a mock's assertion with keywords alone, or on an attribute `mock`"
    if item.type == "self.assertWarns":
        return "only ours: assertWarns with one argument"
    if item.prefix.startswith("\ufeff"):
        return "only ours: a file with a byte order mark, which theirs cannot parse"
    return f"only ours: {item.type}" + ("" if item.commit in kept else " of a commit it drops")


def compare(git_dir: Path, theirs: list[Item], mined: dict[Place, Item], n_shown: int) -> None:
    """Print counts by cause, and a sample of each."""
    versions = Versions(git_dir)
    causes: dict[str, list[Item]] = defaultdict(list)
    matched: set[Place] = set()
    for item in theirs:
        name, place = cause(item, versions, mined)
        causes[name].append(item)
        if place is not None:
            matched.add(place)
    kept = {item.commit for item in theirs}
    for place, item in mined.items():
        if place not in matched:
            causes[only_ours(item, kept)].append(item)
    for name, items in sorted(causes.items(), key=lambda pair: -len(pair[1])):
        print(f"  {len(items):>7,}  {name}")
        for line in _sample(items, n_shown if name != SAME else 0):
            print(f"             {line}")


def _sample(items: list[Item], n: int) -> Iterator[str]:
    for item in random.Random(1).sample(items, min(n, len(items))):
        line = item.prefix.rpartition("\n")[2].strip()[-60:]
        yield f"{item.commit[:9]} {item.path}:{item.line or ''}  {line}«{item.target[:60]}»"


def main() -> None:
    """Run the measurements and print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("git_dirs", nargs="+", type=Path, metavar="GIT_DIR")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--released", type=Path, metavar="DIR")
    parser.add_argument("--sample", type=int, default=0, help="items shown for each cause")
    options = parser.parse_args()
    released = load_released(options.released) if options.released else None
    for git_dir in options.git_dirs:
        measure(git_dir, released, options.repeats, options.sample)


def measure(
    git_dir: Path, released: Callable[[Path], list[Item]] | None, repeats: int, n_shown: int
) -> None:
    """Time one repository and print it."""
    runs = [mine_once(git_dir) for _ in range(repeats)]
    wall_s, cpu_s = (statistics.median(run[i] for run in runs) for i in (2, 3))
    rows = ", ".join(f"{n:,} {table}" for table, n in runs[0][1].items())
    print(f"{git_dir}")
    print(f"  ours: median {wall_s:.2f} s of {repeats} ({cpu_s:.2f} s of processor); {rows}")
    if released is not None:
        theirs, their_wall_s, their_cpu_s = timed(lambda: released(git_dir))
        n_kept = len({item.commit for item in theirs})
        print(
            f"  released: {their_wall_s:.2f} s ({their_cpu_s:.2f} s of its own processor), "
            f"{their_wall_s / wall_s:.0f} times ours; {n_kept:,} commits, {len(theirs):,} items"
        )
        compare(git_dir, theirs, runs[0][0], n_shown)


def mine_once(git_dir: Path) -> tuple[dict[Place, Item], dict[str, int], float, float]:
    """Mine a repository and return its items, rows, and seconds by the clock and processor."""
    with tempfile.TemporaryDirectory() as folder:
        given = [Repository("a/b", git_dir)]
        (result,), wall_s, cpu_s = timed(lambda: mine(given, Path(folder), CONFIG))
        if result.status != "mined":
            raise SystemExit(f"{git_dir}: {result.reason}")
        (shard,) = read_shards(Path(folder))
        return ours(shard), result.rows, wall_s, cpu_s


if __name__ == "__main__":
    main()
