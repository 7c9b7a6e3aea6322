from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.projections import TARGETS
from code2lora.training.fitting.items import IGNORED
from code2lora.training.fitting.margin import hinge, partners, wrong_adapters
from code2lora.training.fitting.objective import (
    Frozen,
    asked_hidden,
    freeze,
    row_losses,
    row_nll,
    weighed,
)
from tests.training.worlds import make_base


def _adapters(dims: dict[str, tuple[int, int]], n: int) -> Lora:
    generator = torch.Generator().manual_seed(2)
    rank = 3
    a = {t: torch.randn(n, 2, rank, dims[t][0], generator=generator) for t in TARGETS}
    b = {t: torch.randn(n, 2, dims[t][1], rank, generator=generator) for t in TARGETS}
    return Lora(a=a, b=b, rank=rank, alpha=1.0)


def _pick(lora: Lora, i: int) -> Lora:
    a = {t: v[i] for t, v in lora.a.items()}
    b = {t: v[i] for t, v in lora.b.items()}
    return Lora(a=a, b=b, rank=lora.rank, alpha=lora.alpha)


def _rows(n_vocabulary: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, n_vocabulary, (5, 11), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    for row, n_given in enumerate([1, 4, 2, 9, 6]):
        labels[row, :n_given] = IGNORED
    labels[2, 8:] = IGNORED  # padding
    return tokens, labels


def test_row_nll_is_the_likelihood_of_the_asked_tokens_under_each_rows_adapter(
    tokenizer: Tokenizer,
) -> None:
    model, config = make_base(tokenizer)
    base = freeze(model, autocast=False)
    tokens, labels = _rows(tokenizer.get_vocab_size())
    lora, index = _adapters(config.dims, 3), torch.tensor([2, 0, 0, 1, 2])

    nll, n_tokens = row_nll(base, tokens, labels, lora, index)

    assert n_tokens.tolist() == [10, 7, 6, 2, 5]
    for row in range(5):
        with base.lanes[0].slots.use(_pick(lora, int(index[row]))):
            log_p = base.lanes[0].model(input_ids=tokens[row : row + 1]).logits[0].log_softmax(-1)
        expected = sum(
            -log_p[t - 1, tokens[row, t]] for t in range(11) if labels[row, t] != IGNORED
        )
        torch.testing.assert_close(nll[row], torch.as_tensor(expected), rtol=1e-4, atol=1e-4)


def test_the_base_gets_no_gradient_and_the_adapters_do(tokenizer: Tokenizer) -> None:
    model, config = make_base(tokenizer)
    base = freeze(model, autocast=True)
    tokens, labels = _rows(tokenizer.get_vocab_size())
    lora = _adapters(config.dims, 5)
    for tensor in (*lora.a.values(), *lora.b.values()):
        tensor.requires_grad_()

    nll, _ = row_nll(base, tokens, labels, lora, torch.arange(5))
    torch.autograd.backward(nll.sum())

    assert all(parameter.grad is None for parameter in model.parameters())
    for tensor in (*lora.a.values(), *lora.b.values()):
        assert tensor.grad is not None
        assert tensor.grad.flatten(1).abs().sum(1).gt(0).all()


@pytest.mark.parametrize(
    ("power", "loss"),
    [
        (1.0, (8.0 + 6.0) / (16 + 4)),  # of a token
        (0.5, (4 * 0.5 + 2 * 1.5) / (4 + 2)),
        (0.0, (0.5 + 1.5) / 2),  # of a row
    ],
)
def test_rows_weigh_a_power_of_their_length(power: float, loss: float) -> None:
    nll, n_tokens = torch.tensor([8.0, 6.0]), torch.tensor([16, 4])

    target, weight = weighed(nll, n_tokens, power)

    assert (target.sum() / weight.sum()).item() == pytest.approx(loss)


def test_a_wrong_adapter_is_always_of_another_repository_of_the_group() -> None:
    group_of = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    repository_of = torch.tensor([0, 0, 0, 1, 2, 3, 4])
    rows = torch.tensor([0, 1, 2, 3, 4, 5, 5, 6])

    wrong = wrong_adapters(group_of, repository_of, rows)

    assert wrong.tolist() == [3, 3, 3, 0, 5, 4, 4, -1]


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, [[0]]), (2, [[0, 1]]), (3, [[0, 1, 2]]), (5, [[0, 1], [2, 3, 4]])],
)
def test_every_window_has_a_partner_if_there_are_two(n: int, expected: list[list[int]]) -> None:
    assert partners(n) == expected


def test_the_margin_falls_as_the_own_adapter_gets_better_and_stops_at_the_margin() -> None:
    own = torch.tensor([1.0, 1.0, 1.0], requires_grad=True)
    wrong = torch.tensor([0.9, 1.05, 1.5], requires_grad=True)

    loss = hinge(own, wrong, 0.1)
    torch.autograd.backward(loss.sum())

    assert loss.tolist() == pytest.approx([0.2, 0.05, 0.0], abs=1e-6)
    assert own.grad is not None and wrong.grad is not None
    assert own.grad.tolist() == [1.0, 1.0, 0.0]
    assert wrong.grad.tolist() == [-1.0, -1.0, 0.0]


