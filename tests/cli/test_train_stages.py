"""`train`, every stage for real: the command makes a model out of small repositories."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from code2lora.cli.app import cli
from code2lora.cli.train import live
from code2lora.hypernetwork.models import resolve_model
from code2lora.training.pretraining import corpus
from code2lora.training.split import bucket
from tests.cli.conftest import Outcome, Run
from tests.gitrepo import clean_environment
from tests.training import worlds
from tests.training.test_run import RECIPE

ROOT = Path(__file__).parents[2]
AUDIT = "audit.json"

BASE_RECIPE = """
[base]
vocab_size = 330
hidden_size = 24
n_layers = 2
n_heads = 4
intermediate_size = 40
max_position_embeddings = 256
row_tokens = 48
rows_per_step = 4
rows_per_pass = 4
max_tokens = 768
warmup_steps = 1
validation_rows = 2
autocast_bf16 = false
n_threads = 1
[corpus]
validation_permille = 300
[baselines]
steps = 2
watch_every = 1
context_tokens = 16
[audit]
items = 6
fresh_items = 2
freshness = [2]
recent_commits = 3
replay_commits = 1
held_out_share = 0.3
lambdas = [0.0, 1.0, 2.0]
resamples = 20
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Folders:
    """What the stages of one run fill."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.toml"

    def given(self, out: str = "model") -> list[str]:
        """The options that most stages take."""
        place = [f"--mined={self.mined}", f"--base={self.base / 'export'}"]
        return [*place, f"--out={self.root / out}", f"--recipe={self.recipe}"]


def _run(*arguments: object) -> Outcome:
    done = CliRunner().invoke(cli, ["train", *map(str, arguments)])
    return Outcome(done.exit_code, done.stdout, done.stderr)


def _names() -> dict[str, list[str]]:
    """Names of repositories to train on, and of others to choose by."""
    found: dict[str, list[str]] = {"train": [], "validation": []}
    for i in range(60):
        kind = {8: "validation", 9: "test"}.get(bucket(f"owner/name-{i}"), "train")
        found.setdefault(kind, []).append(f"owner/name-{i}")
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Repositories, packages to read, and a recipe."""
    found = Folders(tmp_path_factory.mktemp("stages"))
    names = _names()
    made = [worlds.make_repository(found.git, name) for name in (*worlds.WORDS, *worlds.MORE_WORDS)]
    given = [*names["train"][:3], *names["validation"][:2], names["train"][3]]
    lines = [f"{name}={repo.git_dir}" for name, repo in zip(given, [*made, made[0]], strict=True)]
    (found.root / "list.txt").write_text("\n".join(lines) + "\n")
    found.recipe.write_text(RECIPE.replace("repositories = 2", "repositories = 4") + BASE_RECIPE)
    site, info = found.site, found.site / "made-1.0.dist-info"
    info.mkdir(parents=True)
    metadata = ("Metadata-Version: 2.4", "Name: made", "Version: 1.0", "License-Expression: MIT")
    url = f"Project-URL: Source, https://github.com/{names['train'][4]}"
    (info / "METADATA").write_text("\n".join([*metadata, url]) + "\n")
    for n in range(12):
        words = worlds.WORDS[("alpha", "beta", "gamma")[n % 3]]
        text = worlds.source(words, worlds.random.Random(n), n_functions=12)
        (site / f"m{n}.py").write_text(text)
    (info / "RECORD").write_text("".join(f"m{n}.py,,\n" for n in range(12)))
    return found


