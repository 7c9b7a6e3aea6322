from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from code2lora.errors import UserError
from code2lora.hypernetwork.lora import Lora
from code2lora.serving.adapter_cache import LoadedAdapter
from code2lora.serving.completion import AdapterIdentity, CompletionRequest
from code2lora.serving.engine import PREFILL_TOKENS, Engine
from code2lora.serving.model import BaseModel
from tests.serving.tiny import (
    COMMITS,
    CONTEXT_TOKENS,
    N_LAYERS,
    RANK,
    REPOSITORIES,
    publish_adapter,
    random_lora,
)

PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
"""PEFT reads a property that transformers has renamed."""

PROMPTS = ["def parse(line):", "class Store:\n", "import os", "7", "for name in héllo 😀"]
N_NEW = 40


def generated(reference: torch.nn.Module, model: BaseModel, prompt: str) -> tuple[str, int]:
    """Return what transformers decodes greedily, and the number of its tokens."""
    ids = torch.tensor([model.encode(prompt)])
    output = reference.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=N_NEW,
        do_sample=False,
        eos_token_id=sorted(model.end_ids),
        pad_token_id=model.separator_id,
    )[0, ids.shape[1] :].tolist()
    kept = [i for i in output if i not in model.end_ids]
    return model.decode(kept).rstrip("\ufffd"), len(kept)


def completed(
    engine: Engine, prompt: str, adapter: LoadedAdapter | None, n_new: int = N_NEW
) -> tuple[str, int]:
    done = engine.complete(CompletionRequest(prompt=prompt, max_tokens=n_new), adapter)
    return done.text, done.n_tokens


def test_greedy_decoding_equals_transformers(engine: Engine, model: BaseModel) -> None:
    expected = [generated(model.module, model, prompt) for prompt in PROMPTS]
    assert [completed(engine, prompt, None) for prompt in PROMPTS] == expected
    assert max(n for _, n in expected) > 10


@PEFT_WARNS
@pytest.mark.parametrize("which", [0, 1])
def test_greedy_decoding_with_an_adapter_equals_peft(
    engine: Engine, model: BaseModel, base_dir: Path, adapter_paths: tuple[Path, Path], which: int
) -> None:
    base = AutoModelForCausalLM.from_pretrained(base_dir, local_files_only=True)
    peft = PeftModel.from_pretrained(base, str(adapter_paths[which])).eval()
    adapter = engine.adapter(adapter_paths[which])
    expected = [generated(peft, model, prompt) for prompt in PROMPTS]
    assert [completed(engine, prompt, adapter) for prompt in PROMPTS] == expected
    assert expected != [completed(engine, prompt, None) for prompt in PROMPTS]