def test_lanes_give_the_losses_and_gradients_of_one(tokenizer: Tokenizer) -> None:
    model, config = make_base(tokenizer)
    tokens, labels = _rows(tokenizer.get_vocab_size())
    found = []
    for n_lanes in (1, 3):
        base = freeze(model, autocast=False, n_lanes=n_lanes)
        lora = _adapters(config.dims, 3)
        leaves = [tensor.requires_grad_() for tensor in (*lora.a.values(), *lora.b.values())]
        nll, _ = row_nll(base, tokens, labels, lora, torch.tensor([2, 0, 0, 1, 2]))
        weighted = (nll * torch.arange(1.0, 6.0)).sum()
        found.append([nll.detach(), *torch.autograd.grad(weighted, leaves)])

    for one, three in zip(*found, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-4)


def test_rows_in_several_passes_are_put_back_in_order(tokenizer: Tokenizer) -> None:
    model, config = make_base(tokenizer)
    tokens, labels = _rows(tokenizer.get_vocab_size())
    lora, index = _adapters(config.dims, 3), torch.tensor([2, 0, 0, 1, 2])
    expected, _ = row_nll(freeze(model, autocast=False), tokens, labels, lora, index)

    base = freeze(make_base(tokenizer)[0], autocast=False, rows_per_pass=2)
    nll, _ = row_nll(base, tokens, labels, lora, index)

    torch.testing.assert_close(nll, expected, rtol=1e-4, atol=1e-4)


def test_lanes_share_the_weights(tokenizer: Tokenizer) -> None:
    model, _ = make_base(tokenizer)

    base = freeze(model, autocast=False, n_lanes=2)

    first, second = (lane.model.model.embed_tokens.weight for lane in base.lanes)
    assert first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_gives_the_losses_and_gradients_of_none(
    tokenizer: Tokenizer, autocast: bool
) -> None:
    """In passes of two rows, so that a pass is computed again after another's adapters."""
    tokens, labels = _rows(tokenizer.get_vocab_size())
    found = []
    for checkpointing in (False, True):
        model, config = make_base(tokenizer)
        base = freeze(model, autocast=autocast, rows_per_pass=2, checkpointing=checkpointing)
        lora = _adapters(config.dims, 3)
        leaves = [tensor.requires_grad_() for tensor in (*lora.a.values(), *lora.b.values())]
        nll, _ = row_nll(base, tokens, labels, lora, torch.tensor([2, 0, 0, 1, 2]))
        weighted = (nll * torch.arange(1.0, 6.0)).sum()
        found.append([nll.detach(), *torch.autograd.grad(weighted, leaves)])

    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)


def test_checkpointing_computes_the_layers_again(tokenizer: Tokenizer) -> None:
    tokens, labels = _rows(tokenizer.get_vocab_size())
    counts = []
    for checkpointing in (False, True):
        model, config = make_base(tokenizer)
        base = freeze(model, autocast=False, checkpointing=checkpointing)
        n_calls = []
        layer = base.lanes[0].model.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, seen=n_calls: seen.append(1))
        lora = _adapters(config.dims, 5)
        lora.b["q_proj"].requires_grad_()
        nll, _ = row_nll(base, tokens, labels, lora, torch.arange(5))
        torch.autograd.backward(nll.sum())
        counts.append(len(n_calls))

    assert counts == [1, 2]


def test_gradients_in_bfloat16_point_the_same_way(tokenizer: Tokenizer) -> None:
    tokens, labels = _rows(tokenizer.get_vocab_size())
    found = []
    for autocast in (False, True):
        model, config = make_base(tokenizer)
        lora = _adapters(config.dims, 5)
        leaves = [tensor.requires_grad_() for tensor in (*lora.a.values(), *lora.b.values())]
        base = freeze(model, autocast=autocast)
        nll, _ = row_nll(base, tokens, labels, lora, torch.arange(5))
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(nll.sum(), leaves)]))

    assert torch.cosine_similarity(*found, dim=0) > 0.9


def test_the_divergence_is_from_the_base_that_sees_more(tokenizer: Tokenizer) -> None:
    model, config = make_base(tokenizer)
    base = freeze(model, autocast=False, rows_per_pass=2)
    tokens, labels = _rows(tokenizer.get_vocab_size())
    shown = torch.cat([tokens.flip(1), tokens], dim=1)  # other tokens in front
    shown_labels = torch.cat([torch.full_like(labels, IGNORED), labels], dim=1)
    hidden = asked_hidden(base, shown, shown_labels)
    lora = _adapters(config.dims, 1)
    leaf = lora.b["q_proj"].requires_grad_()
    teachers = [hidden[0], None, hidden[2], None, None]

    _, divergence, _ = row_losses(base, tokens, labels, lora, torch.zeros(5).long(), teachers)
    (gradient,) = torch.autograd.grad(divergence.sum(), leaf)

    with torch.no_grad(), base.lanes[0].slots.use(_pick(lora, 0)):
        student = model_logits(base, tokens)
    teacher = model_logits(base, shown)
    for row in (0, 2):
        asked = labels[row, 1:] != IGNORED
        log_q = student[row, :-1][asked].log_softmax(-1)
        log_p = teacher[row, 11:-1][asked].log_softmax(-1)
        expected = (log_p.exp() * (log_p - log_q)).sum()
        torch.testing.assert_close(divergence[row], expected, rtol=1e-3, atol=1e-4)
    assert divergence[[1, 3, 4]].tolist() == [0.0, 0.0, 0.0]
    assert gradient.abs().sum() > 0


@torch.no_grad()
def model_logits(base: Frozen, tokens: Tensor) -> Tensor:
    logits: Tensor = base.lanes[0].model(input_ids=tokens).logits
    return logits
