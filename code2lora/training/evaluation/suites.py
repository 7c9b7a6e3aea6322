"""Turn repositories into fixed questions: what is told, what is asked, and how far apart they are.

    cross-repo    held-out repositories: told up to a commit, asked about the ones right after it
                  and about files that were never told
    in-repo       repositories that were trained on, their last commits: told up to where training
                  ended, asked about what came then
    out-of-time   held-out repositories, asked about commits long after what was told

Targets that are marked as leaked are never asked. A seed fixes every choice.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from code2lora.training.data.dataset import RepositoryData, Target
from code2lora.training.data.shards import Shard
from code2lora.training.evaluation.evaluate import (
    EvaluateConfig,
    Leaked,
    held_out_files,
    written_text,
)
from code2lora.training.evaluation.prompts import spells_control_token
from code2lora.training.evaluation.told import told_texts

CROSS_REPO, IN_REPO, OUT_OF_TIME = "cross-repo", "in-repo", "out-of-time"
SUITES = (CROSS_REPO, IN_REPO, OUT_OF_TIME)

KINDS = ("assertion", "commit", "file")

_TRAIN_SHARE = 0.8
"""Of the commits, where a shard does not say how it is split."""


@dataclass(frozen=True)
class Question:
    """One thing to write."""

    kind: str
    path: str
    prefix: str
    """All text of the file above what is asked."""
    target: str
    absent: int
    """Identifiers that it needs and that the text just above does not show."""
    index: int
    """The commit that wrote it; of a file, the snapshot that it stands in."""
    distance: int
    """Commits between the last told one and `index`; 0 for a file."""


@dataclass(frozen=True)
class SuiteCase:
    """One repository's questions, and what may be known when they are answered."""

    suite: str
    shard: Shard
    data: RepositoryData
    anchor: int
    told_up_to: int
    held_out: frozenset[str]
    questions: tuple[Question, ...]

    @property
    def name(self) -> str:
        """The repository."""
        return self.data.name

    def told(self) -> dict[str, str]:
        """Return path -> text of what was told."""
        changes = self.shard.table("changes")
        return told_texts(self.data, changes, self.anchor, self.told_up_to, self.held_out)

    def key(self) -> str:
        """Return a digest of what is told and what is asked."""
        asked = [(q.kind, q.path, q.prefix, q.target) for q in self.questions]
        told = [self.name, self.shard.manifest.get("head"), self.anchor, self.told_up_to]
        text = json.dumps([told, sorted(self.held_out), asked])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def suite_shards(
    suite: str, shards: Sequence[Shard], config: EvaluateConfig, *, test: bool
) -> list[Shard]:
    """Return the repositories that a suite asks about, of all that were mined.

    test: the test repositories in place of the validation ones
    """
    if suite != IN_REPO:
        return [shard for shard in shards if shard.split == ("cr_test" if test else "cr_val")]
    found = [shard for shard in shards if shard.split == "train"]
    # By a digest of the name, so that one repository more changes the choice by one at most.
    found.sort(key=lambda shard: hashlib.sha256(shard.name.encode()).digest())
    return sorted(found[: config.in_repo], key=lambda shard: shard.name)


def suite_cases(
    suite: str,
    shards: Sequence[Shard],
    repositories: Sequence[RepositoryData],
    config: EvaluateConfig,
    leaked: Leaked,
) -> list[SuiteCase]:
    """Return a case for each repository in which there is something to ask.

    shards, repositories: the same ones in the same order
    leaked: tells which targets were seen in training, in whatever repository
    """
    make = {CROSS_REPO: _cross_repo, IN_REPO: _in_repo, OUT_OF_TIME: _out_of_time}[suite]
    cases = []
    for shard, data in zip(shards, repositories, strict=True):
        case = make(shard, data, config, leaked)
        if case is not None and case.questions:
            cases.append(case)
    return cases


