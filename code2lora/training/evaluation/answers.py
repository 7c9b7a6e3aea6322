"""Let a row answer the questions of its cases, and keep what it answered.

Writes  <cache>/<suite>/<row>/<repository>.json, one for each case when it is done

An answer that lies there and was made from the same things is not made again, so work that was cut
off goes on with the next repositories.

N = questions of a pass, A = adapters of a pass.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from code2lora.hypernetwork.lora import Lora
from code2lora.training.data.shards import folder_name
from code2lora.training.evaluation.contexts import Context
from code2lora.training.evaluation.generate import Rules, write, writing_rules
from code2lora.training.evaluation.metrics import n_lines
from code2lora.training.evaluation.prompts import Prompts
from code2lora.training.evaluation.rows import Row, digest
from code2lora.training.evaluation.suites import Question, SuiteCase
from code2lora.training.fitting.items import Item, collate
from code2lora.training.fitting.objective import Frozen, row_nll

ANSWERS_VERSION = "1"
"""Raised whenever the same row would answer otherwise, so that old answers are made again."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one row made of one question."""

    nll: float
    """Nats, summed over the asked tokens."""
    n_tokens: int
    """Asked tokens that were scored."""
    prediction: str
    """As it was written; the protocols of `metrics` cut it."""


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """How questions are put."""

    max_new_tokens: int = 64
    scored_tokens: int = 512
    """Of what is asked, the most that NLL is taken of."""
    rows_per_pass: int = 16
    repositories_per_pass: int = 8
    """As many adapters are in memory at once."""


class Answering:
    """Puts the questions of suites to rows."""

    def __init__(self, prompts: Prompts, config: AnswerConfig, cache: Path | None) -> None:
        """cache: where answers are kept; None keeps none."""
        self._prompts = prompts
        self._config = config
        self._cache = cache

    def answers(
        self, row: Row, cases: Sequence[SuiteCase], stop: Callable[[], bool]
    ) -> Iterator[tuple[SuiteCase, list[Answer]]]:
        """Yield the answers to each case that the row applies to; fewer when asked to stop."""
        missing = []
        for case in cases:
            if not row.applies(case):
                continue
            kept = self._read(row, case)
            if kept is None:
                missing.append(case)
            else:
                yield case, kept
        size = self._config.repositories_per_pass
        for start in range(0, len(missing), size):
            if stop():
                return
            group = missing[start : start + size]
            for case, found in zip(group, self._answer(row, group), strict=True):
                self._write(row, case, found)
                yield case, found

    def _answer(self, row: Row, cases: Sequence[SuiteCase]) -> list[list[Answer]]:
        """Return the answers to each of a few cases, in passes over the questions of all."""
        asked = []
        for number, case in enumerate(cases):
            context = row.context(case)
            for question in case.questions:
                asked.append(self._put(question, number, context))
        base = row.decoder()
        rules = writing_rules(
            self._prompts.tokenizer, base.lanes[0].model, self._config.max_new_tokens
        )
        adapters = [row.adapter(case) for case in cases]
        found: list[list[Answer]] = [[] for _ in cases]
        answers = dict(self._passes(asked, base, rules, adapters))
        for number, each in enumerate(asked):
            found[each.case].append(answers[number])
        return found

    def _passes(
        self, asked: Sequence[_Asked], base: Frozen, rules: Rules, adapters: list[Lora | None]
    ) -> Iterator[tuple[int, Answer]]:
        """Yield (place in `asked`, answer); those of a pass are of like length and line count."""
        order = sorted(
            range(len(asked)), key=lambda i: (asked[i].n_lines > 1, len(asked[i].item.ids))
        )
        size = self._config.rows_per_pass
        for start in range(0, len(order), size):
            places = order[start : start + size]
            mine = [asked[i] for i in places]
            lora, index = stacked(adapters, [each.case for each in mine])
            tokens, labels = collate([each.item for each in mine])
            with torch.no_grad():
                nll, n_tokens = row_nll(base, tokens, labels, lora, index)
            prompts = [each.item.ids[: each.item.n_given] for each in mine]
            texts = write(base, prompts, [each.n_lines for each in mine], rules, lora, index)
            for place, one, n, text in zip(
                places, nll.tolist(), n_tokens.tolist(), texts, strict=True
            ):
                yield place, Answer(one, n, text)

    def _put(self, question: Question, case: int, context: Context | None) -> _Asked:
        prompts, config = self._prompts, self._config
        above = ""
        if context is not None:
            above = context.retrieve(
                question.prefix, path=question.path, max_tokens=prompts.config.context_tokens
            )
        given = prompts.ids(question.prefix, above)
        wanted = prompts.encode(question.target)[: config.scored_tokens]
        lines = n_lines(reference(question, prompts, config.max_new_tokens))
        return _Asked(case, Item(ids=(*given, *wanted), n_given=len(given)), lines)

    def _key(self, row: Row, case: SuiteCase) -> str:
        config = self._config
        limits = [config.max_new_tokens, config.scored_tokens]
        settings = json.dumps([asdict(self._prompts.config), limits])
        return digest(ANSWERS_VERSION, settings, row.key(case), case.key())

    def _file(self, row: Row, case: SuiteCase) -> Path | None:
        if self._cache is None:
            return None
        return self._cache / case.suite / row.name / f"{folder_name(case.name)}.json"

    def _read(self, row: Row, case: SuiteCase) -> list[Answer] | None:
        file = self._file(row, case)
        try:
            content = {} if file is None else json.loads(file.read_text("utf-8"))
            if content.get("key") != self._key(row, case):
                return None
            return [Answer(**each) for each in content["answers"]]
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            return None

    def _write(self, row: Row, case: SuiteCase, answers: Sequence[Answer]) -> None:
        file = self._file(row, case)
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"key": self._key(row, case), "answers": [asdict(each) for each in answers]}
        temporary = file.with_name(f".tmp-{file.name}-{os.getpid()}")
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
        os.replace(temporary, file)


@dataclass(frozen=True, slots=True)
class _Asked:
    case: int
    item: Item
    n_lines: int


def reference(question: Question, prompts: Prompts, max_new_tokens: int) -> str:
    """Return the text that a prediction is compared with: what is asked, as far as it can be.

    A target of more tokens than may be written is cut, at a line's end where there is one. The cut
    is the same for every row.
    """
    text = question.target.strip("\r\n")
    ids = prompts.encode(text)
    if len(ids) <= max_new_tokens:
        return text
    text = prompts.decode(ids[:max_new_tokens]).rstrip("\ufffd")
    whole, newline, _ = text.rpartition("\n")
    return whole if newline and whole.strip() else text


def stacked(
    adapters: Sequence[Lora | None], chosen: Sequence[int]
) -> tuple[Lora | None, Tensor | None]:
    """Return a batch of the chosen adapters and, for each choice, its place in the batch.

    adapters: all of one shape, without a batch axis, or all None: then there is nothing to stack
    """
    needed = sorted(set(chosen))
    loras = [lora for lora in (adapters[i] for i in needed) if lora is not None]
    if not loras:
        return None, None
    if len(loras) < len(needed):
        raise AssertionError("some repositories of a pass have an adapter and others have none")
    one = loras[0]
    batch = Lora(
        a={target: torch.stack([lora.a[target] for lora in loras]) for target in one.a},
        b={target: torch.stack([lora.b[target] for lora in loras]) for target in one.b},
        rank=one.rank,
        alpha=one.alpha,
    )
    place = {case: number for number, case in enumerate(needed)}
    return batch, torch.tensor([place[case] for case in chosen])
