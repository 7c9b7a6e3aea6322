"""What PEFT makes of a published adapter is what we make of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from code2lora.adapters.publish import publish
from code2lora.adapters.verify import TOLERANCE, verify
from code2lora.errors import UserError
from tests.adapters.test_publish import METADATA
from tests.hypernetwork import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny.decoder().save_pretrained(path)
    return path


@pytest.mark.parametrize("n_layers", [1, tiny.N_LAYERS])
def test_peft_reload_equals_the_adapter_in_memory(
    tmp_path: Path, base: Path, n_layers: int
) -> None:
    lora = tiny.random_lora(n_layers=n_layers)
    path = publish(lora, METADATA, tmp_path, n_layers=2).path

    for report in (verify(path, base, lora), verify(path, base)):
        assert report.ok and report.digest_matches
        assert report.max_abs_difference < TOLERANCE < 0.05 < report.max_abs_effect
        assert report.n_tensors == 28


def test_another_adapter_is_noticed(tmp_path: Path, base: Path) -> None:
    path = publish(tiny.random_lora(), METADATA, tmp_path, n_layers=2).path

    report = verify(path, base, tiny.random_lora(seed=9))

    assert not report.ok and report.max_abs_difference > 0.05


def test_flipped_bit_is_noticed(tmp_path: Path, base: Path) -> None:
    path = publish(tiny.random_lora(), METADATA, tmp_path, n_layers=2).path
    file = path / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)

    report = verify(path, base)

    assert not report.ok and not report.digest_matches


def test_another_base_model_is_refused(tmp_path: Path, base: Path) -> None:
    metadata = replace(METADATA, base_model="big")
    path = publish(tiny.random_lora(n_layers=3), metadata, tmp_path, n_layers=3).path

    with pytest.raises(UserError) as caught:
        verify(path, base)

    assert caught.value.message == (
        f"the adapter was made for big, but the base model in {base} has other dimensions"
    )
