"""Both recipes against slow, obvious re-implementations on tiny random encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from code2lora.errors import UserError
from code2lora.history.model import Diff, FileChange, SourceFile
from code2lora.hypernetwork import encoder_lines, encoder_paper
from code2lora.hypernetwork.config import Recipe
from code2lora.hypernetwork.encoder import load_encoder
from code2lora.hypernetwork.encoder_lines import LinesEncoder
from code2lora.hypernetwork.encoder_paper import PaperEncoder, Windows
from code2lora.hypernetwork.identity import encoder_fingerprint
from tests.hypernetwork import tiny

CODE = "def parse(line):\n    return line.split(',')\n\n"
LONG = "".join(f"value_{i} = parse(line, {i * i})\n" for i in range(150))


# ---- recipe "lines" ----


def _mean(encoder: LinesEncoder, text: str) -> Tensor:
    ids = encoder.tokenizer.encode(text, add_special_tokens=False).ids
    return torch.stack([encoder.table[i] for i in ids]).mean(0)


def test_lines_diff_is_added_then_removed() -> None:
    encoder = tiny.lines_encoder()
    diff = tiny.diff(
        tiny.change("a.py", added=CODE, removed="x = 1\n"),
        tiny.change("b/c.py", added="import os\n"),
    )

    (reading,) = encoder.read_diffs([diff])

    added = f"a.py\n{CODE}b/c.py\nimport os\n"
    removed = "a.py\nx = 1\n"
    expected = torch.cat([_mean(encoder, added), _mean(encoder, removed)])
    torch.testing.assert_close(reading.features, expected)
    assert (reading.features.dtype, reading.features.shape) == (torch.float32, (14,))
    counts = [len(encoder.tokenizer.encode(t, add_special_tokens=False)) for t in (added, removed)]
    assert reading.n_tokens == sum(counts)


@pytest.mark.parametrize(
    ("change", "added", "removed"),
    [
        (tiny.change("n.py", old="o.py", status="R"), "n.py\n", "o.py\n"),
        (tiny.change("n.py", added="x\n", old="o.py", status="R"), "n.py\nx\n", "o.py\n"),
        (tiny.change("e.py", status="A"), "e.py\n", ""),
        (tiny.change("e.py", status="D"), "", "e.py\n"),
        (tiny.change("m.py", removed="x\n"), "", "m.py\nx\n"),
    ],
)
def test_lines_texts(change: Any, added: str, removed: str) -> None:
    assert encoder_lines.diff_texts(tiny.diff(change)) == (added, removed)


def test_lines_snapshot_is_the_mean_over_files() -> None:
    encoder = tiny.lines_encoder()

    reading = encoder.read_snapshot(tiny.snapshot(a=CODE, b=LONG, c=""))

    texts = [f"a.py\n{CODE}", f"b.py\n{LONG}", "c.py\n"]
    expected = torch.stack([_mean(encoder, text) for text in texts]).mean(0)
    torch.testing.assert_close(reading.features, expected)


def test_lines_nothing_is_zeros() -> None:
    encoder = tiny.lines_encoder()

    (reading,) = encoder.read_diffs([tiny.diff()])

    assert torch.equal(reading.features, torch.zeros(14)) and reading.n_tokens == 0
    assert torch.equal(encoder.read_snapshot(tiny.snapshot()).features, torch.zeros(7))
    assert encoder.read_diffs([]) == []


def test_lines_long_text_is_read_in_pieces_weighted_by_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = tiny.lines_encoder()
    snapshot = tiny.snapshot(a=LONG, b=CODE)
    whole = encoder.read_snapshot(snapshot)

    monkeypatch.setattr(encoder_lines, "PIECE_CHARS", 100)
    monkeypatch.setattr(encoder_lines, "_SLAB_CHARS", 250)
    cut = encoder.read_snapshot(snapshot)

    # the cuts fall after lines, where this tokenizer splits anyway
    assert cut.n_tokens == whole.n_tokens
    torch.testing.assert_close(cut.features, whole.features)


def test_lines_one_endless_line_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_lines, "PIECE_CHARS", 10)

    pieces = list(encoder_lines._pieces("abc\n" + "x" * 25 + "\nend"))

    assert pieces == ["abc\n", "xxxxxxxxxx", "xxxxxxxxxx", "xxxxx\nend"]


def test_lines_features_do_not_depend_on_company() -> None:
    encoder = tiny.lines_encoder()
    diffs = [tiny.diff(tiny.change(f"{i}.py", added=LONG[: 100 * i + 9])) for i in range(9)]

    together = encoder.read_diffs(diffs)

    for diff, reading in zip(diffs, together, strict=True):
        assert torch.equal(encoder.read_diffs([diff])[0].features, reading.features)


def test_lines_pool_is_the_same_and_differentiable() -> None:
    encoder = tiny.lines_encoder()
    encoder.table.requires_grad_()
    diff = tiny.diff(tiny.change("a.py", added=LONG))
    added, removed = encoder_lines.diff_texts(diff)

    vectors = encoder.pool([encoder.tokens(added), encoder.tokens(removed)])

    (reading,) = encoder.read_diffs([diff])
    torch.testing.assert_close(vectors.flatten(), reading.features)
    vectors.sum().backward()
    assert encoder.table.grad is not None and encoder.table.grad.abs().sum() > 0
    assert not reading.features.requires_grad


def test_lines_directory_is_read_as_sentence_transformers_reads_it(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    made = tiny.lines_encoder()
    made.save(tmp_path / "encoder")
    library = SentenceTransformer(str(tmp_path / "encoder"), device="cpu", local_files_only=True)

    ours = load_encoder(tmp_path / "encoder", tiny.LINES)

    (reading,) = ours.read_diffs([tiny.diff(tiny.change("a.py", added=CODE))])
    expected = library.encode([f"a.py\n{CODE}"], convert_to_tensor=True)[0]
    torch.testing.assert_close(reading.features[:7], expected)
    assert ours.width == 7


def test_lines_key_is_what_is_read() -> None:
    encoder = tiny.lines_encoder()

    def key(*changes: Any, commit: str = "c") -> str:
        made = tiny.diff(*changes)
        return encoder.diff_key(Diff(commit * 40, made.parent, made.changes, made.skipped))

    same = key(tiny.change("a.py", added="x\n"))

    assert key(tiny.change("a.py", added="x\n"), commit="d") == same
    assert key(tiny.change("b.py", added="x\n")) != same
    assert key(tiny.change("a.py", removed="x\n")) != same
    assert key(tiny.change("a.py", added="x\n", removed="x\n")) != same


# ---- recipe "paper" ----


@pytest.fixture(scope="module")
def paper_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("paper") / "encoder"
    tiny.save_transformer_encoder(path)
    return path


@pytest.fixture(scope="module")
def paper(paper_dir: Path) -> PaperEncoder:
    encoder = load_encoder(paper_dir, tiny.PAPER)
    assert isinstance(encoder, PaperEncoder)
    return encoder


def _slow_chunks(path: Path, text: str, width: int, overlap: int, minimum: int) -> list[Tensor]:
    """Encode window after window, one at a time, straight from the description."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path).eval()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    vectors, start = [], 0
    while True:
        window = ids[start : start + width]
        if len(window) >= minimum:
            again = tokenizer(
                tokenizer.decode(window, skip_special_tokens=True),
                truncation=True,
                max_length=width,
                return_tensors="pt",
            )
            assert int(again["input_ids"][0, -1]) == tokenizer.convert_tokens_to_ids("<end>")
            with torch.no_grad():
                hidden = model(**again).last_hidden_state[0]
            vectors.append(hidden.mean(0))
        if start + width >= len(ids):
            return vectors
        start += width - overlap


