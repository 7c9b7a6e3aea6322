"""States as bytes, and the distance between them."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from code2lora.errors import UserError
from code2lora.hypernetwork.state import drift, pack, pack_tensor, unpack, unpack_tensor

_values = st.lists(st.floats(width=32, allow_nan=False), max_size=8)


@given(st.dictionaries(st.text(min_size=1, max_size=5), _values, min_size=1, max_size=4))
def test_states_survive_the_round_trip(values: dict[str, list[float]]) -> None:
    state = {name: torch.tensor(row, dtype=torch.float32) for name, row in values.items()}

    back = unpack(pack(state))

    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_bytes_do_not_depend_on_order_or_layout() -> None:
    x, y = torch.arange(6.0).view(2, 3), torch.ones(4)

    assert pack({"x": x, "y": y}) == pack({"y": y, "x": x.t().contiguous().t()})


def test_features_survive_the_round_trip() -> None:
    features = torch.randn(5)

    assert torch.equal(unpack_tensor(pack_tensor(features)), features)


def test_damaged_bytes_are_refused() -> None:
    data = pack({"h": torch.ones(4)})

    with pytest.raises(UserError) as caught:
        unpack(data[:-1])
    assert caught.value.message.startswith("a stored state is damaged: ")
    assert caught.value.hint == (
        "stop the daemon and delete the database; the states are computed again from git"
    )
    with pytest.raises(UserError) as caught:
        unpack_tensor(data)
    assert caught.value.message == "stored features are damaged: they hold ['h']"


def test_drift() -> None:
    x = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0])}
    y = {"a": torch.tensor([0.0, 3.0]), "b": torch.tensor([4.0])}
    opposite = {name: -tensor for name, tensor in x.items()}
    zero = {name: tensor * 0 for name, tensor in x.items()}

    assert drift(x, x) == 0.0
    assert drift(x, y) == pytest.approx(1.0)
    assert drift(x, opposite) == pytest.approx(2.0)
    assert drift(x, {"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([0.0])}) == pytest.approx(0)
    assert drift(x, zero) == 1.0
    assert drift(zero, zero) == 0.0
