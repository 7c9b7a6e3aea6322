"""The recipe `gradients`: blocks are the base model's own gradients, weighed by size."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from code2lora.errors import UserError
from code2lora.hypernetwork.config import BlockConfig, Recipe
from code2lora.hypernetwork.encoder import Encoder, load_encoder
from code2lora.hypernetwork.encoder_gradients import (
    GradientsConfig,
    GradientsEncoder,
    key_name,
    pooled_changes,
    told_files,
)
from code2lora.hypernetwork.state import pack_tensor, unpack_tensor
from tests.hypernetwork import tiny

BLOCKS = BlockConfig(layers=(1,), outputs={"v_proj": 6, "down_proj": 16}, n_keys=4)
GRADIENTS = Recipe(diff="gradients", snapshot="gradients", rules="source")
HALF = 2.0**-11
"""Largest relative error of a number that half precision rounds."""
TEXT = "def parse(line):\n    return line.split(',')\n"


def keys() -> dict[tuple[int, str], Tensor]:
    generator = torch.Generator().manual_seed(5)
    dims = tiny.base_config().dims
    return {
        (layer, target): torch.randn(BLOCKS.n_keys, dims[target][0], generator=generator)
        for layer, target in BLOCKS.places
    }


def named_keys() -> dict[str, Tensor]:
    return {key_name(*place): rows for place, rows in keys().items()}


def encoder(**changes: int) -> GradientsEncoder:
    sizes = {"excerpt_tokens": 24, "file_excerpts": 2, "snapshot_files": 3, "diff_files": 2}
    config = GradientsConfig(blocks=BLOCKS, **(sizes | changes))
    return GradientsEncoder(tiny.decoder(), tiny.tokenizer(), named_keys(), config, GRADIENTS)


def test_a_block_is_the_gradient_of_the_loss_in_the_projection() -> None:
    made = encoder()
    rows, n_given = [[5, 9, 2, 40, 41, 7], [8, 1, 3]], [2, 1]

    found = made.gradients(rows, n_given)

    for i, (row, n) in enumerate(zip(rows, n_given, strict=True)):
        model = tiny.decoder()
        labels = torch.tensor([[-100] * n + row[n:]])
        n_asked = len(row) - n
        loss = model(input_ids=torch.tensor([row]), labels=labels).loss * n_asked
        loss.backward()
        expected = []
        for layer, target in BLOCKS.places:
            part = model.model.layers[layer]
            module = part.self_attn.v_proj if target == "v_proj" else part.mlp.down_proj
            expected.append((module.weight.grad @ keys()[layer, target].T).flatten())
        torch.testing.assert_close(found[i], torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_the_base_model_is_left_as_it_was() -> None:
    made = encoder()
    model = tiny.decoder()
    before = {name: tensor.clone() for name, tensor in made._base.state_dict().items()}

    made.read_files(tiny.snapshot(a=TEXT).files)

    assert all(torch.equal(before[name], t) for name, t in made._base.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in made._base.parameters())
    ids = torch.arange(6)[None]
    assert torch.equal(made._base(input_ids=ids).logits, model(input_ids=ids).logits)


def test_texts_that_are_read_at_once_do_not_mix() -> None:
    made = encoder()
    diffs = [
        tiny.diff(*(tiny.change(f"{name}.py", TEXT) for name in names)) for names in ("a", "bcd")
    ]
    alone = [made.read_diffs([diff])[0].features for diff in diffs]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: made.read_diffs([diffs[i % 2]])[0].features, range(40)))

    assert all(torch.equal(one, alone[i % 2]) for i, one in enumerate(found))


def test_a_diff_is_read_alone_and_tells_what_it_removes() -> None:
    made = encoder()
    one = tiny.diff(tiny.change("a.py", TEXT, "x = 1\n"))
    other = tiny.diff(tiny.change("b.py", "import os\n"))

    alone = made.read_diffs([one])[0]
    together = made.read_diffs([other, one])[1]

    assert alone.features.shape == (GRADIENTS.diff_width(made.width),) == (made.width + 2,)
    assert torch.equal(alone.features, together.features)
    amounts = [len(TEXT) / 1000, 6 / 1000]
    assert alone.features[-2:].tolist() == pytest.approx(amounts, rel=HALF)
    assert alone.n_tokens > 0
    across = made.read_diffs([other, one], across=True)[1]
    torch.testing.assert_close(across.features, alone.features, rtol=2 * HALF, atol=1e-5)


def test_a_diffs_features_are_kept_in_half_precision_to_the_last_bit() -> None:
    made = encoder()
    huge = tiny.change("b.py", "x = 1\n", "y" * 70_000_000)

    features = made.read_diffs([tiny.diff(tiny.change("a.py", TEXT), huge)])[0].features

    kept = pack_tensor(features)
    assert features.dtype == torch.float32 and features.isfinite().all()
    assert torch.equal(unpack_tensor(kept), features)
    assert unpack_tensor(kept).dtype == torch.float32
    assert len(kept) < 2 * features.numel() + 100


def test_a_diff_is_made_of_its_changes() -> None:
    made = encoder()
    changes = [
        tiny.change("a.py", TEXT * 9, "x = 1\n"),
        tiny.change("b.py", "import os\n"),  # the smallest of three is not read
        tiny.change("c.py", TEXT),
        tiny.change("d.py", "", "y = 2\n"),
    ]

    whole = made.read_diffs([tiny.diff(*changes)])[0].features

    each = made.read_diffs([tiny.diff(change) for change in changes])
    parts = torch.stack([reading.features for reading in each])
    torch.testing.assert_close(pooled_changes(parts, 2), whole, rtol=4 * HALF, atol=1e-6)


def test_a_diff_without_added_lines_is_zeros() -> None:
    made = encoder()
    empty, removal = made.read_diffs([tiny.diff(), tiny.diff(tiny.change("a.py", "", "x = 1\n"))])

    assert not empty.features.any() and empty.n_tokens == 0
    assert not removal.features[:-1].any() and removal.features[-1] == pytest.approx(
        0.006, rel=HALF
    )


def test_files_are_weighed_by_their_sizes() -> None:
    made = encoder()
    long = TEXT * 40
    files = tiny.snapshot(a=TEXT, b=long).files
    vectors = torch.stack([reading.features for reading in made.read_files(files)])

    pooled = made.pool_files(vectors)

    share = len(long) / (len(long) + len(TEXT))
    mean = vectors[0, :-1] * (1 - share) + vectors[1, :-1] * share
    torch.testing.assert_close(pooled[:-1], mean, rtol=1e-4, atol=1e-6)
    assert pooled[-1] == pytest.approx((len(long) + len(TEXT)) / 1000)


def test_a_snapshot_weighs_what_all_its_files_weigh() -> None:
    made = encoder(snapshot_files=2)
    files = tiny.snapshot(a=TEXT, b="import os\n", c="x = 1\n" * 9)

    reading = made.read_snapshot(files)

    told = made.read_files(told_files(files.files, 2))
    expected = made.pool_files(torch.stack([each.features for each in told]))
    torch.testing.assert_close(reading.features[:-1], expected[:-1], rtol=1e-4, atol=1e-6)
    assert reading.features[-1] == pytest.approx(sum(len(f.text) for f in files.files) / 1000)
    assert not made.read_snapshot(tiny.snapshot()).features.any()


def test_told_files_do_not_change_with_the_others() -> None:
    few = tiny.snapshot(**{f"f{i}": "x" for i in range(6)}).files
    many = tiny.snapshot(**{f"f{i}": "y" for i in range(12)}).files

    chosen = {file.path for file in told_files(few, 3)}
    again = {file.path for file in told_files(many, 3)}

    assert len(chosen) == 3
    assert chosen >= again & {file.path for file in few}


def test_keys_follow_what_is_read() -> None:
    made = encoder()
    one = made.diff_key(tiny.diff(tiny.change("a.py", TEXT, "x\n")))

    assert one == made.diff_key(tiny.diff(tiny.change("a.py", TEXT, "y\n")))
    assert one != made.diff_key(tiny.diff(tiny.change("a.py", TEXT, "xx\n")))
    assert one != made.diff_key(tiny.diff(tiny.change("b.py", TEXT, "x\n")))
    assert one != made.diff_key(tiny.diff(tiny.change("a.py", TEXT + "\n", "x\n")))


def test_saved_and_loaded_it_reads_the_same(tmp_path: Path) -> None:
    made = encoder()
    tiny.decoder().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save(str(tmp_path / "base" / "tokenizer.json"))
    made.save(tmp_path / "encoder")

    def load(dtype: torch.dtype | None) -> Encoder:
        return load_encoder(tmp_path / "encoder", GRADIENTS, dtype=dtype, base=tmp_path / "base")

    diff = tiny.diff(tiny.change("a.py", TEXT))
    expected = made.read_diffs([diff])[0].features
    assert torch.equal(load(torch.float32).read_diffs([diff])[0].features, expected)
    # In half precision, and in what this machine is fast at, it reads nearly the same.
    for dtype in (torch.bfloat16, None):
        found = load(dtype).read_diffs([diff])[0].features
        assert torch.cosine_similarity(found, expected, dim=0) > 0.999


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    encoder().save(tmp_path)
    with pytest.raises(UserError, match="needs its base model"):
        load_encoder(tmp_path, GRADIENTS)
    with pytest.raises(UserError, match=r"but .* is 'gradients'"):
        load_encoder(tmp_path, tiny.LINES)
    (tmp_path / "gradients.json").write_text('{"blocks": 1}')
    with pytest.raises(UserError, match=r"gradients\.json"):
        load_encoder(tmp_path, GRADIENTS, base=tmp_path)
    wrong = BlockConfig(layers=(7,), outputs={"v_proj": 6}, n_keys=4)
    config = GradientsConfig(blocks=wrong)
    with pytest.raises(UserError, match="v_proj in layer 7"):
        GradientsEncoder(tiny.decoder(), tiny.tokenizer(), named_keys(), config, GRADIENTS)
