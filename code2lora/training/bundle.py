"""Put the trained parts together as one model directory, with a card that states its figures.

Reads   a base decoder, the corpus manifest beside it, the output of `fit` and `evaluate`.
Writes  <out>/{base,encoder,hypernetwork}/ and <out>/MODEL_CARD.md, the card last; in place of the
        base, where a model beside it has the same one, a line that names that model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from code2lora.errors import UserError
from code2lora.hypernetwork.checkpoint import load_family
from code2lora.hypernetwork.config import EXACT_MATCH, AuditRecord
from code2lora.hypernetwork.identity import read_config, write_config
from code2lora.hypernetwork.models import BASE_OF, ModelPaths, resolve_model
from code2lora.training.audit.stage import TEST_AUDIT
from code2lora.training.data.shards import read_shards
from code2lora.training.evaluation.rows import EVO, MEMORY, STATIC
from code2lora.training.evaluation.stage import TEST_EVALUATION
from code2lora.training.evaluation.suites import CROSS_REPO

_PARTS = ("base", "encoder", "hypernetwork")
_ENCODERS = {
    "lines": "sentence-transformers `StaticEmbedding`",
    "paper": "a sentence-transformers transformer",
    "gradients": "the base's own gradients through fixed keys",
}
_FAMILIES = {
    "gru": "commit GRU",
    "static": "the newest snapshot alone",
    "memory": "memory of gradients",
}

_TEST_WAS = {
    False: "This model was not asked about bucket 9.",
    True: "Bucket 9 was asked once, when everything was chosen.",
}


@dataclass(frozen=True, kw_only=True)
class BaseFigures:
    """How the base decoder was trained, and how well it predicts held-out source."""

    n_tokens: int
    n_parameters: int
    validation_loss: float
    """Nats per token."""
    bits_per_byte: float
    lines_matched: float
    """Share of held-out lines that greedy decoding writes exactly."""


def bundle(
    out_dir: Path,
    *,
    base: Path,
    fitted: Path,
    mined: Path,
    base_of: str | None = None,
) -> ModelPaths:
    """Copy the parts into `out_dir`, write the card, and load the result once to be sure.

    base: the folder that `train base` filled: export/, figures.json, manifest.json
    fitted: the folder with encoder/, hypernetwork/ and evaluation.json
    mined: what `train mine` filled; its repositories outside the held-out buckets are named
    base_of: the name of a model beside `out_dir` with the same base, which is then not copied

    Raises UserError when a part is missing or does not fit the others.
    """
    sources = {
        "base": base / "export",
        "encoder": fitted / "encoder",
        "hypernetwork": fitted / "hypernetwork",
    }
    evaluation = _read(fitted / "evaluation.json")
    corpus = _read(base / "manifest.json")
    figures = BaseFigures(**_read(base / "figures.json"))
    training_repositories = [each.name for each in read_shards(mined) if each.split == "train"]
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / BASE_OF).unlink(missing_ok=True)
    if base_of is not None:
        del sources["base"]
        (out_dir / BASE_OF).write_text(base_of + "\n", encoding="utf-8")
    for part in _PARTS:
        target = out_dir / part
        if target.exists():
            shutil.rmtree(target)
        if part in sources:
            shutil.copytree(sources[part], target)
        for file in target.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
    paths = resolve_model(str(out_dir.absolute()), out_dir)
    load_family(paths)
    folders = (paths.base, paths.encoder, paths.hypernetwork)
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    size_bytes = sum(file.stat().st_size for file in files)
    name = out_dir.name
    test = _read(fitted / TEST_AUDIT) if (fitted / TEST_AUDIT).exists() else None
    final = fitted / TEST_EVALUATION
    asked = (_read(final), 9) if final.exists() else (evaluation, 8)
    written = assertions_section(*asked)
    note_exact_match(paths.hypernetwork, asked[0])
    card = model_card(
        name, paths, size_bytes, corpus, figures, evaluation, test, written, training_repositories
    )
    paths.card.write_text(card, encoding="utf-8")
    return paths


def model_card(
    name: str,
    paths: ModelPaths,
    size_bytes: int,
    corpus: Mapping[str, Any],
    figures: BaseFigures,
    evaluation: Mapping[str, Any],
    test: Mapping[str, Any] | None,
    written: str,
    training_repositories: list[str],
) -> str:
    """Return the card: what it is, data, licences, figures with their controls, limits.

    test: what the audit of bucket 9 found, if there was one
    written: what rows wrote of assertions, as text
    """
    config = read_config(paths.hypernetwork)
    origins = sorted(corpus["origins"], key=lambda origin: -origin["size_bytes"])
    every = evaluation["strata"]["all"]
    owner = paths.base.parent.name
    shared = "" if owner == name else f"; the files are those of `{owner}`"
    return f"""# {name}

