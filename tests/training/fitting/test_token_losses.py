from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from code2lora.training.fitting import token_losses
from code2lora.training.fitting.token_losses import token_divergence, token_nll


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens at a time, so that eleven take several pieces and a rest."""
    monkeypatch.setattr(token_losses, "_LOGITS_AT_ONCE", 3 * 29)


def _given() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden, teacher = (torch.randn(11, 7, generator=generator) for _ in range(2))
    head = torch.randn(29, 7, generator=generator)
    return hidden, teacher, head, torch.randint(0, 29, (11,), generator=generator)


def test_token_nll_and_its_gradient_are_those_of_the_plain_way() -> None:
    hidden, _, head, targets = _given()
    weights = torch.arange(1.0, 12.0)
    found = []
    for plain in (True, False):
        leaf = hidden.clone().requires_grad_()
        if plain:
            nll = nn.functional.cross_entropy(leaf @ head.T, targets, reduction="none")
        else:
            nll = token_nll(leaf, head, targets)
        found.append((nll.detach(), *torch.autograd.grad((nll * weights).sum(), leaf)))

    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_divergence_and_its_gradient_are_those_of_the_plain_way() -> None:
    hidden, teacher, head, _ = _given()
    weights = torch.arange(1.0, 12.0)
    found = []
    for plain in (True, False):
        leaf = hidden.clone().requires_grad_()
        if plain:
            student = (leaf @ head.T).log_softmax(-1)
            target = (teacher @ head.T).log_softmax(-1)
            kl = nn.functional.kl_div(student, target, log_target=True, reduction="none").sum(-1)
        else:
            kl = token_divergence(leaf, teacher, head)
        found.append((kl.detach(), *torch.autograd.grad((kl * weights).sum(), leaf)))

    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    hidden, _, head, _ = _given()
    leaf = hidden.clone().requires_grad_()

    kl = token_divergence(leaf, hidden, head)
    (gradient,) = torch.autograd.grad(kl.sum(), leaf)

    torch.testing.assert_close(kl, torch.zeros(11), atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient, torch.zeros(11, 7), atol=1e-5, rtol=0)


def test_nothing_is_kept_without_gradients() -> None:
    hidden, teacher, head, targets = _given()

    assert not token_nll(hidden, head, targets).requires_grad
    assert not token_divergence(hidden, teacher, head).requires_grad


def test_bfloat16_is_near() -> None:
    hidden, _, head, targets = _given()
    expected = token_nll(hidden, head, targets)

    found = token_nll(hidden.bfloat16(), head, targets)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)
