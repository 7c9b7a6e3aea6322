"""What the scores of a repository say: the running gain, and what the gate serves. Torch-free.

A gain is how many nats a token one way to answer saves against another, so more is better. It is
weighted by tokens, and its error is that of commits, not of tokens: the lines of one commit are
alike.

The gate's rule: what serves is replaced only by what the running gain shows to be better, that is
by more than LEAST_GAIN beyond CERTAINTY standard errors, over at least LEAST_COMMITS commits. While
neither is shown to be better, nothing changes; so it does not flip from commit to commit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

from code2lora.settings import Settings
from code2lora.state_store import Store
from code2lora.state_store.records import Use

LEAST_COMMITS = 10
"""The gate waits for so many scored commits."""
LEAST_GAIN = 0.001
"""Nats a token; a smaller gain is no reason to change anything."""
CERTAINTY = 2.0
"""Standard errors that a gain must be away from nothing."""

USES: tuple[Use, ...] = get_args(Use)


class Scored(Protocol):
    """What a gain is computed from: a commit's score, stored or new."""

    @property
    def n_tokens(self) -> int:
        """Tokens that were asked."""

    @property
    def base_nats(self) -> float:
        """Loss of the base model, summed over the tokens."""

    @property
    def generic_nats(self) -> float:
        """The same of the generic adapter."""

    @property
    def own_nats(self) -> float:
        """The same of the own adapter."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A gain in nats a token, with its standard error over commits."""

    mean: float
    error: float | None
    """None for a single commit."""

    @property
    def is_shown(self) -> bool:
        """Whether it is certainly a gain."""
        return self.error is not None and self.mean - CERTAINTY * self.error > LEAST_GAIN


@dataclass(frozen=True, kw_only=True)
class Gain:
    """The running gain of a repository's own adapter."""

    n_commits: int
    n_tokens: int
    over_base: Mean
    over_generic: Mean
    generic_over_base: Mean


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a repository is served with, and why."""

    use: Use
    """What serves."""
    gate: str
    """The setting: `on` or `off`."""
    gate_use: Use
    """What the gate serves, or would."""
    gain: Gain | None
    """None before the first commit is scored."""

    why: str
    """One line for people, which begins with what serves."""


def running_gain(scores: Sequence[Scored]) -> Gain | None:
    """Return the gain over the scores' tokens; None where nothing was asked."""
    if not any(score.n_tokens for score in scores):
        return None
    return Gain(
        n_commits=sum(score.n_tokens > 0 for score in scores),
        n_tokens=sum(score.n_tokens for score in scores),
        over_base=gain_of("own", "base", scores),
        over_generic=gain_of("own", "generic", scores),
        generic_over_base=gain_of("generic", "base", scores),
    )


def gain_of(use: Use, over: Use, scores: Sequence[Scored]) -> Mean:
    """Return what one way to answer saves against another.

    The standard error is that of a ratio of sums over commits: each commit's residual is what it
    saved beyond the mean on so many tokens.
    """
    asked = [score for score in scores if score.n_tokens]
    n_tokens = sum(score.n_tokens for score in asked)
    saved = [_nats(score, over) - _nats(score, use) for score in asked]
    mean = sum(saved) / n_tokens
    n = len(asked)
    if n < 2:
        return Mean(mean=mean, error=None)
    residuals = sum((s - mean * score.n_tokens) ** 2 for s, score in zip(saved, asked, strict=True))
    return Mean(mean=mean, error=math.sqrt(residuals * n / (n - 1)) / n_tokens)


def next_use(now: Use, scores: Sequence[Scored]) -> Use:
    """Return what the gate serves after these scores, where `now` has served so far."""
    if sum(score.n_tokens > 0 for score in scores) < LEAST_COMMITS:
        return now
    rivals = [(gain_of(rival, now, scores), rival) for rival in USES if rival != now]
    better = [(gain.mean, rival) for gain, rival in rivals if gain.is_shown]
    return max(better)[1] if better else now


def served_use(settings: Settings, store: Store, repository_id: str, checkpoint: str) -> Use:
    """Return what is to serve a repository."""
    return store.gate_use(repository_id, checkpoint) if settings.gate == "on" else "own"


def standing(settings: Settings, store: Store, repository_id: str, checkpoint: str) -> Standing:
    """Return what a repository is served with, and why."""
    scores = store.recent_scores(repository_id, checkpoint, limit=settings.gain_commits)
    gain = running_gain(scores)
    gate_use = store.gate_use(repository_id, checkpoint)
    use: Use = gate_use if settings.gate == "on" else "own"
    off = _off(settings, gate_use)
    why = f"{_NAMES[use]}: {off or _why(use, gain)}"
    return Standing(use=use, gate=settings.gate, gate_use=gate_use, gain=gain, why=why)


def per_token(score: Scored, over: Use) -> float | None:
    """Return the own adapter's gain on one commit; None where nothing was asked."""
    return (_nats(score, over) - score.own_nats) / score.n_tokens if score.n_tokens else None


_NAMES: dict[Use, str] = {
    "own": "the repository's own adapter",
    "generic": "the generic adapter",
    "base": "the base model",
}


def _off(settings: Settings, gate_use: Use) -> str | None:
    if settings.gate == "on":
        return None
    instead = "" if gate_use == "own" else f", which would serve {_NAMES[gate_use]}"
    return f"the gate is off{instead}"


def _why(use: Use, gain: Gain | None) -> str:
    if gain is None:
        return "no commit is scored yet"
    if use == "own":
        if gain.n_commits < LEAST_COMMITS:
            return f"{gain.n_commits} of the {LEAST_COMMITS} scored commits that the gate waits for"
        return "nothing else is shown to be better"
    own = gain.over_generic if use == "generic" else gain.over_base
    if own.mean < 0:
        error = "" if own.error is None else f" ±{own.error:.3f}"
        return f"{-own.mean:.3f}{error} nats a token better than the own adapter"
    return "it was shown to be better than the own adapter, which is not shown to be better again"


def _nats(score: Scored, use: Use) -> float:
    return {"own": score.own_nats, "generic": score.generic_nats, "base": score.base_nats}[use]