A small decoder, encoder and hypernetwork that run offline on any CPU. {size_bytes / 1e6:.0f} MB in
all. MIT licence, like the package.

| part | what |
|---|---|
| base | Qwen2 architecture, {figures.n_parameters / 1e6:.1f} M parameters, {config.base.n_layers} \
layers, byte-level BPE with Qwen2's pre-tokenizer, control tokens named as in \
Qwen2.5-Coder{shared} |
| encoder | {_ENCODERS[config.encoder.recipe.diff]}, width {config.encoder.width:,}, recipe \
`{config.encoder.recipe.diff}` |
| hypernetwork | {_FAMILIES[config.family]}, `{config.head.kind}` head, rank {config.head.rank}, \
alpha {config.head.alpha:g} on all seven projections |

## Data

**Base**: {corpus["size_bytes"] / 1e6:.0f} MB of permissively licensed Python (the standard library
and {len(origins) - 1} installed distributions), {figures.n_tokens / 1e6:.1f} M tokens seen, half of
the documents with a fill-in-the-middle hole. Distributions whose source repository is in bucket 8
or 9 (sha256 of owner/name modulo 10) are left out; `python/cpython` itself is in bucket 8, so it
takes no part in any evaluation.

**Encoder and hypernetwork**: histories of {len(training_repositories)} public repositories of
buckets 0 to 7. Bucket 8 chose the step that was kept. {_TEST_WAS[test is not None]}

## Figures

Base on held-out files of its corpus: {figures.validation_loss:.3f} nats per token,
{figures.bits_per_byte:.3f} bits per byte; greedy decoding writes {figures.lines_matched:.1%} of
the lines exactly, each after the true ones above it.

Hypernetwork on {every["n_repositories"]} repositories of bucket 8 that training never saw,
{every["n_items"]} fixed rows, in nats per token; means over repositories with 95 % bootstrap
intervals over repositories. *absent* are rows that need an identifier which their prefix does not
show.

{_strata_table(evaluation["strata"])}

Each repository's own adapter was ranked among {evaluation["n_adapters"]}: it beats a wrong one in
{evaluation["win_rate"]:.0%} of pairs (chance 50 %), is the best in {evaluation["best_share"]:.0%}
(chance {1 / evaluation["n_adapters"]:.0%}), mean rank {evaluation["mean_rank"]:.2f}
(chance {(evaluation["n_adapters"] + 1) / 2:.1f}). *stale* is the own adapter from before the last
replayed commits.

{_verdict(every)}

The kept step was chosen on bucket 8 as well, so these figures flatter a little.
{written}
## Audit

{_audit_table(config.audit, test)}

## What it is not

The decoder is small and has seen little: its completions are short and often wrong. It is there to
run the whole loop anywhere and to measure conditioning honestly, not to replace a real code model.

## Recipe

`code2lora train all --recipe {name}`, or its stages one by one.

{_sources(training_repositories, origins)}"""


def _sources(training_repositories: list[str], origins: list[dict[str, Any]]) -> str:
    """Name all that was learned from, with its licences."""
    licences = sorted({str(origin["licence"]) for origin in origins})
    return f"""## Training repositories

{_wrapped(training_repositories)}

## Distributions in the base corpus

{_wrapped([f"{origin['name']} {origin['version']}" for origin in origins])}

