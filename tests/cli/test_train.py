"""`train`: options into recipes, ^C into a flag; the training itself has tests of its own room."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from code2lora.cli.progress import progress, stop_on_interrupt
from tests.cli.conftest import Run
from tests.gitrepo import GitRepo


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / name for name in ("mined", "base", "out")}
    found["mined"].mkdir()
    found["base"].mkdir()
    return found


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str]]:
    """Stand in for the loading of a base decoder; the list fills with what is asked for."""
    from code2lora.training import run

    asked: list[tuple[Path, str]] = []
    monkeypatch.setattr(run, "load_decoder", lambda path, *, name, **_: asked.append((path, name)))
    return asked


def fit_result(**changes: Any) -> Any:
    from code2lora.training.fitting.schedule import FitResult

    values = {"step": 7, "finished": True, "best_step": 5, "best_own_minus_wrong": -0.25}
    return FitResult(**(values | changes))


def place(folders: dict[str, Path]) -> list[str]:
    return [f"--{name}={folders[name]}" for name in ("mined", "base", "out")]


def test_repositories_are_mined(code2lora: Run, repo: GitRepo, tmp_path: Path) -> None:
    for n in range(3):
        repo.commit({f"m{n}.py": f"def function_{n}(value):\n    return value + {n}\n" * 9})
    empty = tmp_path / "parent" / "empty"
    empty.mkdir(parents=True)
    out = tmp_path / "mined"

    done = code2lora("train", "mine", f"me/project={repo.path}", empty, "--out", out)

    assert done.status == 0
    lines = done.out.splitlines()
    assert lines[0].split() == ["STATUS", "REPOSITORY", "STEPS", "TASKS"]
    assert lines[1].split()[:3] == ["mined", "me/project", "3"]
    assert lines[2].split() == ["failed", "parent/empty", "0", "0"]
    assert "tasks for evaluation were seen in training" in done.err
    assert "mining 100%  parent/empty\n" in done.err
    assert f"parent/empty: {empty} is not inside a git repository\n" in done.err
    again = json.loads(
        code2lora("train", "mine", f"me/project={repo.path}", "--out", out, "--json").out
    )
    assert [(result["name"], result["status"]) for result in again] == [("me/project", "kept")]


def test_repositories_are_listed_in_a_file(code2lora: Run, repo: GitRepo, tmp_path: Path) -> None:
    repo.commit({"test_a.py": "def test_a():\n    assert f() == 1\n"})
    repo.commit({"b.py": "x = 1\n"})
    listed = tmp_path / "list.txt"
    listed.write_text(f"# two of them\n\nme/one={repo.path}\n  me/two={repo.path.name}\n")
    out = tmp_path / "mined"

    place = ("--list", listed, "--out", out, "--stream", "assertions", "--json")
    done = code2lora("train", "mine", *place)

    found = json.loads(done.out)
    assert [(each["name"], each["status"]) for each in found] == [
        ("me/one", "mined"),
        ("me/two", "mined"),
    ]
    assert [each["rows"]["commits"] for each in found] == [1, 1]
    twice = code2lora("train", "mine", *place, f"ME/one={repo.path}")
    assert (twice.status, twice.out) == (1, "")
    assert "two repositories are called me/one" in twice.err
    nothing = code2lora("train", "mine", "--out", out)
    assert (nothing.status, nothing.out) == (2, "")


def test_tasks_go_to_the_released_layout_and_back(
    code2lora: Run, repo: GitRepo, tmp_path: Path
) -> None:
    for n in range(3):
        repo.commit({"test_a.py": f"def test_a():\n    assert f({n}) == {n}\n"})
    mined, data, back = (tmp_path / name for name in ("mined", "data", "back"))
    code2lora("train", "mine", f"me/p={repo.path}", "--out", mined, "--stream", "assertions")

    exported = code2lora("train", "dataset", "export", "--mined", mined, "--out", data, "--json")
    imported = code2lora("train", "dataset", "import", data, "--out", back)

    files = json.loads(exported.out)["rows"]
    assert files and all((data / name).is_file() for name in files)
    assert "0 tasks that training has seen are left out" in exported.err
    assert imported.status == 0
    assert imported.out.splitlines()[1].split()[:3] == ["mined", "me/p", "3"]
    nothing = code2lora("train", "dataset", "import", back, "--out", mined)
    assert nothing.status == 1
    assert nothing.err.startswith(f"error: {back} holds no released data")


def test_a_repository_that_is_not_there(code2lora: Run, tmp_path: Path) -> None:
    done = code2lora("train", "mine", f"a/b={tmp_path / 'none'}", "--out", tmp_path / "mined")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(f"error: there is no directory {tmp_path / 'none'}\n")


def test_an_unknown_recipe(code2lora: Run, folders: dict[str, Path]) -> None:
    done = code2lora("train", "fit", *place(folders), "--recipe", "maxi")
    assert done.status == 1
    assert (
        done.err == "error: there is no recipe 'maxi'\n"
        "hint: give a path, or one of: mini, mini-gru, paper, paper-factorized\n"
    )


def test_a_fit_by_the_recipe(
    code2lora: Run,
    folders: dict[str, Path],
    decoder: list[tuple[Path, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from code2lora.training import run
    from code2lora.training.fitting.schedule import FitProgress

    def fit(
        recipe: Any,
        mined: Path,
        loaded: Any,
        out: Path,
        *,
        features: Path | None,
        begun: Callable[[str, float], None],
        progress: Callable[..., None],
        stop: Any,
    ) -> Any:
        assert features is None
        begun("me/project", 1.0)
        assert (mined, out, recipe.fit.max_seconds) == (folders["mined"], folders["out"], 90.0)
        assert not stop()
        now = FitProgress(
            step=7,
            done_share=1.0,
            seconds=90.0,
            loss=1.5,
            margin_loss=0.1,
            own_minus_wrong=-0.125,
            learning_rate=1e-3,
        )
        progress(now)
        return fit_result()

    monkeypatch.setattr(run, "fit", fit)
    done = code2lora("train", "fit", *place(folders), "--minutes", "1.5")
    assert done.status == 0
    assert decoder == [(folders["base"], "base")]
    assert done.err == (
        "reading 100%  me/project\nfitting 100%  step 7, loss 1.500, own-wrong -0.125\n"
    )
    assert done.out == (
        "  steps   7; the weights are of step 5\n"
        "  unseen  own-wrong -0.2500 nats a token\n"
        f"  model   {folders['out']}\n"
    )


def test_a_fit_that_was_stopped_is_130(
    code2lora: Run,
    folders: dict[str, Path],
    decoder: list[tuple[Path, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from code2lora.training import run

    def fit(*_: Any, stop: Callable[[], bool], **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        return fit_result(finished=False, best_own_minus_wrong=None)

    monkeypatch.setattr(run, "fit", fit)
    done = code2lora("train", "fit", *place(folders), "--base-name", "me/base")
    assert done.status == 130
    assert decoder == [(folders["base"], "me/base")]
    assert done.out.endswith("  model   not written yet\n")
    assert done.err == (
        "stopping at the next whole step; ^C again to stop at once\n"
        "stopped; the same command goes on from here\n"
    )


def findings(finished: bool = True) -> Any:
    interval = {"mean": 0.25, "low": -0.5, "high": 1.0}
    names = ("nll", "exact_match", "edit_similarity", "codebleu")
    row = {
        "columns": dict.fromkeys(names, interval),
        "over_items": {"paper_exact_match": 0.5},
        "minus": {},
    }
    evo = row | {"minus": {"pretrained": {"nll": interval}}}
    rows = {"pretrained": "Pretrained", "evo": "Code2LoRA-Evo", "rag": "RAG"}
    content = {
        "suites": {"in-repo": {"strata": {"all": {"pretrained": row, "evo": evo}}}},
        "rows": {
            name: {"title": title, "measured": name != "rag", "reason": "was not\x1b[2J asked for"}
            for name, title in rows.items()
        },
        "notes": ["in-repo: a note"],
    }
    return SimpleNamespace(content=content, finished=finished, page=Path("report/index.html"))


def test_figures_are_printed(
    code2lora: Run,
    folders: dict[str, Path],
    decoder: list[tuple[Path, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from code2lora.training import run

    asked: list[Any] = []

    def evaluate(recipe: Any, *given: Any, progress: Callable[..., None], stop: Any) -> Any:
        asked.append((recipe.evaluate, given[-1]))
        progress(1.0, "in-repo, RAG")
        return findings()

    monkeypatch.setattr(run, "evaluate", evaluate)
    done = code2lora("train", "evaluate", *place(folders))
    assert done.status == 0
    lines = [line.split() for line in done.out.splitlines() if line.strip()]
    assert lines[0] == ["in-repo"]
    assert lines[1][:4] == ["row", "NLL", "-", "pretrained"]
    assert lines[3] == ["Pretrained", "0.2500", "25.0%", "25.0%", "25.0%", "50.0%"]
    assert lines[4][:4] == ["Code2LoRA-Evo", "0.2500", "+0.2500", "(-0.5000"]
    assert lines[-1] == ["report", "report/index.html"]
    assert done.err == (
        "evaluating 100%  in-repo, RAG\nRAG: was not\ufffd[2J asked for\nin-repo: a note\n"
    )
    assert asked[0][1].suites == ("cross-repo", "in-repo", "out-of-time")
    assert not asked[0][1].test
    done = code2lora(
        *("train", "evaluate", *place(folders), "--json", "--suite=in-repo", "--row=evo"),
        *("--items=5", f"--baselines={folders['base']}", "--test-bucket"),
    )
    assert json.loads(done.out) == findings().content
    config, measuring = asked[1]
    assert (config.file_items, config.commit_items, config.assertion_items) == (5, 5, 5)
    assert (measuring.suites, measuring.rows) == (("in-repo",), ("evo",))
    assert measuring.test and measuring.baselines == folders["base"]


def test_an_evaluation_that_was_stopped_is_130(
    code2lora: Run,
    folders: dict[str, Path],
    decoder: list[tuple[Path, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from code2lora.training import run

    monkeypatch.setattr(run, "evaluate", lambda *_, **__: findings(finished=False))
    done = code2lora("train", "evaluate", *place(folders))
    assert (done.status, done.out) == (130, "")
    assert done.err == "stopped; the same command goes on from here\n"


def test_the_options_name_every_row_and_suite() -> None:
    from code2lora.cli.train.evaluate import _ROWS, _SUITES
    from code2lora.training.evaluation.rows import ROWS
    from code2lora.training.evaluation.suites import SUITES

    assert (_SUITES, _ROWS) == (SUITES, ROWS)


def test_a_base_is_trained_and_gone_on_with(
    code2lora: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer is real and small; the corpus is made up and the training is not run."""
    from code2lora.training.pretraining import base, corpus, pretrain

    texts = [f"def function_{n}(value, other):\n    return value + {n}\n" * 20 for n in range(40)]
    files = [
        corpus.SourceFile(path=f"made/m{n}.py", text=text, origin="made")
        for n, text in enumerate(texts)
    ]
    asked: list[list[Path]] = []

    def gather(places: list[Path], *, config: Any) -> corpus.Corpus:
        asked.append(places)
        return corpus.Corpus(train=files[1:], validation=files[:1])

    monkeypatch.setattr(pretrain, "gather", gather)
    recipe = tmp_path / "tiny.toml"
    recipe.write_text("[tokenizer]\nmax_chars = 200_000\n[base]\nvocab_size = 290\n")
    site = tmp_path / "site"
    site.mkdir()
    vocabularies: list[dict[str, int]] = []

    def fit_base(config: Any, out_dir: Path, **given: Any) -> Any:
        assert given["train_files"] and given["validation_files"]
        vocabularies.append(given["tokenizer"].get_vocab())
        return base.BaseResult(
            step=3,
            n_tokens=4096,
            finished=True,
            validation_loss=2.0,
            bits_per_byte=1.0625,
            lines_matched=0.25,
            export_dir=out_dir / "export",
        )

    monkeypatch.setattr(pretrain, "fit_base", fit_base)
    out = tmp_path / "out"
    command = ["train", "base", f"--out={out}", f"--recipe={recipe}", f"--site={site}"]
    done = code2lora(*command)
    assert done.status == 0, done.err
    assert done.out == (
        f"  decoder   {out / 'export'}\n"
        "  steps     3, 4,096 tokens\n"
        "  held out  1.0625 bits a byte\n"
    )
    assert (out / "manifest.json").is_file()
    recipe.write_text("[tokenizer]\nmax_chars = 100_000\n[base]\nvocab_size = 280\n")
    assert code2lora(*command).status == 0
    assert vocabularies[0] == vocabularies[1], "another tokenizer would spoil the checkpoints"
    assert asked == [[site], [site]]
    assert len(vocabularies[0]) == 290


def test_the_second_interrupt_is_not_held_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_pipe_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("working") as tell:
        for step in range(100):
            tell(step / 100, f"step {step}")
        tell(1.0, "done")
    assert capsys.readouterr().err == "working 0%  step 0\nworking 100%  done\n"


def test_launched_processes_agree_from_the_cpu_and_sum_on_their_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL alone would refuse the figures, which are on the CPU."""
    import accelerate
    import torch

    from code2lora.cli.train.fit import _place
    from code2lora.serving import model

    asked: list[dict[str, Any]] = []

    def join(**given: Any) -> Any:
        asked.append(given)
        return SimpleNamespace(device=torch.device("cpu"))

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "PartialState", join)
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(model, "resolve_device", torch.device)
        _place(device)

    assert asked == [
        {"cpu": False, "backend": "cuda:nccl,cpu:gloo"},
        {"cpu": True, "backend": None},
    ]
