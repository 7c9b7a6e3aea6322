"""Other engines, with our exports, say what we say: next-token log-probabilities of `mini`.

Run them with `pip install llama-cpp-python mistralrs gguf` and `pytest -m runtimes`; each is
skipped where its engine is not installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from code2lora.adapters.export import export
from code2lora.adapters.gguf_base import write_base_gguf
from code2lora.adapters.layout import AdapterMetadata
from code2lora.adapters.publish import publish
from code2lora.history.model import Snapshot, SourceFile
from code2lora.hypernetwork.checkpoint import load_family
from code2lora.hypernetwork.inject import LoraSlots
from code2lora.hypernetwork.lora import Lora
from code2lora.hypernetwork.models import resolve_model

pytestmark = [pytest.mark.runtimes, pytest.mark.slow]

MINI = resolve_model("mini", Path("/nowhere"))
TOLERANCE = 0.01
"""Nats."""
EFFECT = 0.1
"""What an adapter moves at least: a runtime that ignores it must not pass."""

PROMPTS = (
    "def parse(line):\n    return line.",
    "class Store:\n    def __init__(self, path):\n        self.",
    "import os\n\nfor name in os.listdir('.'):\n    print(",
    "# Grüße, 世界 — naïve\nx = '",
    "<|fim_prefix|>def add(a, b):\n    return <|fim_suffix|>\n\nprint(add(1, 2))\n<|fim_middle|>",
    '\n\n\t\tif not 12345 != 0x7F:\n\t\t\traise ValueError(f"it\'s {n!r}")\n',
)


class Reference:
    """Mini as we run it, in float32, with two adapters of repositories that differ."""

    def __init__(self, root: Path) -> None:
        torch.set_num_threads(1)
        self.tokenizer = Tokenizer.from_file(str(MINI.base / "tokenizer.json"))
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            MINI.base, dtype=torch.float32, local_files_only=True
        ).eval()
        self.slots = LoraSlots(self.model)
        family = load_family(MINI, torch.device("cpu"))
        base = family.config.base
        self.loras: dict[str, Lora | None] = {"base": None}
        self.paths: dict[str, Path] = {}
        texts = {"store": "class Store:\n    def get(self, key):\n        return self.rows[key]\n"}
        texts["math"] = "import math\n\n\ndef area(radius):\n    return math.pi * radius**2\n"
        for number, (name, text) in enumerate(texts.items()):
            snapshot = Snapshot(commit=f"{number}" * 40, files=(_file(name, text),), skipped=())
            lora = family.family.adapter(
                family.family.initial(family.family.read_snapshot(snapshot).features)
            )
            metadata = AdapterMetadata(
                repository="a" * 32,
                commit=snapshot.commit,
                state_sha256="5" * 64,
                checkpoint=family.fingerprint,
                base_model=base.id,
                base_fingerprint=base.fingerprint,
            )
            self.paths[name] = publish(lora, metadata, root, n_layers=base.n_layers).path
            # as the directory holds it
            self.loras[name] = lora.to("cpu", torch.bfloat16).to("cpu", torch.float32)

    def ids(self, prompt: str) -> list[int]:
        return list(self.tokenizer.encode(prompt, add_special_tokens=False).ids)

    @torch.no_grad()
    def logprobs(self, prompt: str, adapter: str) -> Tensor:
        """Return the next token's log-probabilities, (V,)."""
        with self.slots.use(self.loras[adapter]):
            logits = self.model(input_ids=torch.tensor([self.ids(prompt)])).logits[0, -1]
        return logits.log_softmax(-1)


def _file(name: str, text: str) -> SourceFile:
    return SourceFile(path=f"{name}.py", blob="b" * 40, text=text)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("adapters"))


def test_the_adapters_do_something(reference: Reference) -> None:
    """Or the comparisons below would show nothing."""
    for prompt in PROMPTS:
        found = [reference.logprobs(prompt, name) for name in reference.loras]
        assert (found[0] - found[1]).abs().max() > EFFECT
        assert (found[1] - found[2]).abs().max() > 2 * TOLERANCE


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_llama_cpp(reference: Reference, tmp_path: Path, dtype: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    base = tmp_path / "mini.gguf"
    write_base_gguf(MINI.base, base, name="mini", dtype=dtype)
    for name in reference.loras:
        lora = None
        if name != "base":
            lora = tmp_path / f"{name}.gguf"
            export(reference.paths[name], lora, "gguf", base_dir=MINI.base, dtype=dtype)
        with _llama(llama_cpp, base, lora) as llama:
            for prompt in PROMPTS:
                ids = llama.tokenize(prompt.encode(), add_bos=False, special=True)
                assert ids == reference.ids(prompt)
                llama.reset()
                llama.eval(ids)
                logits = torch.tensor(llama.scores[len(ids) - 1]).float()
                wanted = reference.logprobs(prompt, name)
                assert (logits.log_softmax(-1) - wanted).abs().max() < TOLERANCE


@contextmanager
def _llama(llama_cpp: Any, base: Path, lora: Path | None) -> Iterator[Any]:
    made = llama_cpp.Llama(
        model_path=str(base),
        lora_path=None if lora is None else str(lora),
        n_ctx=256,
        n_threads=1,
        logits_all=True,
        verbose=False,
    )
    try:
        yield made
    finally:
        made.close()


@pytest.mark.skipif(
    importlib.util.find_spec("mistralrs") is None, reason="mistralrs is not installed"
)
def test_mistral_rs_swaps_in_place(reference: Reference, tmp_path: Path) -> None:
    """One alias, new directories, with prefix caching on: what the publisher does over HTTP."""
    import mistralrs

    template = tmp_path / "plain.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    runner = mistralrs.Runner(
        which=mistralrs.Which.Lora(
            model_id=str(MINI.base), adapters=[], dtype=mistralrs.ModelDType.F32
        ),
        jinja_explicit=str(template),
    )
    generations = set()
    for name in ("base", "store", "math", "store"):
        if name != "base":
            loaded = runner.load_lora_adapter("mine", reference.paths[name], load_inplace=True)
            generations.add(loaded.generation)
        for prompt in PROMPTS:
            request = mistralrs.ChatCompletionRequest(
                messages=[{"role": "user", "content": prompt}],
                model="default",
                adapter=None if name == "base" else "mine",
                max_tokens=1,
                logprobs=True,
                top_logprobs=20,
                temperature=0.0,
            )
            answer = runner.send_chat_completion_request(request)
            [token] = answer.choices[0].logprobs.content
            wanted = reference.logprobs(prompt, name)
            found = {top.token: top.logprob for top in token.top_logprobs}
            assert len(found) == 20
            worst = max(abs(wanted[i].item() - logprob) for i, logprob in found.items())
            assert worst < TOLERANCE, (name, prompt, worst)
    assert len(generations) == 2