def _cross_repo(
    shard: Shard, data: RepositoryData, config: EvaluateConfig, leaked: Leaked
) -> SuiteCase | None:
    told_up_to = max(0, data.n_commits - 1 - config.recent_commits)
    anchor = _anchor(data, told_up_to, config)
    if anchor is None:
        return None
    held_out = held_out_files(data, anchor, config)
    targets = data.file_targets(anchor, held_out)
    targets = [*targets, *data.commit_targets(told_up_to + 1, data.n_commits)]
    rng = _rng(CROSS_REPO, data, config)
    questions = _questions(data, targets, told_up_to, config, leaked, rng)
    return SuiteCase(CROSS_REPO, shard, data, anchor, told_up_to, held_out, questions)


def _in_repo(
    shard: Shard, data: RepositoryData, config: EvaluateConfig, leaked: Leaked
) -> SuiteCase | None:
    first = first_evaluated(shard)
    anchor = _anchor(data, first - 1, config) if 0 < first < data.n_commits else None
    if anchor is None:
        return None
    targets = data.commit_targets(first, data.n_commits)
    rng = _rng(IN_REPO, data, config)
    questions = _questions(data, targets, first - 1, config, leaked, rng)
    return SuiteCase(IN_REPO, shard, data, anchor, first - 1, frozenset(), questions)


def _out_of_time(
    shard: Shard, data: RepositoryData, config: EvaluateConfig, leaked: Leaked
) -> SuiteCase | None:
    told_up_to = data.n_commits - 1 - config.recent_commits - config.out_of_time_gap
    anchor = _anchor(data, told_up_to, config) if told_up_to >= 0 else None
    if anchor is None:
        return None
    targets = data.commit_targets(told_up_to + config.out_of_time_gap, data.n_commits)
    rng = _rng(OUT_OF_TIME, data, config)
    questions = _questions(data, targets, told_up_to, config, leaked, rng)
    return SuiteCase(OUT_OF_TIME, shard, data, anchor, told_up_to, frozenset(), questions)


def first_evaluated(shard: Shard) -> int:
    """Return the first commit of a repository that training leaves alone.

    The shard's column `split` says it; without one it is where the last fifth begins.
    """
    commits = shard.table("commits")
    split = commits.get("split")
    if split is None:
        return int(len(commits["index"]) * _TRAIN_SHARE)
    return next((i for i, each in enumerate(split) if each != "train"), len(split))


def _rng(suite: str, data: RepositoryData, config: EvaluateConfig) -> random.Random:
    return random.Random(f"{config.seed}/{suite}/{data.name}")


def _anchor(data: RepositoryData, told_up_to: int, config: EvaluateConfig) -> int | None:
    """Return the snapshot that telling begins with; None where the first comes too late."""
    known = [anchor for anchor in data.anchors if anchor <= told_up_to]
    early = [anchor for anchor in known if anchor <= max(0, told_up_to - config.replay_commits)]
    return early[-1] if early else known[0] if known else None


def _questions(
    data: RepositoryData,
    targets: Sequence[Target],
    told_up_to: int,
    config: EvaluateConfig,
    leaked: Leaked,
    rng: random.Random,
) -> tuple[Question, ...]:
    most = {
        "assertion": config.assertion_items,
        "commit": config.commit_items,
        "file": config.file_items,
    }
    found: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    seen: set[tuple[str, str, str]] = set()
    for target in rng.sample(targets, len(targets)):
        of_kind = found[target.kind]
        if len(of_kind) >= most[target.kind] or leaked(data, target):
            continue
        question = _question(data, target, told_up_to)
        same = (question.path, question.prefix, question.target)
        if _askable(question) and same not in seen:
            seen.add(same)
            of_kind.append(question)
    return tuple(question for kind in KINDS for question in found[kind])


def _question(data: RepositoryData, target: Target, told_up_to: int) -> Question:
    text, end = written_text(data, target)
    return Question(
        kind=target.kind,
        path=target.path,
        prefix=text[: target.start],
        target=text[target.start : end],
        absent=target.absent,
        index=target.index,
        distance=0 if target.kind == "file" else target.index - told_up_to,
    )


def _askable(question: Question) -> bool:
    """Tell whether there is something to write that is not a decoder's control token."""
    return bool(question.target.strip()) and not spells_control_token(question.target)
