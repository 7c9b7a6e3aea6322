from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from code2lora.hypernetwork.lora import Lora
from code2lora.training.data.dataset import RepositoryData
from code2lora.training.data.shards import Shard
from code2lora.training.evaluation.answers import Answer, AnswerConfig, Answering, reference
from code2lora.training.evaluation.contexts import Chunks, Context
from code2lora.training.evaluation.evaluate import EvaluateConfig
from code2lora.training.evaluation.generate import write, writing_rules
from code2lora.training.evaluation.prompts import PromptConfig, Prompts
from code2lora.training.evaluation.suites import CROSS_REPO, Question, SuiteCase, suite_cases
from code2lora.training.fitting.items import Item, collate
from code2lora.training.fitting.objective import Frozen, row_nll

CONFIG = EvaluateConfig(recent_commits=3, replay_commits=1, file_items=2, commit_items=3)
ANSWERS = AnswerConfig(max_new_tokens=6, rows_per_pass=4, repositories_per_pass=2)


@dataclass
class CountedRow:
    """A row with an adapter for each case, and a note of what was asked of it."""

    base: Frozen
    loras: list[Lora]
    names: list[str]
    contexts: bool = False
    name: str = "evo"
    version: str = "1"
    asked: list[str] = field(default_factory=list)

    def key(self, case: SuiteCase) -> str:
        return self.version

    def applies(self, case: SuiteCase) -> bool:
        return True

    def decoder(self) -> Frozen:
        return self.base

    def context(self, case: SuiteCase) -> Context | None:
        return Chunks(case.told(), lambda text: text.split()) if self.contexts else None

    def adapter(self, case: SuiteCase) -> Lora | None:
        self.asked.append(case.name)
        return self.loras[self.names.index(case.name)]


@pytest.fixture
def cases(data: list[RepositoryData], shards: list[Shard]) -> list[SuiteCase]:
    return suite_cases(CROSS_REPO, shards, data, CONFIG, lambda *_: False)


@pytest.fixture
def row(base: Frozen, loras: list[Lora], cases: list[SuiteCase]) -> CountedRow:
    return CountedRow(base, loras, [case.name for case in cases])


@pytest.fixture
def prompts(tokenizer: Tokenizer) -> Prompts:
    return Prompts(tokenizer, PromptConfig(prompt_tokens=48))


def answers_of(
    answering: Answering, row: CountedRow, cases: list[SuiteCase]
) -> dict[str, list[Answer]]:
    return {case.name: found for case, found in answering.answers(row, cases, lambda: False)}


def test_answers_are_those_of_each_question_alone(
    row: CountedRow, cases: list[SuiteCase], prompts: Prompts, base: Frozen
) -> None:
    found = answers_of(Answering(prompts, ANSWERS, None), row, cases)

    rules = writing_rules(prompts.tokenizer, base.lanes[0].model, 6)
    for number, case in enumerate(cases):
        assert len(found[case.name]) == len(case.questions)
        for question, answer in zip(case.questions, found[case.name], strict=True):
            given, asked = prompts.ids(question.prefix), prompts.encode(question.target)
            item = Item(ids=(*given, *asked), n_given=len(given))
            tokens, labels = collate([item])
            with torch.no_grad():
                nll, _ = row_nll(base, tokens, labels, row.loras[number], None)
            lines = reference(question, prompts, 6).strip().count("\n") + 1
            text = write(base, [given], [lines], rules, row.loras[number])[0]
            assert answer.nll == pytest.approx(nll.item(), rel=1e-4)
            assert answer.n_tokens == len(asked)
            assert answer.prediction == text


def test_every_row_is_given_as_many_tokens_and_asked_the_same(
    row: CountedRow, cases: list[SuiteCase], tokenizer: Tokenizer
) -> None:
    prompts = Prompts(tokenizer, PromptConfig(prompt_tokens=24))
    plain = answers_of(Answering(prompts, ANSWERS, None), row, cases)
    row.contexts = True
    above = answers_of(Answering(prompts, ANSWERS, None), row, cases)

    for name, found in plain.items():
        assert [each.n_tokens for each in found] == [each.n_tokens for each in above[name]]
        assert [each.nll for each in found] != [each.nll for each in above[name]]
    for question in cases[0].questions:
        for context in ("", "word " * 50):
            assert len(prompts.ids(question.prefix, context)) <= 24
    long = "x = 1\n" * 50
    assert len(prompts.ids(long)) == len(prompts.ids(long, "word " * 50)) == 24
    assert prompts.ids(long, "word " * 50)[-6:] == prompts.ids(long)[-6:]


def test_a_second_run_goes_on_where_the_first_was_stopped(
    row: CountedRow, cases: list[SuiteCase], prompts: Prompts, tmp_path: Path
) -> None:
    answering = Answering(prompts, ANSWERS, tmp_path)
    looks = iter([False, True])

    first = dict(
        (case.name, found) for case, found in answering.answers(row, cases, lambda: next(looks))
    )
    assert row.asked == list(first) == row.names[:2]

    whole = answers_of(Answering(prompts, ANSWERS, tmp_path), row, cases)
    assert row.asked == row.names  # only the third was asked anew
    assert whole == answers_of(Answering(prompts, ANSWERS, None), row, cases)
    assert not list(tmp_path.rglob(".tmp*"))


def test_answers_are_made_again_when_what_they_come_from_changes(
    row: CountedRow, cases: list[SuiteCase], prompts: Prompts, tmp_path: Path
) -> None:
    one = cases[:1]

    def asked_anew(given: Prompts = prompts, config: AnswerConfig = ANSWERS) -> bool:
        row.asked.clear()
        answers_of(Answering(given, config, tmp_path), row, one)
        return bool(row.asked)

    assert asked_anew() and not asked_anew()
    row.version = "2"
    assert asked_anew()
    assert asked_anew(config=replace(ANSWERS, max_new_tokens=5))
    assert not asked_anew(config=replace(ANSWERS, max_new_tokens=5, rows_per_pass=2))
    assert asked_anew(Prompts(prompts.tokenizer, PromptConfig(prompt_tokens=30)))
    file = next(tmp_path.rglob("*.json"))
    file.write_text("{not json")
    assert asked_anew()
    one[0] = replace(one[0], questions=one[0].questions[1:])
    assert asked_anew()


def test_a_reference_is_cut_where_no_row_can_write_on(prompts: Prompts) -> None:
    def question(target: str) -> Question:
        return Question("commit", "a.py", "", target, 0, 1, 1)

    short = question("\nx = 1\n")
    assert reference(short, prompts, 50) == "x = 1"
    text = "alpha = 1\nbeta = 2\ngamma = 3\n"
    n_two = len(prompts.encode("alpha = 1\nbeta = 2\nga"))
    assert reference(question(text), prompts, n_two) == "alpha = 1\nbeta = 2"
    one_line = reference(question("call(" + "argument, " * 30 + ")"), prompts, 10)
    assert "call(argument".startswith(one_line[:13]) and len(prompts.encode(one_line)) <= 10
