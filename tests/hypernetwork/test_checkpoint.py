"""Checkpoint directories: round trip, identity, and every way to be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from code2lora.errors import UserError
from code2lora.hypernetwork.checkpoint import (
    base_fingerprint,
    build_family,
    fingerprint,
    load_family,
    read_config,
    save_checkpoint,
)
from code2lora.hypernetwork.config import (
    AuditRecord,
    AuditTest,
    CheckpointConfig,
    HeadConfig,
    decoder_dims,
    parse_config,
)
from code2lora.hypernetwork.gru_family import GruFamily
from code2lora.hypernetwork.identity import encoder_fingerprint, write_config
from code2lora.hypernetwork.models import ModelPaths, resolve_model
from code2lora.hypernetwork.static_family import StaticFamily
from tests.hypernetwork import tiny


@dataclass
class Made:
    paths: ModelPaths
    family: Any
    config: CheckpointConfig
    fingerprint: str


def _make(root: Path, config: CheckpointConfig) -> Made:
    path = root / "tiny"
    encoder = tiny.lines_encoder()
    encoder.save(path / "encoder")
    tiny.decoder().save_pretrained(path / "base")
    encoder_print = encoder_fingerprint(path / "encoder", tiny.LINES)
    config = replace(
        config,
        encoder=replace(config.encoder, fingerprint=encoder_print),
        base=replace(config.base, fingerprint=base_fingerprint(path / "base")),
    )
    torch.manual_seed(8)
    family = build_family(config, encoder)
    for parameter in family.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    made_print = save_checkpoint(path / "hypernetwork", config, family.state_dict())
    return Made(resolve_model(str(path), root), family, config, made_print)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return _make(tmp_path, tiny.checkpoint_config())


def _refused(call: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        call()
    return caught.value


def _edit(made: Made, change: Callable[[dict[str, Any]], None]) -> Path:
    file = made.paths.hypernetwork / "config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
    return file


@pytest.mark.parametrize("kind", ["factorized", "paper"])
def test_a_loaded_family_gives_the_same_adapter(tmp_path: Path, kind: str) -> None:
    made = _make(tmp_path, tiny.checkpoint_config(kind))
    snapshot = tiny.snapshot(a="import os\n")
    diff = tiny.diff(tiny.change("a.py", added="x = 1\n"))

    loaded = load_family(made.paths)

    assert isinstance(loaded.family, GruFamily)
    loras = []
    for family in (made.family, loaded.family):
        state = family.initial(family.read_snapshot(snapshot).features)
        (reading,) = family.read_diffs([diff])
        loras.append(family.adapter(family.advance(state, reading.features)))
    assert all(torch.equal(loras[0].a[t], loras[1].a[t]) for t in loras[0].a)
    assert all(torch.equal(loras[0].b[t], loras[1].b[t]) for t in loras[0].b)
    assert loaded.config == made.config
    assert loaded.fingerprint == made.fingerprint == fingerprint(made.paths.hypernetwork)
    assert not any(parameter.requires_grad for parameter in loaded.family.parameters())


def test_static_family_keeps_its_anchor(tmp_path: Path) -> None:
    config = tiny.checkpoint_config("paper")
    config = replace(config, family="static", gru=None, head=replace(config.head, context_width=7))
    made = _make(tmp_path, config)

    family = load_family(made.paths).family

    assert isinstance(family, StaticFamily)
    features = family.read_snapshot(tiny.snapshot(a="import os\n")).features
    state = family.initial(features)
    assert torch.equal(state["snapshot"], features)
    (unread,) = family.read_diffs([tiny.diff(tiny.change("a.py", added="x\n"))])
    assert unread.features.numel() == 0
    assert torch.equal(family.advance(state, unread.features)["snapshot"], features)
    expected = made.family.head(features[None]).b["q_proj"][0]
    torch.testing.assert_close(family.adapter(state).b["q_proj"], expected)
    zero = made.family.head(torch.zeros(1, 7)).b["q_proj"][0]
    torch.testing.assert_close(family.generic().b["q_proj"], zero)


def test_saving_is_deterministic(made: Made, tmp_path: Path) -> None:
    again = save_checkpoint(tmp_path / "again", made.config, made.family.state_dict())

    assert again == made.fingerprint
    for name in ("config.json", "model.safetensors"):
        first = (made.paths.hypernetwork / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == first
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_fingerprint_changes_with_every_byte_of_the_weights(made: Made) -> None:
    file = made.paths.hypernetwork / "model.safetensors"
    data = file.read_bytes()
    for position in (9, len(data) // 3, len(data) - 1):
        flipped = bytearray(data)
        flipped[position] ^= 1
        file.write_bytes(flipped)
        assert fingerprint(made.paths.hypernetwork) != made.fingerprint
    file.write_bytes(data)
    assert fingerprint(made.paths.hypernetwork) == made.fingerprint

    _edit(made, lambda values: values["head"].update(alpha=9.0))
    assert fingerprint(made.paths.hypernetwork) != made.fingerprint


def test_fingerprint_ignores_how_the_configuration_is_spaced(made: Made) -> None:
    file = made.paths.hypernetwork / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=7))

    assert fingerprint(made.paths.hypernetwork) == made.fingerprint


def test_fingerprint_ignores_what_was_measured(made: Made) -> None:
    """A figure that is added to a published checkpoint must not orphan the states made with it."""
    record = AuditRecord(
        verdict="failed",
        tests={"own_minus_base": AuditTest(passed=True, mean=-0.2, low=-0.3, high=-0.1)},
        n_repositories=3,
        n_items=12,
        settings="digest",
    )

    write_config(made.paths.hypernetwork, replace(made.config, audit=record, metrics={"own": 1.5}))

    loaded = load_family(made.paths)
    assert loaded.fingerprint == made.fingerprint
    assert (loaded.config.audit, loaded.config.metrics) == (record, {"own": 1.5})
    other = replace(made.config, base=replace(made.config.base, id="x"))
    write_config(made.paths.hypernetwork, other)
    assert fingerprint(made.paths.hypernetwork) != made.fingerprint


def test_a_configuration_from_before_audits_is_read(made: Made) -> None:
    _edit(made, lambda values: values.pop("audit"))

    loaded = load_family(made.paths)

    assert loaded.config.audit is None
    assert loaded.fingerprint == made.fingerprint


def test_truncated_weights(made: Made) -> None:
    file = made.paths.hypernetwork / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    error = _refused(lambda: load_family(made.paths))

    assert error.message.startswith(f"{file} is damaged: ")
    assert error.hint == "fetch or copy the model again"


def test_missing_weights(made: Made) -> None:
    file = made.paths.hypernetwork / "model.safetensors"
    file.unlink()

    assert _refused(lambda: load_family(made.paths)).message == f"{file} is missing"


def test_truncated_configuration(made: Made) -> None:
    file = made.paths.hypernetwork / "config.json"
    file.write_text(file.read_text()[:50])

    error = _refused(lambda: read_config(made.paths.hypernetwork))

    assert error.message.startswith(f"{file} cannot be read: ")


def test_another_base_model(made: Made) -> None:
    base = made.paths.base / "config.json"
    values = json.loads(base.read_text())
    base.write_text(json.dumps(values | {"intermediate_size": 21}))

    error = _refused(lambda: load_family(made.paths))

    assert error.message == (
        f"the checkpoint is for base model tiny, but {made.paths.base} has other dimensions"
    )
    assert error.hint == "use tiny, or a checkpoint made for this base model"


def test_base_model_with_other_weights(made: Made) -> None:
    tiny.decoder(seed=9).save_pretrained(made.paths.base)

    assert _refused(lambda: load_family(made.paths)).message == (
        f"the checkpoint is for base model tiny, but {made.paths.base} has other weights"
    )


def test_encoder_of_another_width(made: Made) -> None:
    tiny.lines_encoder(width=8).save(made.paths.encoder)
    _edit(made, lambda values: values["encoder"].update(fingerprint=None))

    error = _refused(lambda: load_family(made.paths))

    assert error.message == ("the encoder gives vectors of width 8, but the checkpoint expects 7")
    assert error.hint == "use the encoder it was trained with: tiny-static"


def test_another_encoder_of_the_same_width(made: Made) -> None:
    tiny.lines_encoder(seed=9).save(made.paths.encoder)

    assert _refused(lambda: load_family(made.paths)).message == (
        f"the encoder in {made.paths.encoder} is not the one that the checkpoint was trained with"
    )


def test_widths_that_do_not_fit(made: Made) -> None:
    _edit(made, lambda values: values["gru"].update(diff_width=15))

    assert _refused(lambda: load_family(made.paths)).message == (
        "the checkpoint's gru.diff_width is 15, expected 14"
    )


def test_tensors_that_do_not_fit(made: Made) -> None:
    file = made.paths.hypernetwork / "model.safetensors"
    weights = load_file(file)
    name = "gru.output_norm.bias"

    save_file({k: v for k, v in weights.items() if k != name}, file)
    assert _refused(lambda: load_family(made.paths)).message == f"{file} lacks the tensor {name}"
    save_file(weights | {"extra": torch.ones(1)}, file)
    message = f"{file} holds an unknown tensor extra"
    assert _refused(lambda: load_family(made.paths)).message == message
    save_file(weights | {name: torch.ones(12)}, file)
    message = f"{file}: {name} has shape (12,), but its configuration says (11,)"
    assert _refused(lambda: load_family(made.paths)).message == message
    save_file(weights | {name: torch.ones(11).half()}, file)
    message = f"{file}: {name} is torch.float16, expected torch.float32"
    assert _refused(lambda: load_family(made.paths)).message == message


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (
            {"head": {"ranks": 3}},
            "c: unknown key head.ranks",
            "did you mean head.rank?",
        ),
        ({"colour": 1}, "c: unknown key colour", None),
        (
            {"head": {"kind": "fancy"}},
            "c: head.kind is 'fancy', expected one of: factorized, memory, paper",
            None,
        ),
        ({"head": {"rank": "5"}}, "c: head.rank is '5', expected int", None),
        ({"head": {"rank": True}}, "c: head.rank is True, expected int", None),
        ({"base": {"id": None}}, "c: base.id is None, expected str", None),
        (
            {"base": {"dims": {"q_proj": [1]}}},
            "c: base.dims.q_proj is [1], expected tuple[int, int]",
            None,
        ),
        ({"encoder": 3}, "c: encoder is 3, expected an object", None),
        ({"gru": None}, "c: gru must be given for family 'gru', and only for it", None),
        (
            {"version": 2},
            "c has version 2, expected 1",
            "upgrade code2lora, or use a checkpoint made for this version",
        ),
    ],
)
def test_wrong_configurations(change: dict[str, Any], message: str, hint: str | None) -> None:
    values = json.loads(tiny.checkpoint_config().canonical())
    for key, part in change.items():
        values[key] = values[key] | part if isinstance(part, dict) else part

    error = _refused(lambda: parse_config(values, where="c"))

    assert (error.message, error.hint) == (message, hint)


def test_missing_keys_are_named() -> None:
    values = json.loads(tiny.checkpoint_config().canonical())
    del values["encoder"]["recipe"]["rules"]

    message = _refused(lambda: parse_config(values, where="c")).message

    assert message == "c: missing key encoder.recipe.rules"
    del values["base"]["dims"]["q_proj"]
    values["encoder"]["recipe"]["rules"] = "source"
    message = _refused(lambda: parse_config(values, where="c")).message
    assert message == (
        "c: base.dims names down_proj, gate_proj, k_proj, o_proj, up_proj, v_proj, "
        "expected down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )


def test_configuration_survives_the_round_trip() -> None:
    record = AuditRecord(
        verdict="incomplete",
        tests={"a": AuditTest(passed=None), "b": AuditTest(passed=False, mean=1, low=-1, high=2.5)},
        n_repositories=2,
        n_items=7,
        settings="digest",
    )
    config = replace(
        tiny.checkpoint_config(), metrics={"own": 1.5, "by": {"k": [1, 2]}}, audit=record
    )

    assert parse_config(json.loads(config.canonical()), where="c") == config


def test_task_embedding_chooses_the_adapter() -> None:
    config = tiny.checkpoint_config("paper")
    head = replace(config.head, n_tasks=2, task_width=4)
    torch.manual_seed(0)
    family = build_family(replace(config, head=head), tiny.lines_encoder())
    context = torch.randn(3, 11)

    first, second = family.head(context), family.head(context, task=1)  # type: ignore[call-arg]

    assert not torch.equal(first.b["q_proj"], second.b["q_proj"])
    for wrong in (replace(head, task_width=0), HeadConfig(**(vars(head) | {"kind": "factorized"}))):
        _refused(
            lambda wrong=wrong: build_family(replace(config, head=wrong), tiny.lines_encoder())
        )


def test_decoder_dimensions() -> None:
    n_layers, dims = decoder_dims(tiny.decoder_config().to_dict())

    model = tiny.decoder()
    layer = model.model.layers[1]
    found = {
        name: (module.in_features, module.out_features)
        for part in (layer.self_attn, layer.mlp)
        for name, module in part.named_children()
        if isinstance(module, torch.nn.Linear)
    }
    assert (n_layers, dims) == (2, found)
    # head_dim and key-value heads are optional in older configurations
    assert decoder_dims(
        {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "num_hidden_layers": 28,
        }
    ) == (
        28,
        {
            "down_proj": (8960, 1536),
            "gate_proj": (1536, 8960),
            "k_proj": (1536, 256),
            "o_proj": (1536, 1536),
            "q_proj": (1536, 1536),
            "up_proj": (1536, 8960),
            "v_proj": (1536, 256),
        },
    )
    assert _refused(lambda: decoder_dims({"hidden_size": 3})).message == (
        "the base model's configuration lacks a usable 'intermediate_size'"
    )