def test_paper_diff_is_maximum_then_mean_over_windows(paper: PaperEncoder, paper_dir: Path) -> None:
    diff = tiny.diff(tiny.change("a.py", added=LONG), tiny.change("b.py", removed=CODE))
    chunks = torch.stack(_slow_chunks(paper_dir, diff.unified, 512, 64, 16))
    assert len(chunks) > 2

    (reading,) = paper.read_diffs([diff])

    expected = torch.cat([chunks.max(0).values, chunks.mean(0)])
    torch.testing.assert_close(reading.features, expected, rtol=0, atol=1e-5)
    assert reading.features.shape == (24,) and reading.n_tokens > 1000


def test_paper_snapshot_is_mean_then_maximum_over_files(
    paper: PaperEncoder, paper_dir: Path
) -> None:
    files = {"a": LONG * 3, "b": CODE * 4, "c": "x"}

    reading = paper.read_snapshot(tiny.snapshot(**files))

    vectors = []
    for text in files.values():
        chunks = _slow_chunks(paper_dir, text, 2048, 256, 8)
        vector = torch.stack(chunks).mean(0) if chunks else torch.zeros(12)
        vectors.append(vector.half().float())
    assert torch.equal(vectors[2], torch.zeros(12))  # too short for a window, and pooled
    pooled = torch.cat([torch.stack(vectors).mean(0), torch.stack(vectors).max(0).values])
    expected = pooled / (pooled.norm() + 1e-12)
    torch.testing.assert_close(reading.features, expected, rtol=0, atol=1e-4)


