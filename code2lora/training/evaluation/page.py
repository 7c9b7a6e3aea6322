"""Turn the findings of an evaluation, and of an audit beside them, into one page and its images.

Writes  <folder>/index.html, with everything inside, and <folder>/*.png, the same images

Everything that is written into the page is escaped: names of repositories are not ours.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from code2lora.training.evaluation import plots
from code2lora.training.evaluation.compare import COLUMNS, NLL
from code2lora.training.evaluation.rows import TITLES

_HEADS = {
    "nll": "NLL",
    "exact_match": "EM",
    "edit_similarity": "EditSim",
    "codebleu": "CodeBLEU",
    "paper_exact_match": "EM (paper)",
    "paper_edit_similarity": "EditSim (paper)",
    "paper_codebleu": "CodeBLEU (paper)",
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
td, th { padding: .25em .7em; text-align: right; border-bottom: 1px solid #ddd;
         white-space: nowrap }
td:first-child, th:first-child { text-align: left }
td small { color: #666 } img { max-width: 100% } code, pre { font-size: 13px }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto }
"""
_EXPLANATION = (
    "Every figure is a mean over repositories, each counting once; the interval is 95 % of a "
    "bootstrap over repositories. NLL is in nats per token of what is asked. EM, EditSim and "
    "CodeBLEU compare written text: all rows write greedily, under the same limits, and none may "
    "write a control token. The columns marked (paper) follow the published protocol, which cuts a "
    "prediction by what its reference looks like; they are means over questions, as published."
)


def write_report(
    folder: Path, findings: Mapping[str, Any], audit: Mapping[str, Any] | None
) -> Path:
    """Write the page and its images and return the page's path.

    findings: `evaluation.json` as JSON values   audit: `audit.json`, where there is one
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = _images(findings, audit)
    for name, data in images.items():
        _write(folder / f"{name}.png", data)
    page = folder / "index.html"
    _write(page, render(findings, images, audit).encode("utf-8", "replace"))
    return page


def render(
    findings: Mapping[str, Any],
    images: Mapping[str, bytes],
    audit: Mapping[str, Any] | None = None,
) -> str:
    """Return the page: no scripts, no links to other files, images inside."""
    parts = [
        "<h1>Evaluation</h1>",
        _table(["", ""], [[name, str(value)] for name, value in findings["model"].items()]),
        f"<p>{escape(_EXPLANATION)}</p>",
        _missing(findings["rows"]),
    ]
    for suite, found in findings["suites"].items():
        parts.append(_suite(suite, found, images))
    if audit is not None:
        parts.append(_audit(audit, images))
    parts += [
        "<h2>Settings</h2>",
        f"<pre>{escape(json.dumps(findings['settings'], indent=2))}</pre>",
        "<h2>Data</h2>",
        _data(findings),
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Evaluation</title><style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _images(findings: Mapping[str, Any], audit: Mapping[str, Any] | None) -> dict[str, bytes]:
    images = {}
    for suite, found in findings["suites"].items():
        images[f"rows-{suite}"] = plots.bars(found["strata"]["all"], TITLES)
        lines = {name: bins for name, bins in found["decay"].items() if bins}
        if lines:
            images[f"decay-{suite}"] = plots.decay(lines, TITLES)
    if audit is not None and audit.get("lambda_curve", {}).get("lambdas"):
        images["lambda"] = plots.lambda_curve(audit["lambda_curve"])
    if audit is not None and audit.get("geometry", {}).get("names"):
        images["geometry"] = plots.geometry(audit["geometry"])
    return images


def _suite(suite: str, found: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    parts = [f"<h2>{escape(suite)}</h2>"]
    for stratum, figures in found["strata"].items():
        some = next(iter(figures.values()))
        counted = f"{some['n_items']:,} questions, {some['n_repositories']} repositories"
        parts.append(f"<h3>{escape(stratum)} <small>({counted})</small></h3>")
        parts.append(_figures(figures))
        for reference in ("pretrained", "shared_lora"):
            parts.append(_differences(figures, reference))
        if stratum == "all":
            parts += [_image(images, f"{kind}-{suite}") for kind in ("rows", "decay")]
    return "\n".join(part for part in parts if part)


def _figures(figures: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, row in figures.items():
        cells = []
        for column in COLUMNS:
            if column.startswith("paper_"):
                cells.append(f"{row['over_items'][column]:.1%}")
            else:
                cells.append(_interval(row["columns"][column], column))
        rows.append([TITLES[name], *cells])
    return _table(["row", *(_HEADS[column] for column in COLUMNS)], rows)


def _differences(figures: Mapping[str, Mapping[str, Any]], reference: str) -> str:
    columns = [column for column in COLUMNS if not column.startswith("paper_")]
    rows = []
    for name, row in figures.items():
        minus = row["minus"].get(reference)
        if minus:
            cells = [_interval(minus[column], column, sign=True) for column in columns]
            rows.append([TITLES[name], *cells])
    if not rows:
        return ""
    return _table([f"minus {TITLES[reference]}", *(_HEADS[column] for column in columns)], rows)


def _interval(interval: Mapping[str, float], column: str, *, sign: bool = False) -> str:
    plus = "+" if sign else ""
    form = f"{plus}.4f" if column == NLL else f"{plus}.1%"
    mean, low, high = (format(interval[key], form) for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _missing(rows: Mapping[str, Mapping[str, Any]]) -> str:
    left_out = [
        f"<li>{escape(TITLES[name])}: {escape(row['reason'])}</li>"
        for name, row in rows.items()
        if not row["measured"]
    ]
    return f"<h2>Rows that are left out</h2><ul>{''.join(left_out)}</ul>" if left_out else ""


def _audit(audit: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    heading = f"<h2>Audit: {escape(str(audit.get('verdict', 'no verdict')))}</h2>"
    return heading + _image(images, "lambda") + _image(images, "geometry")


def _data(findings: Mapping[str, Any]) -> str:
    rows = [
        [suite, each["name"], f"{each['n_items']:,}", str(each["told_up_to"]), str(each["anchor"])]
        for suite, found in findings["suites"].items()
        for each in found["repositories"]
    ]
    training = findings["data"]["training_repositories"]
    leaks = findings["data"]["leakage"]
    leaked = leaks["n_in_repository"] + leaks["n_across"]
    return "\n".join(
        [
            _table(["suite", "repository", "questions", "told up to", "told from"], rows),
            f"<p>{leaked:,} of {leaks['n_targets']:,} targets stand in what may be trained on as "
            "well; they were never asked.</p>",
            f"<p>{len(training)} training repositories: {escape(', '.join(training))}</p>",
        ]
    )


def _image(images: Mapping[str, bytes], name: str) -> str:
    if name not in images:
        return ""
    data = base64.b64encode(images[name]).decode("ascii")
    return f'<p><img alt="{escape(name)}" src="data:image/png;base64,{data}"></p>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; every cell is text, escaped here."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "\n".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_bytes(data)
    os.replace(temporary, path)
