from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from code2lora.hypernetwork.lora import Lora
from code2lora.training.audit.geometry import geometry, gram

DIMS = {"q_proj": (7, 11), "down_proj": (13, 5)}
N_LAYERS = 3


def make_lora(seed: int, *, rank: int, shared: bool = False, alpha: float = 6.0) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    n = 1 if shared else N_LAYERS
    return Lora(
        a={t: torch.randn(n, rank, d_in, generator=generator) for t, (d_in, _) in DIMS.items()},
        b={t: torch.randn(n, d_out, rank, generator=generator) for t, (_, d_out) in DIMS.items()},
        rank=rank,
        alpha=alpha,
    )


def flat(lora: Lora) -> Tensor:
    """The slow way: every module's weight change in every layer, as one vector."""
    parts = []
    for target in DIMS:
        for layer in range(N_LAYERS):
            a, b = lora.layer(target, layer)
            parts.append((lora.scale * b.double() @ a.double()).flatten())
    return torch.cat(parts)


LORAS = [
    make_lora(0, rank=2),
    make_lora(1, rank=4, alpha=2.0),
    make_lora(2, rank=3, shared=True),
    make_lora(3, rank=2),
]


def test_products_are_those_of_the_weight_changes() -> None:
    vectors = torch.stack([flat(lora) for lora in LORAS])

    found = gram(LORAS, n_layers=N_LAYERS)

    assert found.dtype == np.float64
    np.testing.assert_allclose(found, (vectors @ vectors.T).numpy(), rtol=1e-12, atol=1e-9)


def test_adapters_that_all_layers_share_count_in_each_layer() -> None:
    shared = [make_lora(seed, rank=3, shared=True) for seed in range(2)]
    vectors = torch.stack([flat(lora) for lora in shared])

    found = gram(shared, n_layers=N_LAYERS)

    np.testing.assert_allclose(found, (vectors @ vectors.T).numpy(), rtol=1e-12)


def test_the_geometry_is_that_of_the_long_vectors() -> None:
    vectors = torch.stack([flat(lora) for lora in LORAS])

    found = geometry("abcd", gram(LORAS, n_layers=N_LAYERS))

    units = vectors / vectors.norm(dim=1, keepdim=True)
    centred = vectors - vectors.mean(0)
    spread = torch.linalg.svdvals(centred) ** 2
    assert found.names == ("a", "b", "c", "d")
    np.testing.assert_allclose(found.cosine, (units @ units.T).numpy(), atol=1e-12)
    np.testing.assert_allclose(
        found.residual_ratio, (centred.norm(dim=1) / vectors.norm(dim=1)).numpy(), rtol=1e-9
    )
    expected = (spread.sum() ** 2 / (spread**2).sum()).item()
    assert found.participation_ratio == pytest.approx(expected, rel=1e-9)
    assert 1 < found.participation_ratio <= 3


def test_equal_adapters_have_no_residual() -> None:
    found = geometry("ab", gram([LORAS[0], LORAS[0]], n_layers=N_LAYERS))

    np.testing.assert_allclose(found.cosine, 1.0)
    assert found.residual_ratio.tolist() == [0.0, 0.0]
    assert found.participation_ratio == 0.0


def test_adapters_on_a_line_fill_one_direction() -> None:
    def times(factor: float) -> Lora:
        lora = LORAS[0]
        b = {target: factor * tensor for target, tensor in lora.b.items()}
        return Lora(a=lora.a, b=b, rank=lora.rank, alpha=lora.alpha)

    found = geometry("abc", gram([times(1), times(2), times(-4)], n_layers=N_LAYERS))

    assert found.participation_ratio == pytest.approx(1.0)
    assert found.cosine[0, 2] == pytest.approx(-1.0)


def test_an_adapter_that_changes_nothing_has_no_angle() -> None:
    lora = LORAS[0]
    nothing = Lora(
        a=lora.a, b={t: 0 * b for t, b in lora.b.items()}, rank=lora.rank, alpha=lora.alpha
    )

    found = geometry("ab", gram([lora, nothing], n_layers=N_LAYERS))

    assert found.cosine[0].tolist() == [pytest.approx(1.0), 0.0]
    assert found.residual_ratio.tolist() == [pytest.approx(0.5), 0.0]
