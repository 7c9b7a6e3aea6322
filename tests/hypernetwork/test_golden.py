"""Parity with outputs that the released code computed (method.md, section 10)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from code2lora.hypernetwork.config import GruConfig, HeadConfig
from code2lora.hypernetwork.gru import CommitGRU
from code2lora.hypernetwork.heads import PaperHead
from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.projections import TARGETS

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-6


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _head(name: str, weights: dict[str, Tensor]) -> PaperHead:
    meta = json.loads((GOLDEN / f"{name}.json").read_text())
    sizes = meta["head_config"]
    config = HeadConfig(
        kind="paper",
        context_width=sizes["input_dim"],
        trunk_width=sizes["hidden_dim"],
        rank=sizes["rank"],
        alpha=meta["alpha"],
    )
    head = PaperHead(config, {t: tuple(d) for t, d in sizes["type_dims"].items()})
    result = head.load_state_dict(weights, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["mean_context"], [])
    return head


def _assert_same(lora: Lora, tensors: dict[str, Tensor]) -> None:
    for target in TARGETS:
        a, b = tensors[f"out.A.{target}"], tensors[f"out.B.{target}"]
        torch.testing.assert_close(lora.a[target][:, 0], a, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(lora.b[target][:, 0], b, rtol=0, atol=TOLERANCE)


def test_paper_head_reproduces_the_static_checkpoint() -> None:
    tensors = load_file(GOLDEN / "static.safetensors")
    head = _head("static", _part(tensors, "state."))

    lora = head(tensors["ctx"])

    _assert_same(lora, tensors)
    assert lora.scale == 2.0


def test_gru_and_head_reproduce_the_evolution_checkpoint() -> None:
    tensors = load_file(GOLDEN / "evo.safetensors")
    sizes = json.loads((GOLDEN / "evo.json").read_text())["gru_config"]
    config = GruConfig(
        diff_width=sizes["diff_input_dim"],
        snapshot_width=sizes["repo_state_dim"],
        hidden_width=sizes["hidden_dim"],
    )
    gru = CommitGRU(config)
    gru.load_state_dict(_part(tensors, "gru."))
    head = _head("evo", _part(tensors, "head."))

    with torch.no_grad():
        hidden = gru.initial(tensors["repo_state"])
        torch.testing.assert_close(hidden, tensors["h0"][0], rtol=0, atol=TOLERANCE)
        for k in range(tensors["diffs"].shape[1]):
            hidden = gru.step(hidden, tensors["diffs"][:, k])
            torch.testing.assert_close(hidden, tensors["hs"][k, 0], rtol=0, atol=TOLERANCE)
        context = gru.read_out(hidden)

    torch.testing.assert_close(context, tensors["ctx"], rtol=0, atol=TOLERANCE)
    _assert_same(head(context), tensors)


def test_sequence_equals_single_steps() -> None:
    tensors = load_file(GOLDEN / "evo.safetensors")
    gru = CommitGRU(GruConfig(diff_width=10, snapshot_width=10, hidden_width=10))
    gru.load_state_dict(_part(tensors, "gru."))
    start = gru.initial(tensors["repo_state"])

    states = gru.sequence(start, tensors["diffs"])

    assert states.shape == (1, 6, 10)
    torch.testing.assert_close(states[:, 0], tensors["h0"][0], rtol=0, atol=TOLERANCE)
    after = tensors["hs"][:, 0].transpose(0, 1)
    torch.testing.assert_close(states[:, 1:], after, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(gru.sequence(start, tensors["diffs"][:, :0]), start[:, None])