def test_a_prompt_read_in_pieces_gives_the_same_text(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = CompletionRequest(prompt="def parse(line):\n" * 5, max_tokens=30)
    whole = engine.complete(request)
    assert 20 < whole.n_prompt_tokens < PREFILL_TOKENS
    monkeypatch.setattr("code2lora.serving.scheduler.PREFILL_TOKENS", 7)
    fresh = Engine(engine.model, prefix_bytes=0)
    assert fresh.complete(request).text == whole.text
    assert fresh.stats.n_passes == 29 + -(-whole.n_prompt_tokens // 7)
    fresh.close()


def test_requests_with_different_adapters_never_mix(
    engine: Engine, adapter_paths: tuple[Path, Path]
) -> None:
    adapters = [None, *(engine.adapter(path) for path in adapter_paths)]
    jobs = [(prompt, adapter) for prompt in PROMPTS for adapter in adapters] * 2
    alone = [completed(engine, *job, 20) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: completed(engine, *job, 20), jobs))
    assert together == alone
    assert len({text for text, _ in alone[:3]}) == 3


def test_what_a_completion_says_of_itself(
    engine: Engine, model: BaseModel, adapter_paths: tuple[Path, Path]
) -> None:
    request = CompletionRequest(prompt="import os", max_tokens=5)
    done = engine.complete(request, engine.adapter(adapter_paths[1]))
    assert done.adapter == AdapterIdentity(REPOSITORIES[1], COMMITS[1], adapter_paths[1].name)
    assert done.n_prompt_tokens == len(model.encode("import os"))
    assert (done.n_tokens, done.finish_reason) == (5, "length")
    assert done.first_token_ms is not None
    assert 0 < done.first_token_ms < done.total_ms
    assert engine.complete(request).adapter is None


def test_pieces_join_to_the_text_and_are_whole_characters(engine: Engine) -> None:
    pieces: list[str] = []
    request = CompletionRequest(prompt="é", max_tokens=120, temperature=3.0, seed=5)
    done = engine.complete(request, on_text=pieces.append)
    assert "".join(pieces) == done.text
    assert len(pieces) > 10
    done.text.encode()


def test_the_text_ends_before_a_stop_string(engine: Engine) -> None:
    request = CompletionRequest(prompt="def parse(line):", max_tokens=N_NEW)
    whole = engine.complete(request)
    stop = whole.text[5:8]
    pieces: list[str] = []
    done = engine.complete(replace(request, stop=(stop, "never")), on_text=pieces.append)
    assert done.text == whole.text[: whole.text.index(stop)] == "".join(pieces)
    assert done.finish_reason == "stop"
    assert done.n_tokens < whole.n_tokens


@pytest.mark.parametrize("token", ["fim_pad", "repo_name", "file_sep"])
def test_control_tokens_end_the_text(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    end = getattr(engine.model.control, token)
    chosen = iter([5, 6, end])
    monkeypatch.setattr("code2lora.serving.sampling.Sampler.pick", lambda *_: next(chosen))
    done = engine.complete(CompletionRequest(prompt="x"))
    assert (done.text, done.finish_reason) == (engine.model.decode([5, 6]), "stop")
    assert done.n_tokens == 2


def test_no_tokens_can_be_asked_for(engine: Engine) -> None:
    done = engine.complete(CompletionRequest(prompt="x", max_tokens=0))
    assert (done.text, done.finish_reason, done.n_tokens) == ("", "length", 0)
    assert done.first_token_ms is None


def test_a_full_context_window_ends_the_text(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = engine.model.encode("x")[0]
    monkeypatch.setattr("code2lora.serving.sampling.Sampler.pick", lambda *_: token)
    for n_prompt in (1, 10, 80, 150):
        done = engine.complete(CompletionRequest(prompt="7" * n_prompt, max_tokens=10_000))
        assert done.n_prompt_tokens == min(n_prompt, 80)
        assert done.n_prompt_tokens + done.n_tokens == CONTEXT_TOKENS
        assert done.finish_reason == "length"


def test_a_smaller_window_can_be_asked_for(base_dir: Path) -> None:
    small = Engine(BaseModel.load(base_dir), context_tokens=32)
    done = small.complete(CompletionRequest(prompt="7" * 99, max_tokens=99))
    assert done.n_prompt_tokens == 16
    assert done.n_tokens <= 16
    assert Engine(BaseModel.load(base_dir), context_tokens=10**9).context_tokens == CONTEXT_TOKENS


def test_a_cancelled_completion_ends_at_the_next_token(engine: Engine) -> None:
    asked: list[None] = []

    def cancelled() -> bool:
        asked.append(None)
        return len(asked) > 3

    request = CompletionRequest(prompt="def parse(line):", max_tokens=N_NEW)
    done = engine.complete(request, cancelled=cancelled)
    assert (done.finish_reason, done.n_tokens) == ("cancelled", 3)
    assert engine.complete(request).text.startswith(done.text)


def test_equal_seeds_sample_alike_and_others_do_not(engine: Engine) -> None:
    request = CompletionRequest(prompt="x = ", max_tokens=20, temperature=1.5, seed=1)
    texts = [engine.complete(replace(request, seed=seed)).text for seed in (1, 1, 2, -1, 10**30)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4


def test_a_narrow_nucleus_and_a_low_temperature_are_greedy(engine: Engine) -> None:
    greedy = engine.complete(CompletionRequest(prompt="x = ", max_tokens=20)).text
    request = CompletionRequest(prompt="x = ", max_tokens=20, temperature=2.0, seed=3)
    assert engine.complete(request).text != greedy
    for change in ({"top_p": 0.0}, {"temperature": 1e-30}, {"temperature": 0.001}):
        assert engine.complete(replace(request, **change)).text == greedy  # type: ignore[arg-type]


def test_the_nucleus_leaves_out_the_unlikely(engine: Engine) -> None:
    from code2lora.serving.sampling import Sampler

    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    best = float(logits[0])
    for limits, kept in (
        ({"top_p": 0.7}, {0, 1}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.7}, {0, 1}),
    ):
        sampler = Sampler(temperature=1.0, seed=0, **limits)  # type: ignore[arg-type]
        assert {sampler.pick(logits, best, 0) for _ in range(400)} == kept


def test_an_adapter_that_breaks_the_model_is_told_of(engine: Engine) -> None:
    lora = random_lora(0)
    broken = engine.place(
        AdapterIdentity(None, None, "broken"),
        replace(lora, b={t: v * math.nan for t, v in lora.b.items()}),
    )
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError) as caught:
            engine.complete(CompletionRequest(prompt="x", temperature=temperature), broken)
        assert caught.value.message == "the model's output is not finite"
    assert engine.complete(CompletionRequest(prompt="x")).n_tokens


def test_an_adapter_for_another_model_is_refused_and_leaves_the_others(
    engine: Engine, adapter_paths: tuple[Path, Path]
) -> None:
    own = engine.adapter(adapter_paths[0])
    before = completed(engine, "x", own)
    with pytest.raises(UserError, match="but the model has 2 layers of 32 -> 32"):
        engine.place(AdapterIdentity(None, None, "other"), random_lora(0, hidden=16))
    assert completed(engine, "x", own) == before


@PEFT_WARNS
@pytest.mark.parametrize("which", [None, 0])
def test_a_score_is_the_likelihood_of_the_target(
    engine: Engine, base_dir: Path, adapter_paths: tuple[Path, Path], which: int | None
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(base_dir, local_files_only=True)
    if which is not None:
        reference = PeftModel.from_pretrained(reference, str(adapter_paths[which]))
    prefix, target = engine.model.encode("def parse("), engine.model.encode("line):\n")
    with torch.no_grad():
        logits = reference.eval()(torch.tensor([prefix + target])).logits[0]
    chances = logits.log_softmax(-1)[len(prefix) - 1 : -1]
    expected = -sum(chances[i, token].item() for i, token in enumerate(target))
    adapter = None if which is None else engine.adapter(adapter_paths[which])
    score = engine.score("def parse(", "line):\n", adapter)
    assert score.n_tokens == len(target)
    assert score.nll == pytest.approx(expected, rel=1e-5)


def test_a_score_is_taken_in_pieces(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, adapter_paths: tuple[Path, Path]
) -> None:
    adapter = engine.adapter(adapter_paths[0])
    given, wanted = "def parse(line):\n" * 4, "    return line.split(',')\n"
    whole = engine.score(given, wanted, adapter)
    monkeypatch.setattr("code2lora.serving.engine.PREFILL_TOKENS", 3)
    pieces = engine.score(given, wanted, adapter)
    assert pieces.n_tokens == whole.n_tokens
    assert pieces.nll == pytest.approx(whole.nll, rel=1e-5)


def test_scores_at_the_edges(engine: Engine) -> None:
    assert engine.score("x", "") == engine.score("", "")
    assert engine.score("x", "").n_tokens == 0
    assert engine.score("", "<|endoftext|>").n_tokens > 3
    assert engine.score("7" * 500, "8" * 500).n_tokens == CONTEXT_TOKENS * 3 // 4
    assert engine.score("7" * 500, "8").nll == engine.score("7" * (CONTEXT_TOKENS - 1), "8").nll


def test_adapters_are_kept_within_a_number_of_bytes(base_dir: Path, tmp_path: Path) -> None:
    paths = [publish_adapter(tmp_path / str(i), 0) for i in range(3)]
    model = BaseModel.load(base_dir)
    size = Engine(model).adapter(paths[0]).size_bytes
    assert size >= sum(
        t.numel() * 4 for side in (random_lora(0).a, random_lora(0).b) for t in side.values()
    )
    engine = Engine(model, adapter_bytes=2 * size)
    first, second = engine.adapter(paths[0]), engine.adapter(paths[1])
    assert engine.adapter(paths[0]) is first
    engine.adapter(paths[2])
    assert engine.adapter(paths[0]) is first
    assert engine.adapter(paths[1]) is not second
    assert engine.memory_bytes["adapters"] == 2 * size


def test_storage_that_layers_share_counts_once(engine: Engine) -> None:
    lora = random_lora(0)
    shared = Lora(
        a={t: v[:1].clone() for t, v in lora.a.items()},
        b={t: v[:1].clone() for t, v in lora.b.items()},
        rank=RANK,
        alpha=lora.alpha,
    )
    spread = Lora(
        a={t: v.expand(N_LAYERS, -1, -1) for t, v in shared.a.items()},
        b={t: v.expand(N_LAYERS, -1, -1) for t, v in shared.b.items()},
        rank=RANK,
        alpha=lora.alpha,
    )
    who = AdapterIdentity(None, None, "shared")
    one, all_ = engine.place(who, shared), engine.place(who, spread)
    assert 2 * one.size_bytes == all_.size_bytes
    assert completed(engine, "x", one) == completed(engine, "x", all_)


def test_a_missing_adapter_is_told_of_and_not_remembered(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an adapter directory"):
        engine.adapter(tmp_path / REPOSITORIES[0])
    path = publish_adapter(tmp_path, 0)
    assert engine.adapter(path).identity.generation == path.name


def test_what_a_key_stands_for_is_made_once(engine: Engine) -> None:
    made: list[int] = []

    def make() -> tuple[AdapterIdentity, Lora]:
        made.append(1)
        return AdapterIdentity(None, None, "generic"), random_lora(7)

    first = engine.placed("a key", make)
    assert engine.placed("a key", make) is first
    assert made == [1]


def test_the_module_is_left_as_it_was(
    base_dir: Path, model: BaseModel, adapter_paths: tuple[Path, Path]
) -> None:
    taken = BaseModel.load(base_dir)
    engine = Engine(taken)
    engine.complete(CompletionRequest(prompt="x"), engine.adapter(adapter_paths[0]))
    engine.close()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(taken.module(ids).logits, model.module(ids).logits)
    assert not any(module._forward_hooks for module in taken.module.modules())


def test_closing_ends_what_is_under_way(base_dir: Path) -> None:
    engine = Engine(BaseModel.load(base_dir))
    results: list[object] = []
    for _ in range(3):
        engine.submit(
            CompletionRequest(prompt="def parse(line):", max_tokens=100, temperature=2.0),
            on_done=results.append,
        )
    engine.close()
    assert len(results) == 3
    with pytest.raises(AssertionError, match="the engine is closed"):
        engine.complete(CompletionRequest(prompt="x"))
