"""Write an adapter in the layout that mlx_lm reads.

    adapters.safetensors   lora_a (d_in, R) and lora_b (R, d_out): PEFT's matrices, transposed
    adapter_config.json    which layers and projections, with scale = alpha / R

The matrices keep their dtype.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from code2lora.adapters.arrays import AdapterArrays
from code2lora.adapters.files import new_file
from code2lora.adapters.layout import CONFIG_FILE, dump_json
from code2lora.adapters.tensors import file_header
from code2lora.hypernetwork.config import block_of
from code2lora.hypernetwork.projections import TARGETS

MLX_WEIGHTS_FILE = "adapters.safetensors"
MLX_FILES = (CONFIG_FILE, MLX_WEIGHTS_FILE)


def write_mlx(adapter: AdapterArrays, folder: Path) -> None:
    """Write both files into a directory that is there."""
    tensors = []
    for pair in adapter:
        module = f"model.layers.{pair.layer}.{block_of(pair.target)}.{pair.target}"
        tensors += [(f"{module}.lora_a", pair.a), (f"{module}.lora_b", pair.b)]
    entries = [(name, t.dtype, t.shape[::-1], t.stored().nbytes) for name, t in tensors]
    with new_file(folder / MLX_WEIGHTS_FILE) as stream:
        stream.write(file_header(entries, maker="mlx"))
        for _, tensor in tensors:
            stream.write(np.ascontiguousarray(tensor.stored().T).tobytes())
    config = {
        "fine_tune_type": "lora",
        "model": adapter.metadata.base_model,
        "num_layers": adapter.n_layers,
        "lora_parameters": {
            "rank": adapter.rank,
            "scale": adapter.alpha / adapter.rank,
            "dropout": 0.0,
            "keys": [f"{block_of(target)}.{target}" for target in TARGETS],
        },
    }
    with new_file(folder / CONFIG_FILE) as stream:
        stream.write(dump_json(config))
