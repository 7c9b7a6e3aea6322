"""Choose what an audit asks of each repository, by seed: rows, stretches of history, other orders.

What the own adapter is asked about comes after the last told commit or stands in held-out files.
What freshness is asked about is the other way round: the newest commits wrote it, and only an
adapter that was told them can know it. So is what the order of commits is asked about.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from code2lora.training.data.dataset import RepositoryData, Target
from code2lora.training.fitting.items import Item, ItemBuilder

_TRIED_PER_ITEM = 6
"""Targets that are tokenised for each row that is kept, at most."""


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """What an audit asks, and how it counts."""

    seed: int = 1
    items: int = 24
    """Rows of a repository: half from held-out files, the rest from commits that were not told."""
    fresh_items: int = 24
    """Rows of a repository from its newest commits, for each distance in `freshness`."""
    freshness: tuple[int, ...] = (10, 50)
    """Commits that an adapter is behind, when it is compared with the newest."""
    held_out_share: float = 0.3
    """Share of a snapshot's files that are left out of what is told."""
    recent_commits: int = 48
    """The newest commits are not told to the own adapter; of a short history, a third."""
    replay_commits: int = 64
    """At least so many commits are told one by one, where the history is long enough."""
    short_tokens: int = 16
    """A row that asks for at most so many tokens is short."""
    known_nll: float = 0.5
    """Nats a token below which the base model knows the answer already."""
    lambdas: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    """How far along the own residual, from the mean adapter on, rows are scored."""
    mean_repositories: int = 64
    """Training repositories whose adapters' mean is the mean adapter, at most."""
    mean_rank: int = 256
    """Rank of the mean adapter, at most."""
    rows_per_pass: int = 16
    resamples: int = 2000
    """Of the bootstrap over repositories."""


@dataclass(frozen=True, slots=True)
class Row:
    """One question."""

    item: Item
    kind: str
    """`file`, `commit` or `assertion`"""
    absent: int
    """Identifiers that it needs and its prefix does not show."""
    index: int
    """The commit that wrote it, or the snapshot that it stands in."""


@dataclass(frozen=True)
class AuditCase:
    """One repository: what its adapters are told, and what they are asked."""

    data: RepositoryData
    anchor: int
    told_up_to: int
    """The last commit that the own adapter is told."""
    newest: int
    """The last commit of all; freshness is asked of the adapter there."""
    held_out: frozenset[str]
    rows: tuple[Row, ...]
    fresh: dict[int, tuple[Row, ...]] = field(default_factory=dict)
    """Commits behind -> rows that those commits wrote; only distances that the history has."""


Leaked = Callable[[RepositoryData, Target], bool]
"""Tells whether a target was seen in training, in whatever repository."""


def prepare_audit(
    repositories: Iterable[RepositoryData],
    builder: ItemBuilder,
    config: AuditConfig,
    *,
    holds_out: bool = True,
    leaked: Leaked = lambda data, target: False,
) -> list[AuditCase]:
    """Return a case for each repository in which there is something to ask.

    holds_out: whether files can be left out of what is told (`Inputs.holds_out`); otherwise no
    row is from a held-out file
    """
    if not holds_out:
        config = replace(config, held_out_share=0.0)
    cases = [_case(data, builder, config, leaked) for data in repositories if data.anchors]
    return [case for case in cases if case.rows and case.anchor <= case.told_up_to]


def last_told(data: RepositoryData, config: AuditConfig) -> tuple[int, int]:
    """Return (anchor, last commit) of the stretch that a repository's adapter is told."""
    newest = data.n_commits - 1
    last = newest - min(config.recent_commits, newest // 3)
    begin = min(last - config.replay_commits, newest - max(config.freshness, default=0))
    earlier = [anchor for anchor in data.anchors if anchor <= max(0, begin)]
    return (earlier[-1] if earlier else data.anchors[0]), last


def order_of_another(own_sizes: Sequence[int], other_sizes: Sequence[int], seed: str) -> list[int]:
    """Return the places of own commits in the order in which another repository would have them.

    The largest own commit comes where the other repository's largest is, and so on down; equal
    sizes are drawn. Of a stretch of another length, the sizes at the same share of it count.
    sizes: a number for each commit, oldest first
    """
    rng = random.Random(seed)
    n, m = len(own_sizes), len(other_sizes)
    wanted = [other_sizes[place * m // n] for place in range(n)]
    places = sorted(range(n), key=lambda i: (wanted[i], rng.random()))
    commits = sorted(range(n), key=lambda i: (own_sizes[i], rng.random()))
    order = [0] * n
    for place, commit in zip(places, commits, strict=True):
        order[place] = commit
    return order


def random_order(n: int, seed: str) -> list[int]:
    """Return 0 to n - 1 in another order, which the seed determines. n: at least 2."""
    rng = random.Random(seed)
    order = list(range(n))
    while order == list(range(n)):
        rng.shuffle(order)
    return order


def _case(
    data: RepositoryData, builder: ItemBuilder, config: AuditConfig, leaked: Leaked
) -> AuditCase:
    rng = random.Random(f"{config.seed}/{data.name}")
    anchor, told_up_to = last_told(data, config)
    newest = data.n_commits - 1
    paths = [file.path for file in data.files(anchor)]
    held_out = frozenset(rng.sample(paths, round(len(paths) * config.held_out_share)))

    def choose(targets: Sequence[Target], n: int) -> list[Row]:
        kept = [target for target in targets if not leaked(data, target)]
        tried = rng.sample(kept, min(len(kept), n * _TRIED_PER_ITEM))
        found = [_row(data, builder, target, rng) for target in tried]
        return _evenly([row for row in found if row is not None], n, config.short_tokens)

    rows = choose(data.file_targets(anchor, held_out), config.items // 2)
    rows += choose(data.commit_targets(told_up_to + 1, newest), config.items - len(rows))
    never_told = held_out
    for index in range(anchor + 1, newest + 1):
        never_told = data.follow(index, never_told)
    fresh = {}
    for behind in config.freshness:
        since = newest - behind
        if since >= anchor:
            targets = data.commit_targets(since + 1, newest)
            told = [target for target in targets if target.path not in never_told]
            fresh[behind] = tuple(choose(told, config.fresh_items))
    return AuditCase(data, anchor, told_up_to, newest, held_out, tuple(rows), fresh)


def _row(
    data: RepositoryData, builder: ItemBuilder, target: Target, rng: random.Random
) -> Row | None:
    text = data.texts[target.file]
    if target.target is not None or target.kind == "assertion":
        wanted = text[target.start : target.end] if target.target is None else target.target
        item = builder.assertion(text, target.start, wanted)
    else:
        item = builder.completion(text, target.path, target.start, target.end, rng)
    return None if item is None else Row(item, target.kind, target.absent, target.index)


def _evenly(rows: Sequence[Row], n: int, short_tokens: int) -> list[Row]:
    """Return up to n rows, as evenly as can be of each kind, absent and present, short and long."""
    strata: dict[tuple[str, bool, bool], deque[Row]] = {}
    for row in rows:
        stratum = (row.kind, row.absent == 0, row.item.n_asked > short_tokens)
        strata.setdefault(stratum, deque()).append(row)
    chosen: list[Row] = []
    waiting = [strata[key] for key in sorted(strata)]
    while waiting and len(chosen) < n:
        chosen.extend(queue.popleft() for queue in waiting[: n - len(chosen)])
        waiting = [queue for queue in waiting if queue]
    return chosen
