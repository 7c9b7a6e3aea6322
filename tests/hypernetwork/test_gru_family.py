"""The family: steps, gradients, centring, and the generic adapter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from code2lora.hypernetwork.checkpoint import build_family
from code2lora.hypernetwork.family import Family
from code2lora.hypernetwork.gru_family import GruFamily
from code2lora.hypernetwork.heads import FactorizedHead
from code2lora.hypernetwork.inject import LoraSlots
from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.projections import TARGETS
from tests.hypernetwork import tiny

KINDS = pytest.mark.parametrize("kind", ["paper", "factorized"])
N, K = 3, 4
IDS = torch.arange(6 * 10).view(6, 10) * 37 % tiny.VOCABULARY


def _family(kind: str) -> GruFamily:
    torch.manual_seed(6)
    family = build_family(tiny.checkpoint_config(kind), tiny.lines_encoder())
    assert isinstance(family, GruFamily)
    return family


def _features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(N, 7, generator=generator), torch.randn(N, K, 14, generator=generator)


def _stir(family: GruFamily) -> None:
    """Leave the zero start of the residual, as the first training step does."""
    if isinstance(family.head, FactorizedHead):
        torch.nn.init.normal_(family.head.residual.weight, std=0.3)


def _assert_lora_close(x: Lora, y: Lora, atol: float = 1e-6) -> None:
    for target in TARGETS:
        torch.testing.assert_close(x.a[target], y.a[target], rtol=0, atol=atol)
        torch.testing.assert_close(x.b[target], y.b[target], rtol=0, atol=atol)


@KINDS
def test_gradient_reaches_every_parameter(kind: str) -> None:
    family = _family(kind)
    _stir(family)
    model = tiny.decoder().requires_grad_(False)
    slots = LoraSlots(model)

    hidden = family.states(*_features())
    with slots.use(family.lora(hidden[:, -1])):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()

    without = {
        name
        for name, parameter in family.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    }
    assert without == set()


def test_residual_learns_at_the_first_step_and_the_rest_from_the_second() -> None:
    family = _family("factorized")
    model = tiny.decoder().requires_grad_(False)
    slots = LoraSlots(model)
    optimizer = torch.optim.SGD(family.parameters(), lr=1.0)

    def silent() -> set[str]:
        optimizer.zero_grad()
        hidden = family.states(*_features())
        with slots.use(family.lora(hidden[:, -1])):
            model(input_ids=IDS, labels=IDS).loss.backward()
        return {
            name.split(".")[0] + "." + name.split(".")[1]
            for name, parameter in family.named_parameters()
            if not (parameter.grad is not None and parameter.grad.abs().sum() > 0)
        }

    assert "head.residual" not in (at_start := silent()) and "head.trunk" in at_start
    optimizer.step()
    assert silent() == set()


def test_factorized_adapters_start_generic() -> None:
    family = _family("factorized")

    lora = family.lora(family.states(*_features())[:, -1])

    assert torch.equal(lora.b["q_proj"][0], lora.b["q_proj"][2])
    _assert_lora_close(
        family.generic(),
        Lora(
            a={t: v[0] for t, v in lora.a.items()},
            b={t: v[0] for t, v in lora.b.items()},
            rank=lora.rank,
            alpha=lora.alpha,
        ),
    )


def test_factorized_head_equals_the_obvious_formula() -> None:
    family = _family("factorized")
    _stir(family)
    head = family.head
    assert isinstance(head, FactorizedHead)
    head.z_mean.normal_()
    context = torch.randn(N, 11)

    lora = head(context)

    z = torch.nn.functional.gelu(context @ head.trunk[0].weight.T + head.trunk[0].bias)
    for n in range(N):
        moved = head.residual.weight @ (z[n] - head.z_mean)
        moved = moved.view(tiny.N_LAYERS, 7, tiny.RANK, tiny.RANK)
        for i, target in enumerate(TARGETS):
            for layer in range(tiny.N_LAYERS):
                core = head.core[layer, i] + moved[layer, i]
                expected = head.b[target][layer] @ core @ head.a[target][layer]
                got = lora.b[target][n, layer] @ lora.a[target][n, layer]
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@KINDS
def test_increments_equal_replay_bit_for_bit(kind: str) -> None:
    family = _family(kind)
    snapshots, diffs = _features()

    def replay(n_commits: int) -> Tensor:
        state = family.initial(snapshots[1])
        for k in range(n_commits):
            state = family.advance(state, diffs[1, k])
        return state["h"]

    once = replay(K)

    assert torch.equal(once, replay(K))
    half = {"h": replay(2)}
    for k in range(2, K):
        half = family.advance(half, diffs[1, k])
    assert torch.equal(half["h"], once)
    assert (once.dtype, once.shape, once.requires_grad) == (torch.float32, (11,), False)


def test_state_does_not_depend_on_where_tensors_lie() -> None:
    """What comes out of a file or of the database is rarely aligned as torch aligns."""
    family = _family("paper")
    snapshots, diffs = _features()
    state = family.initial(snapshots[0])
    expected = family.advance(state, diffs[0, 0])
    adapter = family.adapter(expected)

    def moved(tensor: Tensor, offset: int) -> Tensor:
        place = torch.zeros(tensor.numel() + offset)[offset:]
        return place.copy_(tensor)

    for offset in range(1, 8):
        start = family.initial(moved(snapshots[0], offset))
        assert torch.equal(start["h"], state["h"])
        got = family.advance({"h": moved(start["h"], offset)}, moved(diffs[0, 0], offset + 1))
        assert torch.equal(got["h"], expected["h"])
        again = family.adapter({"h": moved(got["h"], offset)})
        assert all(torch.equal(again.b[t], adapter.b[t]) for t in TARGETS)


@KINDS
def test_batched_states_and_adapters_equal_single_ones(kind: str) -> None:
    family = _family(kind)
    _stir(family)
    snapshots, diffs = _features()

    hidden = family.states(snapshots, diffs)
    lora = family.lora(hidden[:, -1])

    assert hidden.shape == (N, K + 1, 11)
    for n in range(N):
        state = family.initial(snapshots[n])
        for k in range(K):
            torch.testing.assert_close(hidden[n, k], state["h"], rtol=0, atol=1e-6)
            state = family.advance(state, diffs[n, k])
        alone = family.adapter(state)
        for target in TARGETS:
            torch.testing.assert_close(lora.a[target][n], alone.a[target], rtol=0, atol=1e-6)
            torch.testing.assert_close(lora.b[target][n], alone.b[target], rtol=0, atol=1e-6)
    resumed = family.advance_states(hidden[:, 2], diffs[:, 2:])
    torch.testing.assert_close(resumed, hidden[:, 2:], rtol=0, atol=1e-6)


def test_statistics_are_subtracted_and_divided_by() -> None:
    family = _family("factorized")
    snapshots, diffs = _features()
    expected = family.states((snapshots - 2) / 3, (diffs - 4) / 5)

    family.set_statistics(
        diff_mean=torch.full((14,), 4.0),
        diff_scale=torch.tensor(5.0),
        snapshot_mean=torch.full((7,), 2.0),
        snapshot_scale=torch.full((7,), 3.0),
    )

    torch.testing.assert_close(family.states(snapshots, diffs), expected)


@KINDS
def test_recentre_keeps_the_map_and_moves_the_generic_adapter(kind: str) -> None:
    family = _family(kind)
    _stir(family)
    hidden = family.states(*_features())[:, -1].detach()
    before, generic = family.lora(hidden), family.generic()

    family.recentre(hidden)

    _assert_lora_close(family.lora(hidden), before, atol=1e-5)
    assert not torch.equal(family.generic().b["q_proj"], generic.b["q_proj"])


def test_generic_is_the_adapter_of_the_mean_repository() -> None:
    family = _family("factorized")
    _stir(family)
    head = family.head
    assert isinstance(head, FactorizedHead)
    context = torch.randn(1, 11)

    head.recentre(context)
    head.recentre(context)  # folding twice is folding once

    lora = head(context)
    for target in TARGETS:
        torch.testing.assert_close(head.generic().b[target], lora.b[target][0])


def test_a_family_is_a_family() -> None:
    family: Family = _family("paper")
    diff = tiny.diff(tiny.change("a.py", "x = 1\n"))

    (reading,) = family.read_diffs([diff])
    start = family.initial(family.read_snapshot(tiny.snapshot(a="x\n")).features)
    state = family.advance(start, reading.features)
    lora = family.adapter(state)

    assert reading.features.shape == (14,)
    assert {v.dtype for v in [*lora.a.values(), *lora.b.values()]} == {torch.float32}
    assert lora.a["q_proj"].shape == (1, tiny.RANK, 16)
    assert lora.b["q_proj"].shape == (1, 18, tiny.RANK)
