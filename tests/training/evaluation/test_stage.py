"""The whole stage on small worlds: what it writes, what it leaves out, how it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from code2lora.errors import UserError
from code2lora.hypernetwork.checkpoint import load_family
from code2lora.hypernetwork.models import resolve_model
from code2lora.training import run
from code2lora.training.baselines.loading import (
    FULL_TUNING,
    FULL_TUNING_RAG,
    REPOSITORY_LORA,
    SHARED_LORA,
    Manifest,
    OwnManifest,
    write_manifest,
)
from code2lora.training.baselines.lora_files import write_lora
from code2lora.training.data.dataset import LINES, RepositoryData
from code2lora.training.data.leakage import Leaks
from code2lora.training.data.shards import Shard, folder_name
from code2lora.training.evaluation import answers
from code2lora.training.evaluation.evaluate import EvaluateConfig
from code2lora.training.evaluation.findings import Findings
from code2lora.training.evaluation.rows import ROWS
from code2lora.training.evaluation.stage import Measuring, measure
from code2lora.training.evaluation.suites import CROSS_REPO, IN_REPO, SUITES
from code2lora.training.fitting.items import ItemConfig
from code2lora.training.fitting.learner import LearnerConfig, build_learner
from code2lora.training.publish import generic_states, publish
from code2lora.training.recipe import Recipe
from tests.training.worlds import make_base

LEARNER = LearnerConfig(encoder_width=12, hidden_width=14, trunk_width=10, rank=3, alpha=6.0)
NO_LEAKS = Leaks(0, 0, 0, {})


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    defaults = Recipe()
    return replace(
        defaults,
        fit=replace(
            defaults.fit,
            items=ItemConfig(max_tokens=48, prefix_tokens=16, suffix_tokens=8),
            autocast_bf16=False,
            n_lanes=1,
        ),
        evaluate=EvaluateConfig(
            recent_commits=2,
            replay_commits=1,
            out_of_time_gap=2,
            file_items=2,
            commit_items=2,
            prompt_tokens=40,
            chunk_tokens=16,
            max_new_tokens=4,
            resamples=20,
        ),
    )


@pytest.fixture
def decoder(tokenizer: Tokenizer, tmp_path: Path) -> run.Decoder:
    model, _ = make_base(tokenizer)
    model.save_pretrained(tmp_path / "model" / "base")
    tokenizer.save(str(tmp_path / "model" / "base" / "tokenizer.json"))
    return run.load_decoder(tmp_path / "model" / "base", name="tiny")


@pytest.fixture
def out_dir(
    decoder: run.Decoder, data: list[RepositoryData], tokenizer: Tokenizer, tmp_path: Path
) -> Path:
    """A published model whose adapters differ."""
    learner = build_learner(LEARNER, decoder.config, tokenizer, LINES, data, seed=1)
    with torch.no_grad():
        learner.family.head.get_parameter("residual.weight").normal_()
    publish(
        learner,
        LEARNER,
        decoder.config,
        tmp_path / "model",
        base_dir=decoder.path,
        generic=generic_states(learner, data, replay_commits=1),
        metrics={},
    )
    return tmp_path / "model"


def of_split(shards: Sequence[Shard], *splits: str) -> list[Shard]:
    """The shards as if their names had put them there."""
    return [
        Shard(shard.name, shard.path, {**shard.manifest, "cross_repo_split": split})
        for shard, split in zip(shards, splits, strict=True)
    ]


@pytest.fixture
def evaluate(
    recipe: Recipe, shards: list[Shard], decoder: run.Decoder, out_dir: Path
) -> Callable[..., Findings]:
    def call(measuring: Measuring, *splits: str, **options: Any) -> Findings:
        chosen = of_split(shards, *(splits or ("cr_val", "cr_val", "train")))
        return measure(recipe, chosen, NO_LEAKS, decoder, out_dir, measuring, **options)

    return call


@pytest.fixture
def baselines(tokenizer: Tokenizer, loras: list[Any], tmp_path: Path) -> Path:
    """A folder with a trained shared LoRA and nothing else."""
    manifest(tmp_path / "baselines" / SHARED_LORA, SHARED_LORA)
    adapter = tmp_path / "baselines" / SHARED_LORA / "adapter"
    write_lora(adapter, loras[0], make_base(tokenizer)[1])
    return tmp_path / "baselines"


def manifest(folder: Path, row: str) -> None:
    """Say of a folder that it holds a whole row."""
    folder.mkdir(parents=True, exist_ok=True)
    found = Manifest(
        row=row,
        base="tiny",
        base_fingerprint=None,
        steps=3,
        best_step=3,
        watched_nll=None,
        settings={},
    )
    write_manifest(folder, found)


def test_every_row_that_there_is_answers_every_suite(
    evaluate: Callable[..., Findings], out_dir: Path, baselines: Path, shards: list[Shard]
) -> None:
    shares: list[float] = []

    found = evaluate(
        Measuring(baselines=baselines), progress=lambda share, said: shares.append(share)
    )

    assert found.finished and found.path == out_dir / "evaluation.json"
    content = json.loads(found.path.read_text())
    assert content == json.loads(json.dumps(found.content))
    assert set(content["suites"]) == set(SUITES)
    measured = {"pretrained", "rag", "drc", "shared_lora", "evo", "generic", "wrong"}
    for suite in ("cross-repo", "out-of-time"):
        suite_found = content["suites"][suite]
        assert set(suite_found["strata"]["all"]) == measured
        names = [each["name"] for each in suite_found["repositories"]]
        assert names == [shard.name for shard in shards[:2]]
        counted = {row["n_items"] for row in suite_found["strata"]["all"].values()}
        assert len(counted) == 1, "every row answers the same questions"
        assert suite_found["strata"]["all"]["evo"]["minus"].keys() == {"pretrained", "shared_lora"}
    # One repository alone has no wrong adapter.
    assert set(content["suites"][IN_REPO]["strata"]["all"]) == measured - {"wrong"}
    assert content["rows"]["static"] == {
        "title": "Code2LoRA-Static",
        "measured": False,
        "reason": "no fitted model of this kind was given",
    }
    assert "holds no trained baseline" in content["rows"]["full_tuning"]["reason"]
    nll = {
        name: row["columns"]["nll"]["mean"]
        for name, row in content["suites"][CROSS_REPO]["strata"]["all"].items()
    }
    # These worlds define none of the names that they use, so there is nothing to resolve.
    assert nll.pop("drc") == nll["pretrained"]
    assert len(set(nll.values())) == len(nll), "no two other rows are the same"
    assert content["version"] == 2
    assert content["data"]["training_repositories"] == [shards[2].name]
    assert content["model"]["base"] == "tiny"
    assert "all" in content["strata"], "a model card reads the conditioning figures here"
    loaded = load_family(resolve_model(str(out_dir), out_dir.parent))
    assert loaded.config.metrics == found.headline()
    page = found.page.read_text("utf-8")
    assert "Code2LoRA-Evo" in page and shards[0].name in page
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)


def test_tuned_decoders_and_further_models_are_rows_of_their_own(
    evaluate: Callable[..., Findings],
    data: list[RepositoryData],
    decoder: run.Decoder,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    model, _ = make_base(tokenizer)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    for row in (FULL_TUNING, FULL_TUNING_RAG):
        model.save_pretrained(tmp_path / "trained" / row / "model")
        manifest(tmp_path / "trained" / row, row)
    config = replace(LEARNER, family="static")
    learner = build_learner(config, decoder.config, tokenizer, LINES, data, seed=2)
    with torch.no_grad():
        learner.family.head.get_parameter("residual.weight").normal_()
    generic = generic_states(learner, data, replay_commits=1)
    static = tmp_path / "static"
    publish(
        learner, config, decoder.config, static, base_dir=decoder.path, generic=generic, metrics={}
    )

    found = evaluate(
        Measuring(suites=(CROSS_REPO,), baselines=tmp_path / "trained", also=(static,))
    )

    rows = found.content["suites"][CROSS_REPO]["strata"]["all"]
    measured = ("pretrained", "full_tuning", "full_tuning_rag", "static", "evo", "wrong")
    nll = {name: rows[name]["columns"]["nll"]["mean"] for name in measured}
    assert len(set(nll.values())) == len(measured)
    assert "static hypernetwork" in found.content["model"]


def test_a_repositorys_lora_that_knows_the_answers_is_left_out_with_a_note(
    evaluate: Callable[..., Findings], shards: list[Shard], tmp_path: Path
) -> None:
    manifest(tmp_path / "trained" / REPOSITORY_LORA, REPOSITORY_LORA)
    folder = tmp_path / "trained" / REPOSITORY_LORA / folder_name(shards[0].name) / "up-to-8"
    folder.mkdir(parents=True)
    own = OwnManifest(
        repository=shards[0].name,
        n_commits=9,
        told_up_to=8,
        hidden=[],
        n_tasks=1,
        n_sources=1,
        best_step=1,
        base_nll=1.0,
        best_nll=1.0,
        settings={},
    )
    write_manifest(folder, own)

    found = evaluate(
        Measuring(
            suites=(CROSS_REPO,),
            rows=("pretrained", "repository_lora"),
            baselines=tmp_path / "trained",
        )
    )

    assert set(found.content["suites"][CROSS_REPO]["strata"]["all"]) == {"pretrained"}
    assert found.content["rows"]["repository_lora"]["reason"] == "it could answer no repository"
    (note,) = found.content["notes"]
    assert note.startswith(f"cross-repo: the LoRA of {shards[0].name} was trained up to")


def test_a_stopped_run_writes_no_figures_and_goes_on(
    evaluate: Callable[..., Findings], out_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring = Measuring(suites=(CROSS_REPO,), rows=("pretrained", "evo"))
    looks = iter([False] + [True] * 9)

    first = evaluate(measuring, stop=lambda: next(looks))

    assert not first.finished and not first.path.exists()
    kept = {path.relative_to(out_dir).parts[2] for path in out_dir.glob("evaluation/*/*/*.json")}
    assert kept == {"pretrained"}
    asked: list[str] = []
    real = answers.Answering._answer
    monkeypatch.setattr(
        answers.Answering,
        "_answer",
        lambda self, row, c: asked.append(row.name) or real(self, row, c),
    )
    second = evaluate(measuring)
    assert second.finished and asked == ["evo"]
    asked.clear()
    assert evaluate(measuring).content == second.content and not asked


def test_the_test_repositories_are_asked_only_when_named(
    evaluate: Callable[..., Findings], out_dir: Path, shards: list[Shard]
) -> None:
    splits = ("cr_test", "cr_test", "train")
    rows = ("pretrained", "evo")
    with pytest.raises(UserError, match="0 validation repositories, expected at least 2"):
        evaluate(Measuring(suites=(CROSS_REPO,), rows=rows), *splits)

    found = evaluate(Measuring(suites=(CROSS_REPO,), rows=rows, test=True), *splits)

    assert found.path == out_dir / "evaluation-test.json"
    assert found.page == out_dir / "report-test" / "index.html"
    assert found.content["settings"]["bucket"] == 9
    assert not (out_dir / "evaluation.json").exists()
    assert load_family(resolve_model(str(out_dir), out_dir.parent)).config.metrics == {}


def test_a_row_that_was_not_asked_for_is_not_measured(evaluate: Callable[..., Findings]) -> None:
    found = evaluate(Measuring(suites=(IN_REPO,), rows=("pretrained",)))

    assert set(found.content["suites"][IN_REPO]["strata"]["all"]) == {"pretrained"}
    assert found.content["rows"]["evo"]["reason"] == "it was not asked for"
    assert found.conditioning is None and found.headline() == {}
    assert set(found.content["rows"]) == set(ROWS)


def test_the_audits_curves_are_drawn(evaluate: Callable[..., Findings], out_dir: Path) -> None:
    curve = {"lambdas": [0, 1], "own": [2.0, 1.0], "wrong": [2.0, 3.0]}
    (out_dir / "audit.json").write_text(json.dumps({"verdict": "passed", "lambda_curve": curve}))

    found = evaluate(Measuring(suites=(IN_REPO,), rows=("pretrained",)))

    assert (found.page.parent / "lambda.png").is_file()
    assert "Audit: passed" in found.page.read_text("utf-8")
    (out_dir / "audit.json").write_text("[]")
    with pytest.raises(UserError, match="holds no audit"):
        evaluate(Measuring(suites=(IN_REPO,), rows=("pretrained",)))
