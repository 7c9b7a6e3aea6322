"""Injected adapters against the obvious formula, against PEFT, and inside autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from code2lora.errors import UserError
from code2lora.hypernetwork.config import block_of
from code2lora.hypernetwork.inject import LoraSlots
from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.projections import TARGETS
from tests.hypernetwork import tiny

IDS = torch.arange(4 * 13).view(4, 13) * 37 % tiny.VOCABULARY


def _logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


def _merged(model: Any, lora: Lora) -> Any:
    """Return a copy with the adapter added to the weights: the obvious formula."""
    merged = copy.deepcopy(model)
    for i, layer in enumerate(merged.model.layers):
        for target in TARGETS:
            a, b = lora.layer(target, i)
            module = getattr(getattr(layer, block_of(target)), target)
            module.weight.data += lora.alpha / lora.rank * b @ a
    return merged


def _one(lora: Lora, i: int) -> Lora:
    return Lora(
        a={t: v[i] for t, v in lora.a.items()},
        b={t: v[i] for t, v in lora.b.items()},
        rank=lora.rank,
        alpha=lora.alpha,
    )


@pytest.mark.parametrize("n_layers", [1, tiny.N_LAYERS])
def test_injected_adapter_equals_merged_weights(n_layers: int) -> None:
    model = tiny.decoder()
    lora = tiny.random_lora(n_layers=n_layers)
    expected = _logits(_merged(model, lora))
    plain = _logits(model)

    slots = LoraSlots(model)
    slots.set(lora)

    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(_logits(model), expected, rtol=1e-4, atol=1e-5)
    slots.set(None)
    assert torch.equal(_logits(model), plain)


def test_zero_b_changes_nothing() -> None:
    model = tiny.decoder()
    plain = _logits(model)
    lora = tiny.random_lora()
    zero = Lora(a=lora.a, b={t: v * 0 for t, v in lora.b.items()}, rank=lora.rank, alpha=lora.alpha)

    with LoraSlots(model).use(zero):
        assert torch.equal(_logits(model), plain)


def test_batch_of_adapters_equals_one_by_one() -> None:
    model = tiny.decoder()
    slots = LoraSlots(model)
    loras = tiny.random_lora(n=2)

    with slots.use(loras):
        together = _logits(model)  # sequences 0, 1 use adapter 0 and 2, 3 use adapter 1

    for i in range(4):
        with slots.use(_one(loras, i // 2)):
            alone = _logits(model, IDS[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[2]).abs().max() > 0.05


def test_index_maps_sequences_to_adapters() -> None:
    model = tiny.decoder()
    slots = LoraSlots(model)
    loras = tiny.random_lora(n=3)
    index = torch.tensor([2, 0, 2, 1])

    with slots.use(loras, index):
        together = _logits(model)

    for i, adapter in enumerate(index.tolist()):
        with slots.use(_one(loras, adapter)):
            alone = _logits(model, IDS[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_gradient_reaches_earlier_layers_through_the_adapter() -> None:
    """Layer 1's own projections are zero, so the adapter is the only way back to layer 0."""
    model = tiny.decoder()
    for target in TARGETS:
        module = getattr(getattr(model.model.layers[1], block_of(target)), target)
        nn.init.zeros_(module.weight)
    lora = tiny.random_lora()
    early = lora.b["down_proj"].requires_grad_()
    seen: list[Tensor] = []
    model.model.layers[1].mlp.register_full_backward_hook(lambda _m, i, _o: seen.append(i[0]))

    with LoraSlots(model).use(lora):
        model(input_ids=IDS).logits.square().sum().backward()

    assert early.grad is not None and early.grad[0].abs().sum() > 0
    assert seen[0].abs().sum() > 0


def test_product_is_in_the_adapters_dtype_and_the_sum_in_the_activations() -> None:
    linear = nn.Linear(16, 18, dtype=torch.bfloat16)
    model = tiny.decoder().to(torch.bfloat16)
    model.model.layers[0].self_attn.q_proj = linear
    lora = tiny.random_lora(n_layers=1)
    slots = LoraSlots(model)
    x = torch.randn(1, 3, 16, dtype=torch.bfloat16)

    slots.set(lora)
    got = linear(x)

    a, b = lora.layer("q_proj", 0)
    delta = (x.float() @ a.T) @ b.T * lora.scale
    slots.set(None)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, linear(x) + delta.to(torch.bfloat16))


def test_swap_shares_storage() -> None:
    slots = LoraSlots(tiny.decoder())
    lora = tiny.random_lora(n_layers=1)
    slots.set(lora)

    pointers = {pair[0].data_ptr() for pair in slots._active.pairs if pair}  # type: ignore[union-attr]

    assert pointers == {v.data_ptr() for v in lora.a.values()}


def test_use_restores_what_was_set_even_after_an_error() -> None:
    model = tiny.decoder()
    slots = LoraSlots(model)
    slots.set(tiny.random_lora(seed=4))
    before = _logits(model)

    with pytest.raises(RuntimeError), slots.use(tiny.random_lora(seed=5)):
        assert not torch.equal(_logits(model), before)
        raise RuntimeError

    assert torch.equal(_logits(model), before)


def test_remove_leaves_the_model_as_it_was() -> None:
    model = tiny.decoder()
    plain = _logits(model)
    slots = LoraSlots(model)
    slots.set(tiny.random_lora())

    slots.remove()

    assert torch.equal(_logits(model), plain)
    assert not any(module._forward_hooks for module in model.modules())


def test_foreign_adapter_is_refused_and_the_old_one_stays() -> None:
    model = tiny.decoder()
    slots = LoraSlots(model)
    slots.set(tiny.random_lora())
    before = _logits(model)

    with pytest.raises(UserError) as caught:
        slots.set(tiny.random_lora(n_layers=3))

    assert caught.value.message == (
        "the adapter's down_proj has shapes A (3, 5, 20) and B (3, 16, 5), "
        "but the model has 2 layers of 20 -> 16"
    )
    assert caught.value.hint == "use an adapter that was made for this base model"
    assert torch.equal(_logits(model), before)


def test_model_without_the_projections_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        LoraSlots(nn.Linear(2, 3))
    assert caught.value.message == "Linear has no `model.layers`"

    model = tiny.decoder()
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(UserError) as caught:
        LoraSlots(model)
    assert caught.value.message == "layer 1 of Qwen2ForCausalLM has no mlp.up_proj"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_injected_adapter_equals_peft() -> None:
    from peft import LoraConfig, get_peft_model

    lora = tiny.random_lora()
    model = tiny.decoder()
    with LoraSlots(model).use(lora):
        ours = _logits(model)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(TARGETS), lora_dropout=0.0
    )
    peft = get_peft_model(tiny.decoder(), config).eval()
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            _, _, rest = name.partition("layers.")
            layer, _, target, side, *_ = rest.split(".")
            a, b = lora.layer(target, int(layer))
            parameter.data.copy_(a if side == "lora_A" else b)

    torch.testing.assert_close(_logits(peft), ours, rtol=0, atol=1e-4)
