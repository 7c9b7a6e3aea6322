"""The base decoder's corpus, tokenizer, stream and training loop, at sizes that take seconds."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from code2lora.training.pretraining import corpus
from code2lora.training.pretraining.base import (
    BaseProgress,
    BaseResult,
    BaseRun,
    export_checkpoint,
    fit_base,
    matched_lines,
    newest_checkpoint,
    rate_factor,
)
from code2lora.training.pretraining.base_config import BaseConfig
from code2lora.training.pretraining.corpus import SourceFile
from code2lora.training.pretraining.decoder import build_model, head_loss
from code2lora.training.pretraining.stream import TokenStream, cut_hole, excerpts, validation_rows
from code2lora.training.pretraining.tokenizer import (
    ADDED_TOKENS,
    FIM_MIDDLE,
    FIM_PREFIX,
    FIM_SUFFIX,
    SPECIAL_TOKENS,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from code2lora.training.split import bucket

VOCAB_SIZE = 320


def source_files(n_files: int, *, seed: int = 0) -> list[SourceFile]:
    """Files of small functions; all differ."""
    rng = random.Random(seed)
    names = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "theta", "kappa"]
    files = []
    for number in range(n_files):
        body = "".join(
            f"def {rng.choice(names)}_{rng.randrange(50)}({rng.choice(names)}, count=1):\n"
            f"    return {rng.choice(names)} + count * {rng.randrange(9)}\n\n"
            for _ in range(12)
        )
        files.append(SourceFile(path=f"dist/pkg/mod_{number}.py", text=body, origin="dist"))
    return files


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([file.text for file in source_files(20)], vocab_size=VOCAB_SIZE)


@pytest.fixture
def config() -> BaseConfig:
    return BaseConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=24,
        n_layers=2,
        n_heads=3,
        n_kv_heads=1,
        intermediate_size=40,
        max_position_embeddings=128,
        row_tokens=48,
        rows_per_step=4,
        rows_per_pass=2,
        excerpt_chars=100,
        max_tokens=48 * 4 * 6,
        warmup_steps=2,
        validation_rows=3,
        validate_every_steps=2,
        checkpoint_every_s=1e9,
        n_threads=1,
        autocast_bf16=False,
    )


def fit(
    config: BaseConfig, out_dir: Path, tokenizer: Tokenizer, *, stop_after: int | None = None
) -> tuple[BaseResult, list[BaseProgress]]:
    reports: list[BaseProgress] = []
    result = fit_base(
        config,
        out_dir,
        train_files=source_files(8),
        validation_files=source_files(6, seed=1),
        tokenizer=tokenizer,
        progress=reports.append,
        should_stop=lambda: stop_after is not None and len(reports) >= stop_after,
    )
    return result, reports


def weights(run_dir: Path) -> bytes:
    folder = newest_checkpoint(run_dir)
    assert folder is not None
    return (folder / "model.safetensors").read_bytes()


def add_distribution(site: Path, name: str, *metadata: str, text: str | None = None) -> None:
    """Fabricate an installed distribution of one module."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}.py").write_text(text or source_files(1, seed=hash_seed(name))[0].text)
    lines = ["Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0", *metadata]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "RECORD").write_text(f"{name}.py,,\n{name}-1.0.dist-info/METADATA,,\n")


def hash_seed(name: str) -> int:
    return sum(ord(character) for character in name)


# --- corpus


def test_buckets_are_those_of_the_evaluation() -> None:
    assert bucket("Textualize/rich") == bucket("textualize/RICH") == 8
    assert bucket("pytest-dev/pytest") == 9
    assert bucket("python/cpython") == 8


