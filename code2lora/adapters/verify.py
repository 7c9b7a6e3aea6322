"""Load a published adapter the way other programs do, and compare what the model then says."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from code2lora.adapters.layout import WEIGHTS_FILE, read_json, read_metadata
from code2lora.adapters.load import load
from code2lora.errors import UserError
from code2lora.hypernetwork.config import decoder_dims
from code2lora.hypernetwork.inject import LoraSlots
from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.projections import TARGETS

TOLERANCE = 1e-4
"""Largest difference of two logits that is put down to rounding."""

_BATCH, _LENGTH, _STRIDE = 2, 24, 7919


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found. Logits are compared in float32."""

    n_tensors: int
    max_abs_difference: float
    """Largest difference between logits through PEFT and through the injected adapter."""
    max_abs_effect: float
    """Largest difference that the adapter makes to the base model's logits."""
    digest_matches: bool
    """The weights file has the sha256 that was recorded when it was written."""

    @property
    def ok(self) -> bool:
        """The file is the one that was published, and both ways of loading it agree."""
        return self.digest_matches and self.max_abs_difference <= TOLERANCE


def verify(path: Path, base_dir: Path, lora: Lora | None = None) -> VerifyReport:
    """Reload an adapter through PEFT and compare logits with the in-process adapter.

    lora: the weights that were published; they are rounded as the file is. Without them the
        file's own are used.
    Raises UserError when the adapter is damaged or does not fit the base model.
    """
    _, info = read_metadata(path)
    loaded, metadata = load(path)
    n_layers, dims = decoder_dims(read_json(base_dir / "config.json"))
    found = {t: (loaded.a[t].shape[-1], loaded.b[t].shape[-2]) for t in TARGETS}
    if (info.n_layers, found) != (n_layers, dims):
        raise UserError(
            f"the adapter was made for {metadata.base_model}, "
            f"but the base model in {base_dir} has other dimensions",
            hint="name the base model that the adapter was made for",
        )
    with (path / WEIGHTS_FILE).open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    dtype = loaded.a[TARGETS[0]].dtype
    chosen = (lora or loaded).to("cpu", dtype).to("cpu", torch.float32)
    plain, injected, reloaded = _logits_three_ways(path, base_dir, chosen)
    return VerifyReport(
        n_tensors=2 * len(TARGETS) * info.n_layers,
        max_abs_difference=float((injected - reloaded).abs().max()),
        max_abs_effect=float((injected - plain).abs().max()),
        digest_matches=digest == info.sha256,
    )


def _logits_three_ways(path: Path, base_dir: Path, lora: Lora) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of the base model, with the injected adapter, and with PEFT's."""
    # PEFT and transformers take seconds to import and are needed nowhere else in this room
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        base_dir, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    model.eval()
    plain = _logits(model)
    slots = LoraSlots(model)
    with slots.use(lora):
        injected = _logits(model)
    slots.remove()
    with warnings.catch_warnings():
        # PEFT 0.21 calls names that transformers 5.23 is about to drop
        warnings.simplefilter("ignore", FutureWarning)
        wrapped: Any = PeftModel.from_pretrained(model, path, autocast_adapter_dtype=False)
    return plain, injected, _logits(wrapped.float().eval())


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    ids = torch.arange(_BATCH * _LENGTH).view(_BATCH, _LENGTH) * _STRIDE % model.config.vocab_size
    logits: Tensor = model(input_ids=ids).logits
    return logits
