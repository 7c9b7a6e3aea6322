"""The memory family: what it keeps, what it forgets, and what reaches its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from code2lora.errors import UserError
from code2lora.hypernetwork.checkpoint import build_family, load_family, save_checkpoint
from code2lora.hypernetwork.config import (
    CheckpointConfig,
    EncoderConfig,
    HeadConfig,
    MemoryConfig,
    Recipe,
    parse_config,
)
from code2lora.hypernetwork.family import Family
from code2lora.hypernetwork.heads import MemoryHead
from code2lora.hypernetwork.identity import base_fingerprint
from code2lora.hypernetwork.inject import LoraSlots
from code2lora.hypernetwork.memory_family import MemoryFamily
from code2lora.hypernetwork.models import resolve_model
from code2lora.hypernetwork.state import pack, unpack
from tests.hypernetwork import tiny
from tests.hypernetwork.test_encoder_gradients import BLOCKS, GRADIENTS, TEXT, encoder, keys

W = BLOCKS.width
N, K = 3, 4
IDS = torch.arange(4 * 10).view(4, 10) * 37 % tiny.VOCABULARY


def config(recipe: Recipe = GRADIENTS) -> CheckpointConfig:
    return CheckpointConfig(
        family="memory",
        base=tiny.base_config(),
        encoder=EncoderConfig(id="tiny-gradients", width=W, recipe=recipe),
        memory=MemoryConfig(width=W, half_life=2.0, recency=0.4, horizon=2.7),
        head=HeadConfig(
            kind="memory",
            context_width=W,
            trunk_width=0,
            rank=BLOCKS.n_keys,
            alpha=8.0,
            blocks=BLOCKS,
        ),
    )


def _family() -> MemoryFamily:
    torch.manual_seed(3)
    family = build_family(config(), encoder())
    assert isinstance(family, MemoryFamily)
    return family


def _snapshots(n: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    blocks = torch.randn(n, W, generator=generator)
    return torch.cat([blocks, torch.full((n, 1), 10.0)], dim=1)


def _diff(value: float, added: float, removed: float = 0.0) -> Tensor:
    return torch.cat([torch.full((W,), value), torch.tensor([added, removed])])


def test_gradient_reaches_every_parameter() -> None:
    family = _family()
    model = tiny.decoder().requires_grad_(False)
    slots = LoraSlots(model)
    diffs = torch.randn(4, K, W + 2).abs()

    states = family.advance_states(family.start_states(_snapshots(4)), diffs)
    with slots.use(family.lora(states[:, -1])):
        model(input_ids=IDS, labels=IDS).loss.backward()

    without = {n for n, p in family.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == set()


def test_training_and_serving_take_the_same_steps() -> None:
    family = _family()
    diffs = torch.randn(1, K, W + 2).abs()

    states = family.advance_states(family.start_states(_snapshots(1)), diffs)[0]

    state = family.initial(_snapshots(1)[0])
    for k in range(K):
        state = family.advance(state, diffs[0, k])
        flat = torch.cat([state["mean"], state["recent"], state["sizes"]])
        torch.testing.assert_close(flat, states[k + 1].detach())
    lora = family.adapter(state)
    of_training = family.lora(states[-1:])
    torch.testing.assert_close(lora.b["v_proj"], of_training.b["v_proj"][0].detach())
    assert torch.equal(unpack(pack(state))["mean"], state["mean"])


def test_means_stay_means() -> None:
    family = _family()
    state = family.initial(torch.cat([torch.zeros(W), torch.tensor([8.0])]))

    state = family.advance(state, _diff(1.0, added=2.0))
    assert state["mean"][0] == pytest.approx(0.2)  # 2 of 10
    assert state["recent"][0] == pytest.approx(1.0)  # nothing else is recent
    assert state["sizes"].tolist() == pytest.approx([10.0, 2.0])

    state = family.advance(state, _diff(0.0, added=0.0))
    assert state["mean"][0] == pytest.approx(0.2)
    assert state["sizes"].tolist() == pytest.approx([10.0, 2.0 * 0.5**0.5])  # half after two

    state = family.advance(state, _diff(3.0, added=5.0, removed=10.0))  # all that was there
    assert state["mean"][0] == pytest.approx(3.0)
    assert state["sizes"][0] == pytest.approx(5.0)


def test_an_adapter_follows_what_is_recent_as_far_as_it_is_told_to() -> None:
    family = _family()  # recency 0.4, horizon 2.7
    state = family.initial(torch.cat([torch.zeros(W), torch.tensor([1e6])]))

    state = family.advance(state, _diff(1.0, added=2.7))

    flat = torch.cat([state["mean"], state["recent"], state["sizes"]])[None]
    assert family.context(flat)[0, 0].item() == pytest.approx(0.2, rel=1e-3)  # at the horizon, half


def test_an_empty_repository_has_a_generic_adapter() -> None:
    family = _family()
    state = family.initial(torch.zeros(W + 1))
    state = family.advance(state, torch.zeros(W + 2))

    assert all(tensor.isfinite().all() for tensor in state.values())
    generic, own = family.generic(), family.adapter(state)
    for target in generic.b:
        torch.testing.assert_close(own.b[target], generic.b[target])


def test_recentring_moves_the_generic_adapter_alone() -> None:
    family = _family()
    states = family.start_states(_snapshots())
    before, generic = family.lora(states), family.generic()

    family.recentre(states)

    after = family.lora(states)
    for target in before.b:
        torch.testing.assert_close(after.b[target], before.b[target], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(family.generic().b["v_proj"], generic.b["v_proj"])
    mean = torch.stack([before.b["v_proj"][i] for i in range(N)]).mean(0)
    torch.testing.assert_close(family.generic().b["v_proj"], mean, rtol=1e-4, atol=1e-6)


def test_no_step_is_longer_than_what_most_repositories_take() -> None:
    family = _family()
    states = family.start_states(_snapshots(9))
    family.recentre(states)
    head = family.head
    assert isinstance(head, MemoryHead)
    way = family.context(states)[:1] - head.mean
    way = way / way.norm() * head.reach

    at, near, far = (head(head.mean + share * way).b["v_proj"] for share in (1.0, 0.5, 40.0))

    torch.testing.assert_close(far, at)
    assert not torch.allclose(near, at)
    distances = (family.context(states) - head.mean).norm(dim=1)
    assert head.reach == pytest.approx(1.5 * distances.median().item())


def test_it_begins_as_a_gradient_step() -> None:
    """With its first weights, a repository's adapter lowers the loss on what it was told."""
    made = encoder()
    family = build_family(config(), made)
    assert isinstance(family, MemoryFamily) and isinstance(family.head, MemoryHead)
    family.head.begin_at(keys())
    with torch.no_grad():
        for tensor in family.head.b.values():
            tensor.zero_()
    rows = [tiny.tokenizer().encode(TEXT * 3, add_special_tokens=False).ids[:40]]
    blocks = made.gradients(rows, [1])
    model = tiny.decoder()
    slots = LoraSlots(model)
    ids = torch.tensor(rows)
    base = model(input_ids=ids, labels=ids).loss.item()

    with slots.use(family.lora(family.start_states(torch.cat([blocks, torch.ones(1, 1)], 1)))):
        own = model(input_ids=ids, labels=ids).loss.item()

    assert own < base - 1e-4