def test_only_permissive_distributions_of_known_training_repositories_enter(
    tmp_path: Path,
) -> None:
    site, stdlib = tmp_path / "site", tmp_path / "stdlib"
    flask = "Project-URL: Source, https://github.com/pallets/flask"
    mit = "License-Expression: MIT"
    add_distribution(site, "kept", mit, flask)
    add_distribution(
        site, "classified", "Classifier: License :: OSI Approved :: BSD License", flask
    )
    add_distribution(
        site, "heldout", mit, "Project-URL: Source, https://github.com/Textualize/rich/"
    )
    add_distribution(site, "copyleft", "License-Expression: GPL-3.0-or-later", flask)
    add_distribution(site, "mixed", "License-Expression: MPL-2.0 AND MIT", flask)
    add_distribution(
        site,
        "disagreeing",
        "License: MIT",
        "Classifier: License :: OSI Approved :: GNU Lesser General Public License v3 (LGPLv3)",
        flask,
    )
    add_distribution(site, "unlicensed", flask)
    add_distribution(site, "homeless", mit, "Home-page: https://example.org/x")
    add_distribution(site, "sponsored", mit, "Project-URL: Funding, https://github.com/sponsors/me")
    (stdlib / "test").mkdir(parents=True)
    (stdlib / "lib.py").write_text(source_files(1, seed=99)[0].text)
    (stdlib / "test" / "test_lib.py").write_text(source_files(1, seed=98)[0].text)

    gathered = corpus.gather([site], stdlib_dir=stdlib)

    assert [origin.name for origin in gathered.manifest] == ["python", "classified", "kept"]
    paths = {file.path for file in gathered.train + gathered.validation}
    assert paths == {"python/lib.py", "classified/classified.py", "kept/kept.py"}
    assert all(
        origin.repository == "pallets/flask" and origin.bucket == bucket("pallets/flask")
        for origin in gathered.manifest[1:]
    )


def test_tables_duplicates_and_broken_text_stay_out(tmp_path: Path) -> None:
    site, stdlib = tmp_path / "site", tmp_path / "stdlib"
    stdlib.mkdir()
    text = source_files(1)[0].text
    (stdlib / "a.py").write_text(text)
    (stdlib / "b_copy.py").write_text(text)
    (stdlib / "c_table.py").write_text("T = [\n" + "    1, 2, 3, 4, 5,\n" * 50 + "]\n")
    (stdlib / "d_minified.py").write_text("x = 1; " * 200)
    (stdlib / "e_latin.py").write_bytes(b"# caf\xe9\n" + text.encode() + b"#")
    (stdlib / "f_large.py").write_text(text * 500)
    (stdlib / "g_made.py").write_text("# Generated by protoc. DO NOT EDIT\n" + text)
    (stdlib / "_vendor").mkdir()
    (stdlib / "_vendor" / "h.py").write_text(text + "# other\n")
    site.mkdir()

    gathered = corpus.gather([site], stdlib_dir=stdlib)

    assert [file.path for file in gathered.train + gathered.validation] == ["python/a.py"]
    assert gathered.manifest[0].n_files == 1
    assert gathered.manifest[0].size_bytes == len(text.encode())

    corpus.write_manifest(gathered, tmp_path / "manifest.json")
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert written["origins"][0]["repository"] == "python/cpython"
    assert written["held_out_buckets"] == [8, 9]


def test_about_one_file_in_a_hundred_is_held_out() -> None:
    held_out = sum(corpus.is_held_out(f"d/{n}.py", permille=10) for n in range(5000))
    assert 25 <= held_out <= 80


# --- tokenizer


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="ascii")))
def test_ascii_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_is_deterministic_and_fills_its_vocabulary(tokenizer: Tokenizer) -> None:
    again = train_tokenizer([file.text for file in source_files(20)], vocab_size=VOCAB_SIZE)

    assert again.to_str() == tokenizer.to_str()
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    added = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS + ADDED_TOKENS]
    assert added == list(range(VOCAB_SIZE - 9, VOCAB_SIZE))


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="but 5000 were asked for"):
        train_tokenizer(["x = 1\n"], vocab_size=5000)


def test_transformers_loads_the_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path, max_length=128)

    loaded = AutoTokenizer.from_pretrained(tmp_path)

    text = "def f(naïve):\n\n    return 'x' + \"→\"  # <|fim_middle|>1234\n"
    ids = loaded(text)["input_ids"]
    assert ids == tokenizer.encode(text).ids == load_tokenizer(tmp_path).encode(text).ids
    assert tokenizer.token_to_id(FIM_MIDDLE) in ids
    assert loaded.decode(ids, skip_special_tokens=True) == text  # FIM tokens are not special
    assert (loaded.eos_token, loaded.pad_token, loaded.bos_token) == (
        "<|endoftext|>",
        "<|endoftext|>",
        None,
    )
    assert set(loaded.all_special_tokens) == set(SPECIAL_TOKENS)
    assert len(loaded) == VOCAB_SIZE


