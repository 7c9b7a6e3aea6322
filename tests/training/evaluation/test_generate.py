from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer

from code2lora.hypernetwork.lora import Lora
from code2lora.training.evaluation.answers import stacked
from code2lora.training.evaluation.generate import Rules, write, writing_rules
from code2lora.training.evaluation.prompts import CONTROL_TOKENS, PromptConfig, Prompts
from code2lora.training.fitting.objective import Frozen
from code2lora.training.pretraining.tokenizer import END_OF_TEXT

PREFIXES = [
    "def anchor_1(almond):\n    return ",
    "x",
    "class Basket:\n\n    def bishop(self",
    "gob",
]


@pytest.fixture
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    maker = Prompts(tokenizer, PromptConfig(prompt_tokens=40))
    return [maker.ids(prefix) for prefix in PREFIXES]


@pytest.fixture
def rules(tokenizer: Tokenizer, base: Frozen) -> Rules:
    return writing_rules(tokenizer, base.lanes[0].model, 12)


def slowly(base: Frozen, prompt: Sequence[int], n_lines: int, rules: Rules) -> str:
    """Write on without a cache, padding or a batch, by the rules as they are documented."""
    ids: list[int] = []
    for _ in range(rules.max_new_tokens):
        with torch.no_grad():
            logits = base.lanes[0].model(torch.tensor([[*prompt, *ids]])).logits[0, -1]
        logits[list(rules.banned)] = float("-inf")
        token = int(logits.argmax())
        if token in rules.ends:
            break
        ids.append(token)
        if rules.tokenizer.decode(ids).lstrip("\r\n").count("\n") >= n_lines:
            break
    text: str = rules.tokenizer.decode(ids)
    return text


def test_a_batch_with_adapters_is_each_prompt_alone_with_its_adapter_set(
    base: Frozen, loras: list[Lora], prompts: list[list[int]], rules: Rules
) -> None:
    index = [2, 0, 1, 0]
    lora, place = stacked(loras, index)

    written = write(base, prompts, [1, 2, 3, 1], rules, lora, place)

    for number, one in enumerate(index):
        base.lanes[0].slots.set(loras[one])
        alone = slowly(base, prompts[number], [1, 2, 3, 1][number], rules)
        base.lanes[0].slots.set(None)
        assert written[number] == alone
    assert len(set(written)) > 1
    assert written != write(base, prompts, [1, 2, 3, 1], rules)


@pytest.mark.parametrize("adapted", [False, True])
def test_texts_that_end_leave_the_others_as_they_are(
    adapted: bool, base: Frozen, loras: list[Lora], prompts: list[list[int]], rules: Rules
) -> None:
    index = [2, 0, 1, 0]
    lora, place = stacked(loras, index) if adapted else (None, None)
    lengths = set()
    for first in range(6):
        # A decoder of random weights writes about any token, so these end texts here and there.
        often = replace(rules, ends=frozenset(range(first, 1 << 16, 6)))

        written = write(base, prompts, [9] * 4, often, lora, place)

        lengths |= {tuple(len(text) for text in written)}
        for prompt, one, text in zip(prompts, index, written, strict=True):
            base.lanes[0].slots.set(loras[one] if adapted else None)
            assert text == slowly(base, prompt, 9, often)
            base.lanes[0].slots.set(None)
    assert any(len({*each}) == 4 for each in lengths)


def test_a_pass_needs_not_have_every_adapter(
    base: Frozen, loras: list[Lora], prompts: list[list[int]], rules: Rules
) -> None:
    lora, place = stacked(loras, [2, 2])
    assert lora is not None and len(lora.a["q_proj"]) == 1
    found = write(base, prompts[:2], [1, 1], rules, lora, place)
    whole = write(base, prompts[:2], [1, 1], rules, loras[2])
    assert found == whole


def test_no_row_writes_a_control_token(
    base: Frozen, prompts: list[list[int]], tokenizer: Tokenizer, rules: Rules
) -> None:
    """A decoder that wants nothing else than a control token is kept from it."""
    wanted = [tokenizer.token_to_id(token) for token in CONTROL_TOKENS if token != END_OF_TEXT]
    assert set(wanted) <= set(rules.banned)
    head = base.lanes[0].model.lm_head
    bias = torch.zeros(head.out_features)
    bias[wanted] = 1e4
    head.register_forward_hook(lambda _, __, output: output + bias)

    written = write(base, prompts, [3] * 4, rules)

    assert all(written) and not any(token in text for text in written for token in CONTROL_TOKENS)


def test_writing_ends_alike_for_every_row(
    base: Frozen, loras: list[Lora], prompts: list[list[int]], tokenizer: Tokenizer, rules: Rules
) -> None:
    """At end of text, after the asked lines, or at the limit, with an adapter or without."""
    head = base.lanes[0].model.lm_head
    newline = tokenizer.encode("x\ny").ids[1]
    assert "\n" in tokenizer.decode([newline])
    wish = torch.zeros(head.out_features)
    head.register_forward_hook(lambda _, __, output: output + wish)
    for lora in (None, loras[0]):
        wish.zero_()
        wish[tokenizer.token_to_id(END_OF_TEXT)] = 1e6
        assert write(base, prompts, [99] * 4, rules, lora) == [""] * 4
        wish.zero_()
        wish[tokenizer.token_to_id("a")] = 1e6
        assert write(base, prompts, [1] * 4, rules, lora) == ["a" * 12] * 4
        wish[newline] = 2e6
        # Blank lines before any text do not count, so they are written up to the limit.
        assert write(base, prompts, [1] * 4, rules, lora) == [tokenizer.decode([newline] * 12)] * 4


def test_lines_end_a_text_once_there_is_text(
    base: Frozen, prompts: list[list[int]], tokenizer: Tokenizer, rules: Rules
) -> None:
    head = base.lanes[0].model.lm_head
    a, newline = tokenizer.token_to_id("a"), tokenizer.encode("x\ny").ids[1]
    turn = [0]

    def alternate(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        wish = torch.zeros_like(output)
        wish[:, [a, newline][turn[0] % 2]] = 1e6
        turn[0] += 1
        return output + wish

    head.register_forward_hook(alternate)
    written = write(base, prompts, [1, 2, 3, 1], rules)
    assert [text.count("\n") for text in written] == [1, 2, 3, 1]
    assert all(text.startswith("a\n") for text in written)


def test_outputs_without_a_token_are_banned(tokenizer: Tokenizer, base: Frozen) -> None:
    model = base.lanes[0].model
    model.config.vocab_size += 2
    banned = writing_rules(tokenizer, model, 4).banned
    assert {tokenizer.get_vocab_size(), tokenizer.get_vocab_size() + 1} <= set(banned)