def test_a_checkpoint_is_written_and_read(tmp_path: Path) -> None:
    family = _family()
    model = tmp_path / "model"
    tiny.decoder().save_pretrained(model / "base")
    tiny.tokenizer().save(str(model / "base" / "tokenizer.json"))
    assert isinstance(family.encoder, type(encoder()))
    family.encoder.save(model / "encoder")
    base = replace(tiny.base_config(), fingerprint=base_fingerprint(model / "base"))
    save_checkpoint(model / "hypernetwork", replace(config(), base=base), family.state_dict())

    loaded = load_family(resolve_model(str(model), tmp_path))

    found: Family = loaded.family
    diff = tiny.diff(tiny.change("a.py", TEXT))
    features = found.read_diffs([diff])[0].features
    same = family.read_diffs([diff])[0].features
    assert torch.cosine_similarity(features, same, dim=0) > 0.999  # perhaps in bfloat16
    state = found.advance(found.initial(_snapshots()[0]), features)
    expected = family.advance(family.initial(_snapshots()[0]), features)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    adapter = family.adapter(expected)
    torch.testing.assert_close(found.adapter(state).b["down_proj"], adapter.b["down_proj"])


def test_configurations_that_do_not_fit_are_refused() -> None:
    import json

    values = json.loads(config().canonical())
    assert parse_config(values, where="config.json") == config()
    without = {key: value for key, value in values.items() if key != "memory"}
    with pytest.raises(UserError, match="memory must be given for family 'memory'"):
        parse_config(without, where="config.json")
    head = {key: value for key, value in values["head"].items() if key != "blocks"}
    with pytest.raises(UserError, match=r"head\.blocks must be given"):
        parse_config({**values, "head": head}, where="config.json")
    whole = config()
    with pytest.raises(UserError, match=r"head\.blocks"):
        build_family(replace(whole, head=replace(whole.head, rank=9)), encoder())