@pytest.fixture(scope="module")
def done(folders: Folders) -> dict[str, Outcome]:
    """Run every stage once, each on what those before it made; return how each of them ended."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CONFIG", "STATE", "DATA", "RUNTIME"):
            patch.setenv(f"CODE2LORA_{name}_DIR", str(folders.root / "home" / name))
        patch.setattr(corpus, "_stdlib_paths", lambda stdlib: [])  # it takes seconds to read
        recipe, rows = f"--recipe={folders.recipe}", ("--row=shared_lora", "--row=text_lora")
        stages: dict[str, tuple[object, ...]] = {
            "base": (f"--out={folders.base}", recipe, f"--site={folders.site}"),
            "mine": (f"--list={folders.root / 'list.txt'}", f"--out={folders.mined}", recipe),
            "fit": (*folders.given(), "--device=cpu"),
            "baselines": (*folders.given("rows"), *rows, "--device=cpu"),
            "evaluate": (*folders.given(), f"--baselines={folders.rows}", "--device=cpu"),
            "audit": (*folders.given(), f"--shared={folders.rows}"),
            "bundle": (
                *(f"--mined={folders.mined}", f"--base={folders.base}"),
                *(f"--fitted={folders.model}", f"--out={folders.bundled}"),
            ),
        }
        for stage, arguments in stages.items():
            found[stage] = _run(stage, *arguments)
    return found


def test_every_stage_ends_with_its_status(done: dict[str, Outcome]) -> None:
    failed = {stage: (end.status, end.err) for stage, end in done.items() if end.status}
    # A model that has learnt for two steps does not know its repositories, and the audit says so.
    assert failed.keys() == {"audit"} and failed["audit"][0] == 4


def test_what_every_stage_says(done: dict[str, Outcome], folders: Folders) -> None:
    assert done["base"].out.startswith(f"  decoder   {folders.base / 'export'}\n")
    assert [line.split()[0] for line in done["mine"].out.splitlines()] == ["STATUS", *["mined"] * 6]
    assert done["fit"].out.splitlines()[-1].split() == ["model", str(folders.model)]
    assert "own-wrong" in done["fit"].out
    assert [line.split()[0] for line in done["baselines"].out.splitlines()] == [
        "shared_lora",
        "text_lora",
    ]
    assert done["evaluate"].out.splitlines()[-1] == f"report  {folders.model / 'report/index.html'}"
    assert done["audit"].out.splitlines()[-1].split() == ["written", str(folders.model / AUDIT)]
    assert done["bundle"].out == f"{folders.bundled / 'MODEL_CARD.md'}\n"
    for stage, end in done.items():
        assert "\r" not in end.err, f"{stage}: a bar was drawn where there is no terminal"
        assert "Traceback" not in end.err


def test_what_every_stage_leaves(done: dict[str, Outcome], folders: Folders) -> None:
    measured = json.loads((folders.model / "evaluation.json").read_text())
    assert {name for name, row in measured["rows"].items() if row["measured"]} == {
        *("pretrained", "rag", "drc", "shared_lora", "text_lora", "evo", "generic", "wrong")
    }
    audited = json.loads((folders.model / AUDIT).read_text())
    assert audited["verdict"] == "failed"
    config = json.loads((folders.bundled / "hypernetwork" / "config.json").read_text())
    assert config["audit"]["verdict"] == "failed"
    assert config["metrics"]
    card = (folders.bundled / "MODEL_CARD.md").read_text()
    assert "### Assertions" not in card, "there are none in these repositories"


def test_a_second_model_over_the_same_base(done: dict[str, Outcome], folders: Folders) -> None:
    second = folders.bundled.with_name("second")
    found = _run(
        "bundle",
        *(f"--mined={folders.mined}", f"--base={folders.base}", f"--fitted={folders.model}"),
        *(f"--base-of={folders.bundled.name}", f"--out={second}"),
    )

    assert found.status == 0
    assert not (second / "base").exists()
    assert resolve_model(str(second), second).base == folders.bundled / "base"
    cards = [(folder / "MODEL_CARD.md").read_text() for folder in (folders.bundled, second)]
    said = f"; the files are those of `{folders.bundled.name}` |"
    assert [said in card for card in cards] == [False, True]
    sizes = [re.search(r"\d+ MB in\sall", card) for card in cards]
    assert all(sizes) and len({found.group() for found in sizes if found}) == 1


def test_a_stage_that_is_done_is_done_again_at_once(
    code2lora: Run, done: dict[str, Outcome], folders: Folders
) -> None:
    before = (folders.model / "hypernetwork" / "model.safetensors").read_bytes()

    again = code2lora("train", "fit", *folders.given(), "--device=cpu", "--json")
    mined = code2lora(
        *("train", "mine", "--list", folders.root / "list.txt", "--out", folders.mined),
        *("--recipe", folders.recipe, "--json"),
    )

    assert again.status == 0
    assert json.loads(again.out)["step"] == 3
    assert (folders.model / "hypernetwork" / "model.safetensors").read_bytes() == before
    assert {each["status"] for each in json.loads(mined.out)} == {"kept"}


def _launch(folders: Folders, out: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Fit with the command of the documentation, in two processes."""
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    processes = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--main_process_port=0"]
    chosen = ["--mixed_precision=no", "--dynamo_backend=no", "--num_cpu_threads_per_process=1"]
    command = ["-m", "code2lora", "train", "fit", *folders.given(out), "--device=cpu", *options]
    return subprocess.run(
        [*launcher, *processes, *chosen, *command],
        cwd=ROOT,
        env={**clean_environment(), "HOME": str(folders.root), "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_accelerate_launches_two_processes_that_fit_what_one_does(
    done: dict[str, Outcome], folders: Folders
) -> None:
    launched = _launch(folders, "two", "--json")

    assert launched.returncode == 0, launched.stderr
    assert json.loads(launched.stdout)["step"] == 3  # the first process reports alone
    for part in ("encoder/model.safetensors", "hypernetwork/model.safetensors"):
        one, two = (load_file(folders.root / out / part) for out in ("model", "two"))
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def _stage(name: str, folders: Folders, **changed: Path) -> list[object]:
    """Return a stage's arguments, with some of its folders in place of the right ones."""
    place = {
        "mined": folders.mined,
        "base": folders.base / "export",
        "out": folders.root / f"out-{name}",
        **changed,
    }
    given = [f"--{option}={path}" for option, path in place.items()]
    options: dict[str, list[object]] = {
        "export": ["dataset", "export", f"--mined={place['mined']}", f"--out={place['out']}"],
        "embed": ["embed", f"--mined={place['mined']}", f"--encoder={folders.model / 'encoder'}"],
        "bundle": [
            *("bundle", f"--mined={place['mined']}", f"--base={folders.base}"),
            *(f"--fitted={changed.get('out', folders.model)}", f"--out={folders.root / 'b'}"),
        ],
        "fit": ["fit", *given, f"--recipe={folders.recipe}", "--device=cpu"],
        "baselines": ["baselines", *given, f"--recipe={folders.recipe}", "--device=cpu"],
        "evaluate": ["evaluate", *given, f"--recipe={folders.recipe}", "--device=cpu"],
        "audit": ["audit", *given, f"--recipe={folders.recipe}", "--device=cpu"],
    }
    return ["train", *options[name]]


MINED = ("export", "embed", "fit", "baselines", "evaluate", "audit", "bundle")
PARTS = ("tokenizer.json", "config.json", "model.safetensors")
DECODED = ("fit", "baselines", "evaluate", "audit")


def _is_one_line(end: Outcome, *words: str) -> None:
    """Assert that an error is one line with something to do about it."""
    said = [line for line in end.err.splitlines() if line.startswith(("error:", "hint:"))]
    assert end.status == 1, end
    assert [line.partition(":")[0] for line in said] == ["error", "hint"], end.err
    assert "this is a bug" not in end.err
    assert end.out == ""
    for word in words:
        assert word in said[0], end.err


@pytest.mark.parametrize("stage", MINED)
def test_a_folder_in_which_nothing_is_mined(
    stage: str, code2lora: Run, done: dict[str, Outcome], folders: Folders, tmp_path: Path
) -> None:
    end = code2lora(*_stage(stage, folders, mined=tmp_path, out=folders.model))

    _is_one_line(end, str(tmp_path), "holds no mined repositories")


@pytest.mark.parametrize("stage", ["export", "embed", "fit", "baselines", "evaluate", "audit"])
def test_a_table_that_is_damaged(
    stage: str, code2lora: Run, done: dict[str, Outcome], folders: Folders, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(folders.mined, tmp_path / "mined"))
    for table in damaged.glob("*/changes.parquet"):
        table.write_bytes(table.read_bytes()[:-20])
    # What was found before must not hide it.
    for kept in (*damaged.glob("*/bags-*"), *damaged.glob(".features/*")):
        shutil.rmtree(kept) if kept.is_dir() else kept.unlink()

    end = code2lora(*_stage(stage, folders, mined=damaged, out=tmp_path / "out"))
    if stage in ("evaluate", "audit"):
        shutil.copytree(folders.model, tmp_path / "out")
        shutil.rmtree(tmp_path / "out" / "evaluation", ignore_errors=True)
        end = code2lora(*_stage(stage, folders, mined=damaged, out=tmp_path / "out"))

    _is_one_line(end, "cannot read", "changes.parquet")


@pytest.mark.parametrize(
    ("stage", "damage"), [*zip(DECODED, [*PARTS, "config.json"], strict=True)], ids=str
)
def test_a_decoder_that_is_damaged(
    stage: str,
    damage: str,
    code2lora: Run,
    done: dict[str, Outcome],
    folders: Folders,
    tmp_path: Path,
) -> None:
    base = Path(shutil.copytree(folders.base / "export", tmp_path / "base"))
    (base / damage).write_bytes((base / damage).read_bytes()[:-40])

    end = code2lora(*_stage(stage, folders, base=base, out=folders.model))

    _is_one_line(end, str(base))


@pytest.mark.parametrize("stage", ["evaluate", "audit", "bundle"])
def test_a_model_that_was_not_fitted(
    stage: str, code2lora: Run, done: dict[str, Outcome], folders: Folders, tmp_path: Path
) -> None:
    end = code2lora(*_stage(stage, folders, out=tmp_path))

    _is_one_line(end, str(tmp_path))


def test_a_recipe_without_a_budget_and_one_with_an_unknown_key(
    code2lora: Run, done: dict[str, Outcome], folders: Folders, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(folders.recipe.read_text().replace("max_steps = 3\n", ""))
    _is_one_line(code2lora(*_stage("fit", folders), f"--recipe={recipe}"), "the fit has no budget")
    recipe.write_text("[fit.windows]\nrepositorys = 4\n")
    _is_one_line(
        code2lora(*_stage("fit", folders), f"--recipe={recipe}"),
        "unknown key fit.windows.repositorys",
    )


@pytest.mark.parametrize("stage", ["mine", "base", "embed", *DECODED])
def test_an_interrupt_in_any_stage_ends_it_whole(
    stage: str,
    code2lora: Run,
    done: dict[str, Outcome],
    folders: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """^C comes as soon as a stage has told how far it is; the same command then goes on."""
    told = []

    @contextmanager
    def interrupting(title: str) -> Iterator[Callable[[float, str], None]]:
        def tell(share: float, said: str) -> None:
            told.append(said)
            if len(told) == 1:
                os.kill(os.getpid(), signal.SIGINT)

        yield tell

    room = live if stage == "fit" else sys.modules[f"code2lora.cli.train.{stage}"]
    out = tmp_path / "out"
    if stage in ("evaluate", "audit"):
        shutil.copytree(folders.model, out, ignore=shutil.ignore_patterns("evaluation", "audit*"))
    recipe = f"--recipe={folders.recipe}"
    arguments = {
        "mine": ["train", "mine", f"--list={folders.root / 'list.txt'}", f"--out={out}", recipe],
        "base": ["train", "base", f"--out={out}", f"--site={folders.site}", recipe],
    }.get(stage) or _stage(stage, folders, out=out)
    if stage == "embed":
        mined = shutil.copytree(folders.mined, tmp_path / "mined")
        arguments = _stage(stage, folders, mined=Path(mined))
    if stage == "baselines":
        arguments += ["--row=shared_lora"]
    if stage == "evaluate":
        arguments += ["--suite=cross-repo", "--row=pretrained", "--row=evo"]
    monkeypatch.setattr(corpus, "_stdlib_paths", lambda stdlib: [])
    monkeypatch.setattr(room, "progress", interrupting)

    end = code2lora(*arguments)

    assert end.status == 130, end
    assert "stopping at the next whole step; ^C again to stop at once\n" in end.err
    assert end.err.splitlines()[-1] == (
        "stopped; nothing was written"
        if stage == "audit"
        else "stopped; the same command goes on from here"
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = code2lora(*arguments)
    assert again.status == (4 if stage == "audit" else 0), again


@pytest.mark.parametrize(
    "command",
    [
        *(["mine"], ["base"], ["embed"], ["fit"], ["baselines"], ["evaluate"], ["audit"]),
        *(["bundle"], ["dataset"], ["dataset", "export"], ["dataset", "import"]),
    ],
    ids=" ".join,
)
def test_every_stage_has_help_with_examples(command: list[str], code2lora: Run) -> None:
    end = code2lora("train", *command, "--help")

    assert end.status == 0
    assert "Examples:" in end.out
    assert f"code2lora train {' '.join(command)}" in end.out