def test_paper_nothing_is_zeros(paper: PaperEncoder) -> None:
    def patch(text: str) -> Diff:
        return tiny.diff(FileChange("a.py", None, "M", "", "", text))

    empty, blank, short = paper.read_diffs([tiny.diff(), patch(" \n\t\n"), patch("x = 1\n")])

    for reading in (empty, blank, short):
        assert torch.equal(reading.features, torch.zeros(24))
    assert (empty.n_tokens, blank.n_tokens) == (0, 0)
    assert 0 < short.n_tokens < 16
    assert torch.equal(paper.read_snapshot(tiny.snapshot()).features, torch.zeros(24))


def test_paper_features_do_not_depend_on_company(paper: PaperEncoder) -> None:
    diffs = [tiny.diff(tiny.change(f"{i}.py", added=LONG[: 500 * i + 99])) for i in range(4)]

    together = paper.read_diffs(diffs)
    across = paper.read_diffs(diffs, across=True)

    for diff, exact, batched in zip(diffs, together, across, strict=True):
        assert torch.equal(paper.read_diffs([diff])[0].features, exact.features)
        torch.testing.assert_close(batched.features, exact.features, rtol=0, atol=1e-5)


def test_paper_reading_across_in_small_batches(
    paper: PaperEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffs = [tiny.diff(tiny.change(f"{i}.py", added=LONG[: 700 * i + 99])) for i in range(7)]
    files = tiny.snapshot(a=LONG * 2, b=CODE * 3, c="x").files
    exact = paper.read_diffs(diffs) + paper.read_files(files)
    monkeypatch.setattr(encoder_paper, "_ACROSS_SLAB_WINDOWS", 2)
    monkeypatch.setattr(encoder_paper, "_BATCH_TOKENS", 700)

    across = paper.read_diffs(diffs, across=True) + paper.read_files(files, across=True)

    for one, other in zip(exact, across, strict=True):
        assert one.n_tokens == other.n_tokens
        torch.testing.assert_close(other.features, one.features, rtol=0, atol=1e-3)


def test_paper_reading_across_fails_where_reading_fails(
    paper: PaperEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_text: str) -> list[int]:
        raise ValueError("no tokens today")

    monkeypatch.setattr(paper, "_token_ids", fail)

    with pytest.raises(ValueError, match="no tokens today"):
        paper.read_diffs([tiny.diff(tiny.change("a.py", added=LONG))], across=True)


def test_batches_hold_like_lengths_and_not_too_much() -> None:
    lengths = [9, 100, 8, 1, 30, 30, 10, 250]

    batches = list(encoder_paper._batches(lengths, 60))

    assert batches == [[3, 2, 0, 6], [4, 5], [1], [7]]
    assert list(encoder_paper._batches([], 60)) == []


def test_paper_padding_is_never_seen(paper: PaperEncoder) -> None:
    rows = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [3]]

    together = paper._masked_means(rows)

    for row, mean in zip(rows, together, strict=True):
        torch.testing.assert_close(paper._masked_means([row])[0], mean, rtol=0, atol=1e-5)


def test_a_bidirectional_encoder_is_masked(paper: PaperEncoder) -> None:
    seen: list[object] = []
    real = paper._model.forward

    def forward(*, input_ids: Tensor, attention_mask: Tensor | None) -> object:
        seen.append(attention_mask)
        return real(input_ids=input_ids, attention_mask=attention_mask)

    paper._model.forward = forward
    paper._ignores_what_follows = False
    try:
        paper._masked_means([[5, 6], [7]])
    finally:
        paper._model.forward, paper._ignores_what_follows = real, True

    (mask,) = seen
    assert isinstance(mask, Tensor) and mask.tolist() == [[1, 1], [1, 0]]