# --- stream


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=300), seed=st.integers(0, 10**6))
def test_a_hole_recombines_to_the_text(text: str, seed: int) -> None:
    hole = cut_hole(text, random.Random(seed))
    assert hole.prefix + hole.middle + hole.suffix == text


@settings(max_examples=50, deadline=None)
@given(text=st.text(alphabet="ab\n ", min_size=1, max_size=400), seed=st.integers(0, 99))
def test_excerpts_recombine_to_the_file(text: str, seed: int) -> None:
    file = SourceFile(path="dist/pkg/a.py", text=text, origin="dist")
    found = excerpts(file, random.Random(seed), chars=40)
    assert "".join(excerpt.text for excerpt in found) == text
    assert {excerpt.path for excerpt in found} == {"pkg/a.py"}


def test_holes_in_rows_recombine_to_excerpts(tokenizer: Tokenizer) -> None:
    files = source_files(5)
    stream = TokenStream(
        files, tokenizer, row_tokens=120, seed=3, hole_share=1.0, header_share=0.0, excerpt_chars=80
    )
    pieces = 0
    for row in stream.rows(12).tolist():
        text = tokenizer.decode(row, skip_special_tokens=False)
        for piece in text.split("<|endoftext|>"):
            if not (piece.startswith(FIM_PREFIX) and FIM_MIDDLE in piece):
                continue
            prefix, _, rest = piece.removeprefix(FIM_PREFIX).partition(FIM_SUFFIX)
            suffix, _, middle = rest.partition(FIM_MIDDLE)
            pieces += 1
            if row[-1] == tokenizer.token_to_id("<|endoftext|>") or not text.endswith(piece):
                assert any(prefix + middle + suffix in file.text for file in files)
    assert pieces > 12


def test_a_restored_stream_goes_on(tokenizer: Tokenizer) -> None:
    def new_stream() -> TokenStream:
        return TokenStream(source_files(3), tokenizer, row_tokens=64, seed=5, excerpt_chars=90)

    whole, first, second = new_stream(), new_stream(), new_stream()
    expected = whole.rows(80)
    head = first.rows(33)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))

    assert whole.epoch > 0
    assert torch.equal(torch.cat([head, second.rows(47)]), expected)


def test_a_file_that_spells_a_control_token_is_not_learnt_from(tokenizer: Tokenizer) -> None:
    spelled = SourceFile(path="d/a.py", text="END = '<|endoftext|>'\n", origin="d")
    with pytest.raises(ValueError, match="no file to learn from"):
        TokenStream([spelled], tokenizer, row_tokens=8, seed=0)


def test_validation_bytes_are_those_of_the_targets(tokenizer: Tokenizer) -> None:
    rows = list(validation_rows(source_files(4), tokenizer, row_tokens=33, n_rows=5))
    assert len(rows) == 5
    for ids, size_bytes in rows:
        assert len(ids) == 33
        assert size_bytes == len(tokenizer.decode(ids[1:]).encode())


# --- training


@pytest.mark.parametrize("weighed", [False, True])
def test_head_loss_equals_the_plain_formula(weighed: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 211, 5, requires_grad=True)  # more targets than one chunk
    weight = torch.randn(17, 5, requires_grad=True)
    targets = torch.randint(0, 17, (3, 211))
    factors = torch.rand(3, 211) if weighed else None

    loss = head_loss(hidden, weight, targets, factors)
    (2 * loss).backward()
    found = (hidden.grad, weight.grad)
    hidden.grad = weight.grad = None
    logits = (hidden @ weight.T).flatten(0, 1)
    nll = functional.cross_entropy(logits, targets.flatten(), reduction="none")
    expected = (nll if factors is None else nll * factors.flatten()).mean()
    (2 * expected).backward()

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, (hidden.grad, weight.grad))


