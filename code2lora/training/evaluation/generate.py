"""Let a decoder write on: greedily, many prompts at once, each with its own adapter.

The rules are the same for every row of a comparison, whatever its adapter or context: control
tokens are never written, and a text ends at an end-of-text token, after the lines that were asked
for, or when it is as long as it may get.

N = prompts of a pass, T = tokens of the longest, A = adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from code2lora.hypernetwork.lora import Lora
from code2lora.training.fitting.objective import Frozen
from code2lora.training.pretraining.tokenizer import END_OF_TEXT


@dataclass(frozen=True)
class Rules:
    """When a text ends, and which tokens are never written."""

    tokenizer: Tokenizer
    ends: frozenset[int]
    banned: tuple[int, ...]
    max_new_tokens: int


def writing_rules(tokenizer: Tokenizer, model: PreTrainedModel, max_new_tokens: int) -> Rules:
    """Return the rules for a decoder.

    Every added token of the tokenizer is banned, but for those that end a text; so is every
    output of the decoder that the tokenizer has no token for.
    """
    given = getattr(model.generation_config, "eos_token_id", None)
    given = model.config.eos_token_id if given is None else given
    ends = {given} if isinstance(given, int) else set(given or ())
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    ends |= set() if end_of_text is None else {end_of_text}
    unused = range(tokenizer.get_vocab_size(), int(model.config.vocab_size))
    banned = {*tokenizer.get_added_tokens_decoder(), *unused} - ends
    return Rules(tokenizer, frozenset(ends), tuple(sorted(banned)), max_new_tokens)


@torch.no_grad()
def write(
    base: Frozen,
    prompts: Sequence[Sequence[int]],
    n_lines: Sequence[int],
    rules: Rules,
    lora: Lora | None = None,
    index: Tensor | None = None,
) -> list[str]:
    """Return what the decoder writes after each prompt.

    prompts: N rows of tokens, none empty   n_lines: how many lines are asked for, N
    lora: A adapters, one without a batch axis for all prompts, or None
    index: (N,) which adapter each prompt has
    """
    model, slots = base.lanes[0].model, base.lanes[0].slots
    device = base.device
    tokens, mask = (each.to(device) for each in _pad_left(prompts))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    banned = torch.tensor(rules.banned, dtype=torch.long, device=device)
    written = [_Written(rules, asked) for asked in n_lines]
    writing = written
    cache = DynamicCache(config=model.config)
    if lora is not None:
        # Gathered once here rather than for every token.
        lora = _of_rows(lora, index).to(device, next(iter(lora.a.values())).dtype)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=base.autocast)
    for _ in range(rules.max_new_tokens):
        with cast, slots.use(lora):
            output = model.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            logits = model.lm_head(output.last_hidden_state[:, -1]).float()
        logits[:, banned] = float("-inf")
        chosen = logits.argmax(1)
        for row, token in zip(writing, chosen.tolist(), strict=True):
            row.take(token)
        left = [place for place, row in enumerate(writing) if not row.done]
        if not left:
            break
        if len(left) < len(writing):
            kept = torch.tensor(left, device=device)
            cache.batch_select_indices(kept)
            chosen, mask, positions = chosen[kept], mask[kept], positions[kept]
            if lora is not None and index is not None:
                lora = _of_rows(lora, kept)
            writing = [writing[place] for place in left]
        tokens, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return [row.text for row in written]


def _of_rows(lora: Lora, index: Tensor | None) -> Lora:
    """Return an adapter for each row: those at `index` of the batch, or with None the only one."""
    if index is None:
        return lora
    a = {target: tensor[index.to(tensor.device)] for target, tensor in lora.a.items()}
    b = {target: tensor[index.to(tensor.device)] for target, tensor in lora.b.items()}
    return Lora(a=a, b=b, rank=lora.rank, alpha=lora.alpha)


class _Written:
    """What one row has written, and whether it is done."""

    def __init__(self, rules: Rules, n_lines: int) -> None:
        self._rules = rules
        self._n_lines = n_lines
        self._ids: list[int] = []
        self.text = ""
        self.done = False

    def take(self, token: int) -> None:
        """Add a token, unless the row is done or the token ends it."""
        if self.done or token in self._rules.ends:
            self.done = True
            return
        self._ids.append(token)
        self.text = self._rules.tokenizer.decode(self._ids)
        # Blank lines before the first text are not among those asked for.
        self.done = self.text.lstrip("\r\n").count("\n") >= self._n_lines


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return (tokens, mask), each (N, T), so that every prompt ends in the last column."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    return tokens, mask
