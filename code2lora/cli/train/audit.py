"""`code2lora train audit`: does the adapter know its repository?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from code2lora.cli import audits, edge, render
from code2lora.cli.options import examples, json_option
from code2lora.cli.progress import progress, stop_on_interrupt
from code2lora.cli.train.options import (
    EXISTING,
    device_option,
    fitted_options,
    load_recipe_and_decoder,
    test_bucket_option,
)

if TYPE_CHECKING:
    from code2lora.training.audit.report import Audit
    from code2lora.training.audit.stage import AuditResult

FAILED, INCOMPLETE = 4, 5
"""Exit statuses of their own, so that a script can tell a verdict from an accident."""

_STATUS = {"passed": edge.OK, "failed": FAILED, "incomplete": INCOMPLETE}


@click.command(
    "audit",
    epilog=examples(
        ("code2lora train audit --mined mined --base base/export --out my-model", "ask it"),
        ("code2lora train audit ... --shared baselines", "and compare with a LoRA shared by all"),
        ("code2lora train audit ... --json | jq .tests", "for programs"),
    ),
)
@fitted_options
@click.option(
    "--shared", type=EXISTING, help="The folder of trained baselines, for their shared LoRA."
)
@click.option(
    "--items",
    type=click.IntRange(min=2),
    help="Rows of each repository, in place of the recipe's; as many for freshness.",
)
@device_option
@test_bucket_option
@json_option
def audit(
    mined: Path,
    base_dir: Path,
    base_name: str | None,
    out_dir: Path,
    recipe_name: str,
    shared: Path | None,
    items: int | None,
    device: str,
    test_bucket: bool,
    as_json: bool,
) -> None:
    """Ask whether a model's adapters know their repositories.

    On repositories that it was not trained on, each one's own adapter has to beat the base model,
    the generic adapter, the mean of the training repositories' adapters and every other
    repository's, on the same rows; newer adapters have to beat older ones on what came since, and
    the order of the commits has to matter. Writes OUT/audit.json, and the verdict into the
    checkpoint, where `models` and `status` show it.

    Exits with 0 when the model passed, with 4 when it failed, and with 5 when a comparison that is
    needed could not be made, such as without training repositories in MINED.
    """
    from code2lora.serving.model import resolve_device
    from code2lora.training.audit.scores import Stopped
    from code2lora.training.audit.stage import audit_model

    where = resolve_device(device)
    recipe, decoder = load_recipe_and_decoder(recipe_name, base_dir, base_name, where)
    if items is not None:
        chosen = replace(recipe.audit, items=items, fresh_items=items)
        recipe = replace(recipe, audit=chosen)
    with stop_on_interrupt() as stop, progress("auditing") as tell:
        try:
            found = audit_model(
                recipe,
                mined,
                decoder,
                out_dir,
                shared=shared,
                test=test_bucket,
                progress=lambda done, total: tell(done / total, f"row {done:,} of {total:,}"),
                stop=stop,
            )
        except Stopped as error:
            render.remark("stopped; nothing was written")
            raise click.exceptions.Exit(edge.INTERRUPTED) from error
    if as_json:
        render.emit_json({**found.content, "path": found.path})
    else:
        render.emit(_text(found))
    raise click.exceptions.Exit(_STATUS[found.audit.verdict])


def _text(found: AuditResult) -> str:
    audit = found.audit
    absent = audit.strata.get("absent", {})
    rows = [
        [
            name,
            audits.result(test),
            audits.mean(test),
            audits.interval(test),
            audits.mean(absent[name]) if name in absent else "",
        ]
        for name, test in audit.tests.items()
    ]
    headers = ["TEST", "RESULT", "MEAN", "95 % INTERVAL", "ABSENT"]
    table = render.table(headers, rows, right=["MEAN", "95 % INTERVAL", "ABSENT"])
    return f"{table}\n\n{render.fields(_fields(audit, found.path))}"


def _fields(audit: Audit, path: Path) -> list[tuple[str, str]]:
    ranking, geometry = audit.ranking, audit.geometry
    where = render.count(audit.n_repositories, "repository", "repositories")
    return [
        ("verdict", audits.in_a_line(audit.record(""))),
        ("asked", f"{render.count(audit.n_items, 'row')} of {where}"),
        (
            "rank",
            f"{ranking.mean_rank:.2f} of {ranking.n_adapters}, chance {ranking.chance_rank:g}; "
            f"better than {ranking.win_rate:.0%} of the others",
        ),
        (
            "lambda",
            "\n".join(
                f"{name:5}  {'  '.join(f'{value:8{kind}}' for value in values)}".rstrip()
                for name, kind, values in (
                    ("", "g", audit.lambdas),
                    ("own", ".4f", audit.along_own),
                    ("wrong", ".4f", audit.along_wrong),
                )
            ),
        ),
        (
            "geometry",
            f"cosine {geometry.mean_cosine:.4f}, residual {geometry.mean_residual:.4f}, "
            f"participation {geometry.participation_ratio:.2f}",
        ),
        ("written", str(path)),
    ]