def test_gradients_reach_every_parameter(
    config: BaseConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    run = BaseRun(config, tmp_path, source_files(4), [], tokenizer, lambda: 0.0)
    run._accumulate()
    missing = [
        name
        for name, parameter in run.model.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert missing == []


def test_the_same_seed_gives_the_same_weights(
    config: BaseConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    result, reports = fit(config, tmp_path / "a", tokenizer)
    fit(config, tmp_path / "b", tokenizer)
    fit(replace(config, seed=2), tmp_path / "c", tokenizer)

    assert result.finished and result.step == 6
    assert reports[-1].loss < reports[0].loss
    assert [report.validation_loss is None for report in reports] == [True, False] * 3
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


def test_a_resumed_run_equals_an_uninterrupted_one(
    config: BaseConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    fit(config, tmp_path / "whole", tokenizer)
    stopped, _ = fit(config, tmp_path / "broken", tokenizer, stop_after=3)
    (tmp_path / "broken" / "checkpoint-00000009.tmp").mkdir()  # as a kill would leave it
    resumed, reports = fit(config, tmp_path / "broken", tokenizer)

    assert (stopped.step, stopped.finished) == (3, False)
    assert (resumed.step, resumed.finished, len(reports)) == (6, True, 3)
    assert weights(tmp_path / "whole") == weights(tmp_path / "broken")


def test_lines_that_greedy_decoding_writes() -> None:
    class Knows:
        """Gives each token that comes next, but for one of them."""

        def __call__(self, input_ids: torch.Tensor) -> Any:
            logits = functional.one_hot((input_ids + 1) % 10, 10).float()
            logits[input_ids == 7] = 0.0
            return SimpleNamespace(logits=logits)

    #     part   line     line        blank  part
    row = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 1, 2]
    ends = {3, 5, 0}

    assert matched_lines(Knows(), torch.tensor([row, row]), ends) == (2, 4)


def test_the_export_loads_and_scores_as_the_model_did(
    config: BaseConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    result, _ = fit(config, tmp_path, tokenizer)

    loaded = AutoModelForCausalLM.from_pretrained(result.export_dir)
    rows = list(validation_rows(source_files(6, seed=1), tokenizer, row_tokens=49, n_rows=3))
    ids = torch.tensor([row for row, _ in rows])
    loss = loaded(input_ids=ids, labels=ids).loss

    written = json.loads((result.export_dir / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 10000.0
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.eos_token_id == tokenizer.token_to_id("<|endoftext|>")
    assert loss.item() == pytest.approx(result.validation_loss, abs=0.05)
    size_bytes = sum(size for _, size in rows)
    assert result.bits_per_byte == pytest.approx(
        result.validation_loss * 3 * 48 / math.log(2) / size_bytes
    )
    assert 0.0 <= result.lines_matched <= 1.0
    assert export_checkpoint(tmp_path, tokenizer, tmp_path / "early") == 6
    assert (tmp_path / "early" / "model.safetensors").read_bytes() == (
        result.export_dir / "model.safetensors"
    ).read_bytes()


def test_a_deadline_decays_the_rate_to_zero(
    config: BaseConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    now = iter(range(0, 10_000))
    timed = replace(config, max_tokens=None, deadline_unix_s=60.0, validate_every_steps=10**6)
    reports: list[BaseProgress] = []
    result = fit_base(
        timed,
        tmp_path,
        train_files=source_files(3),
        validation_files=[],
        tokenizer=tokenizer,
        progress=reports.append,
        clock=lambda: float(next(now)),
    )

    assert result.finished and math.isnan(result.validation_loss)
    assert reports[-1].learning_rate < 0.2 * timed.muon_lr
    assert rate_factor(timed, n_steps=99, done_share=1.0) == 0.0
    assert rate_factor(timed, n_steps=0, done_share=0.0) == 0.5


def test_a_run_without_budget_is_refused(
    config: BaseConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="needs max_tokens or deadline_unix_s"):
        fit(replace(config, max_tokens=None), tmp_path, tokenizer)


def test_the_initial_weights_leave_the_global_generator_alone(config: BaseConfig) -> None:
    state = torch.random.get_rng_state()
    build_model(config, end_id=0)
    assert torch.equal(torch.random.get_rng_state(), state)