Their licences, as their metadata states them: {"; ".join(licences)}.
"""


def _verdict(every: Mapping[str, Any]) -> str:
    """Say in words what the intervals say, so that nobody has to read them kindly."""
    beats = {
        other: every[f"own_minus_{key}"]["high"] < 0
        for key, other in (
            ("base", "the base model alone"),
            ("generic", "the generic adapter"),
            ("wrong", "other repositories' adapters"),
            ("stale", "its stale self"),
        )
    }
    return f"**Verdict**: {_won_and_lost(beats)}."


def _won_and_lost(beats: Mapping[str, bool]) -> str:
    won = ", ".join(other for other, better in beats.items() if better) or "nothing"
    lost = ", ".join(other for other, better in beats.items() if not better) or "nothing"
    return f"the own adapter beats {won}; it does not beat {lost}"


def note_exact_match(hypernetwork: Path, evaluation: Mapping[str, Any]) -> None:
    """Put what the own adapter gains in exact match into the checkpoint, for `status` to say."""
    own = _own_row(_assertion_rows(evaluation))
    if own is None:
        return
    config = read_config(hypernetwork)
    gains = {other: found["exact_match"] for other, found in own["minus"].items()}
    write_config(hypernetwork, replace(config, metrics={**config.metrics, EXACT_MATCH: gains}))


def _assertion_rows(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    suite = evaluation.get("suites", {}).get(CROSS_REPO, {})
    rows: Mapping[str, Any] = suite.get("strata", {}).get("assertion", {})
    return rows


def _own_row(rows: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((rows[name] for name in (MEMORY, EVO, STATIC) if name in rows), None)


def assertions_section(evaluation: Mapping[str, Any], bucket: int) -> str:
    """Return what was written of assertions, row by row; nothing where none were asked."""
    rows = _assertion_rows(evaluation)
    if not rows:
        return ""
    lines = []
    for name, row in rows.items():
        nll, exact = (row["columns"][column] for column in ("nll", "exact_match"))
        share = f"{exact['mean']:.1%} ({exact['low']:.1%} to {exact['high']:.1%})"
        lines.append(f"| {evaluation['rows'][name]['title']} | {nll['mean']:.4f} | {share} |")
    asked = next(iter(rows.values()))
    own = _own_row(rows)
    beats = {
        evaluation["rows"][other]["title"]: found["exact_match"]["low"] > 0
        for other, found in (own["minus"].items() if own else ())
    }
    verdict = f"\n**Verdict**: in exact match {_won_and_lost(beats)}.\n" if beats else ""
    return f"""
### Assertions

{asked["n_items"]} assertions of {asked["n_repositories"]} repositories of bucket {bucket}, written
greedily after what stands above them; nats per token, and the share that is written exactly, means
over repositories with 95 % intervals.

| row | nats per token | exact match |
|---|---|---|
{chr(10).join(lines)}
{verdict}"""


def _audit_table(found: AuditRecord | None, test: Mapping[str, Any] | None) -> str:
    """Return every question of the audit with its answer on bucket 8 and, if asked, on bucket 9."""
    if found is None:
        return "None was made."
    asked: dict[str, dict[str, Any]] = {
        "bucket 8": {name: asdict(each) for name, each in found.tests.items()}
    }
    verdicts: list[str] = [found.verdict]
    of = f"{found.n_repositories} repositories of bucket 8"
    if test is not None:
        asked["bucket 9"] = test["tests"]
        verdicts.append(f"on bucket 9 {test['verdict']}")
        of += f" and {test['n_repositories']} of bucket 9"
    rows = [
        "".join(["| test |", *(f" {bucket} | holds |" for bucket in asked)]),
        "|---" * (1 + 2 * len(asked)) + "|",
    ]
    for name in found.tests:
        cells = [cell for tests in asked.values() for cell in _answer(tests.get(name))]
        rows.append(f"| {' | '.join([name.replace('_', ' '), *cells])} |")
    return f"""Verdict: **{"; ".join(verdicts)}**. {of}; nats a token,
own minus other, with 95 % intervals over repositories; a test holds where the whole interval is
below zero. What each asks is in docs/training.md.

{chr(10).join(rows)}"""


def _answer(asked: Mapping[str, Any] | None) -> tuple[str, str]:
    if asked is None or asked["passed"] is None:
        return "not asked", ""
    return _interval(asked), "yes" if asked["passed"] else "**no**"


def _strata_table(strata: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        "| rows | n | base | generic | wrong | own | own - base | own - generic | own - wrong "
        "| own - stale |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in strata.items():
        values = [f"{figures[key]:.4f}" for key in ("base", "generic", "wrong", "own")]
        gaps = [
            _interval(figures[f"own_minus_{other}"])
            for other in ("base", "generic", "wrong", "stale")
        ]
        rows.append(f"| {' | '.join([name, str(figures['n_items']), *values, *gaps])} |")
    return "\n".join(rows)


def _interval(figures: Mapping[str, float]) -> str:
    return f"{figures['mean']:+.4f} ({figures['low']:+.4f} to {figures['high']:+.4f})"


def _wrapped(words: list[str]) -> str:
    return ", ".join(sorted(words, key=str.lower)) + "."


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}", hint="run the earlier stages") from error
    return values