def test_snapshots_are_pooled_from_files(paper: PaperEncoder) -> None:
    snapshot = tiny.snapshot(a=LONG, b=CODE * 4)
    for encoder in (paper, tiny.lines_encoder()):
        vectors = torch.stack([reading.features for reading in encoder.read_files(snapshot.files)])
        pooled = encoder.pool_files(vectors)
        torch.testing.assert_close(pooled, encoder.read_snapshot(snapshot).features)
        assert encoder.pool_files(torch.empty(0, encoder.width)).any().item() is False
    a, b = snapshot.files
    moved = SourceFile(path="other.py", blob=a.blob, text=a.text)
    assert paper.file_key(a) == paper.file_key(moved) != paper.file_key(b)
    lines = tiny.lines_encoder()
    assert lines.file_key(a) != lines.file_key(moved)  # the path is part of what it reads


def test_paper_slabs_do_not_change_the_result(
    paper: PaperEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tiny.snapshot(a=LONG * 2, b=CODE * 3)
    whole = paper.read_snapshot(snapshot)

    monkeypatch.setattr(encoder_paper, "_SLAB_WINDOWS", 1)

    cut = paper.read_snapshot(snapshot)
    torch.testing.assert_close(cut.features, whole.features, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (0, []),
        (2, []),
        (3, [(0, 3)]),
        (10, [(0, 10)]),
        (11, [(0, 10), (6, 11)]),
        (18, [(0, 10), (6, 16), (12, 18)]),
        (16, [(0, 10), (6, 16)]),
    ],
)
def test_windows(n: int, expected: list[tuple[int, int]]) -> None:
    windows = Windows(length=10, overlap=4, minimum=3)

    cut = [(window[0], window[-1] + 1) for window in windows.cut(range(n))]

    assert cut == expected


def test_paper_key_is_the_unified_text(paper: PaperEncoder) -> None:
    one, two = tiny.change("a.py", added="x\n"), tiny.change("a.py", added="y\n")

    assert paper.diff_key(tiny.diff(one)) == paper.diff_key(tiny.diff(one))
    assert paper.diff_key(tiny.diff(one)) != paper.diff_key(tiny.diff(two))


# ---- directories ----


def test_fingerprint_changes_with_any_byte_and_with_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "encoder"
    tiny.lines_encoder().save(path)
    before = encoder_fingerprint(path, tiny.LINES)
    other = Recipe(diff="lines", snapshot="lines", rules="paper")
    assert encoder_fingerprint(path, other) != before

    (path / "README.md").write_text("documentation is not the encoder")
    assert encoder_fingerprint(path, tiny.LINES) == before
    for file in sorted(path.rglob("*")):
        if not file.is_file() or file.suffix == ".md":
            continue
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert encoder_fingerprint(path, tiny.LINES) != before, file
        file.write_bytes(data)


def test_bad_encoder_directories(tmp_path: Path, paper_dir: Path) -> None:
    static = tmp_path / "static"
    tiny.lines_encoder().save(static)
    missing = tmp_path / "missing"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "modules.json").write_text(json.dumps([{"type": "evil.Module"}]))
    mixed = Recipe(diff="lines", snapshot="paper", rules="source")

    messages = {
        (missing, tiny.LINES): f"there is no encoder at {missing}: modules.json is missing",
        (foreign, tiny.LINES): (
            f"{foreign / 'modules.json'} asks for evil.Module, "
            "but only sentence-transformers' own modules are loaded"
        ),
        (static, tiny.PAPER): (
            f"the recipe needs an encoder of the kind 'paper', but {static} is 'lines'"
        ),
        (paper_dir, tiny.LINES): (
            f"the recipe needs an encoder of the kind 'lines', but {paper_dir} is 'paper'"
        ),
        (static, mixed): (
            "the recipe reads diffs as 'lines' and snapshots as 'paper', "
            "but one encoder serves one recipe"
        ),
    }
    for (path, recipe), message in messages.items():
        with pytest.raises(UserError) as caught:
            load_encoder(path, recipe)
        assert caught.value.message == message

    weights = next(static.rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(UserError) as caught:
        load_encoder(static, tiny.LINES)
    assert caught.value.message.startswith(f"the encoder in {static} is damaged: ")
    assert caught.value.hint == "fetch the model again"
