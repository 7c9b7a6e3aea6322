"""Released `.pt` layouts, fabricated from the golden tensors, become checkpoints of ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from code2lora.errors import UserError
from code2lora.hypernetwork.checkpoint import AnyFamily, build_family, read_config
from code2lora.hypernetwork.config import BaseConfig, EncoderConfig
from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.projections import TARGETS
from code2lora.hypernetwork.released import convert_released
from tests.hypernetwork import tiny

GOLDEN = Path(__file__).parents[1] / "golden"
ENCODER = EncoderConfig(id="tiny", width=5, recipe=tiny.PAPER)


class _Encoder:
    """Stands for a transformer of the golden width; nothing is encoded here."""

    recipe = tiny.PAPER
    width = 5


def _base(sizes: dict[str, Any]) -> BaseConfig:
    dims = {target: (d[0], d[1]) for target, d in sizes["type_dims"].items()}
    return BaseConfig(id="golden", n_layers=3, dims=dims)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _load(path: Path) -> AnyFamily:
    family = build_family(read_config(path), _Encoder())  # type: ignore[arg-type]
    family.load_state_dict(load_file(path / "model.safetensors"))
    return family


def _assert_same(lora: Lora, tensors: dict[str, Tensor], row: int) -> None:
    for target in TARGETS:
        a, b = tensors[f"out.A.{target}"][row], tensors[f"out.B.{target}"][row]
        torch.testing.assert_close(lora.a[target][0], a, rtol=0, atol=1e-6)
        torch.testing.assert_close(lora.b[target][0], b, rtol=0, atol=1e-6)


def _evolution() -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = load_file(GOLDEN / "evo.safetensors")
    meta = json.loads((GOLDEN / "evo.json").read_text())
    archive = {
        "gru_state": _part(tensors, "gru."),
        "head_state": _part(tensors, "head."),
        "head_config": meta["head_config"],
        "gru_config": meta["gru_config"],
        "type_dims": meta["head_config"]["type_dims"],
        "args": {"alpha": meta["alpha"], "lr": 5e-5},
        "per_step_input": meta["per_step_input"],
    }
    return archive, tensors


def test_evolution_layout(tmp_path: Path) -> None:
    archive, tensors = _evolution()
    torch.save(archive, tmp_path / "gru.pt")

    convert_released(
        tmp_path / "gru.pt", tmp_path / "out", base=_base(archive["head_config"]), encoder=ENCODER
    )

    family = _load(tmp_path / "out")
    state = family.initial(tensors["repo_state"][0])
    for diff in tensors["diffs"][0]:
        state = family.advance(state, diff)
    lora = family.adapter(state)
    _assert_same(lora, tensors, 0)
    assert (lora.alpha, lora.rank) == (4.0, 2)
    recipe = read_config(tmp_path / "out").encoder.recipe
    assert recipe == replace(ENCODER.recipe, stream="assertions")


def test_static_layout(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "static.safetensors")
    meta = json.loads((GOLDEN / "static.json").read_text())
    archive = {
        "state_dict": _part(tensors, "state."),
        "config": meta["head_config"],
        "type_dims": meta["head_config"]["type_dims"],
        "args": {},
    }
    torch.save(archive, tmp_path / "head.pt")

    convert_released(
        tmp_path / "head.pt", tmp_path / "out", base=_base(meta["head_config"]), encoder=ENCODER
    )

    family = _load(tmp_path / "out")
    for row, context in enumerate(tensors["ctx"]):
        _assert_same(family.adapter(family.initial(context)), tensors, row)
    assert read_config(tmp_path / "out").head.alpha == 32.0  # the released default
    assert read_config(tmp_path / "out").encoder == ENCODER  # nothing advances


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('ran')",))


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    archive, _ = _evolution()
    torch.save(archive | {"args": _Payload()}, tmp_path / "gru.pt")

    with pytest.raises(UserError) as caught:
        convert_released(
            tmp_path / "gru.pt",
            tmp_path / "out",
            base=_base(archive["head_config"]),
            encoder=ENCODER,
        )

    start = f"{tmp_path / 'gru.pt'} cannot be read as a released checkpoint: "
    assert caught.value.message.startswith(start)
    assert caught.value.hint == (
        "download it again; files that need more than tensors are never loaded"
    )


def test_wrong_archives(tmp_path: Path) -> None:
    archive, _ = _evolution()
    file = tmp_path / "gru.pt"
    base = _base(archive["head_config"])

    def message(content: object, base: BaseConfig = base) -> str:
        torch.save(content, file)
        with pytest.raises(UserError) as caught:
            convert_released(file, tmp_path / "out", base=base, encoder=ENCODER)
        return caught.value.message

    assert message([1]) == f"{file} holds a list, expected a dictionary"
    assert message({"b": 1, "a": 2}) == (
        f"{file} holds a, b, which is not a released checkpoint layout"
    )
    assert message(archive | {"gru_config": {}}) == (
        f"{file} lacks 'diff_input_dim', which released checkpoints have"
    )
    assert message(archive | {"per_step_input": "concat"}) == (
        "the checkpoint's GRU reads 'concat', but only 'diff' is known"
    )
    other = BaseConfig(id="other", n_layers=2, dims=base.dims | {"q_proj": (8, 9)})
    assert message(archive, other).endswith(
        f"but other has {json.dumps(other.dims, sort_keys=True)}"
    )
    assert not (tmp_path / "out").exists()

    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError) as caught:
        convert_released(file, tmp_path / "out", base=base, encoder=ENCODER)
    assert caught.value.message.startswith(f"{file} cannot be read as a released checkpoint: ")
