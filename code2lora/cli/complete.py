"""`code2lora complete`: ask the local model, with the repository's adapter or without."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from code2lora.cli import render
from code2lora.cli.options import Folder, examples, json_option
from code2lora.serving.completion import DEFAULT_MAX_TOKENS, Completion, CompletionRequest, Use

if TYPE_CHECKING:
    from code2lora.cli.place import Place
    from code2lora.serving.client import WorkerClient


_PIPE_WIDTH = 160


@dataclass(frozen=True, kw_only=True)
class Question:
    """One completion to ask for."""

    request: CompletionRequest
    repository: str
    """`<repository id>:<worktree id>`."""
    commit: str | None
    """Full hash; None takes the live adapter."""


@click.command(
    "complete",
    epilog=examples(
        ("code2lora complete app.py:12", "fill in after line 12, before line 13"),
        ("code2lora complete app.py:12 --compare", "without and with the adapter, side by side"),
        ('code2lora complete -p "def main("', "go on with a text"),
        ("git show HEAD:app.py | code2lora complete -", "go on with standard input"),
        ("code2lora complete app.py:12 --commit v1.0", "with the knowledge of that time"),
    ),
)
@click.argument("target", required=False, metavar="[FILE:LINE[:COLUMN] | -]")
@click.option("-p", "--prompt", metavar="TEXT", help="The text before the cursor.")
@click.option("--suffix", metavar="TEXT", help="The text after the cursor.")
@click.option(
    "-n",
    "--max-tokens",
    default=DEFAULT_MAX_TOKENS,
    show_default=True,
    type=click.IntRange(min=1),
    help="Stop after this many tokens.",
)
@click.option(
    "-t",
    "--temperature",
    default=0.0,
    show_default=True,
    type=click.FloatRange(min=0, max=100),
    help="0 takes the likeliest token; above, samples.",
)
@click.option("--seed", type=int, help="Make sampling repeatable.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable.")
@click.option("--base", is_flag=True, help="Answer without an adapter.")
@click.option("--generic", is_flag=True, help="Answer with the mean repository's.")
@click.option("--commit", "revision", metavar="REV", help="Answer with this commit's adapter.")
@click.option("--compare", is_flag=True, help="Show base and adapter side by side.")
@click.option(
    "--repo",
    "path",
    type=Folder(),
    help="A place in the repository.  [default: the file's, or here]",
)
@click.option(
    "--stream/--no-stream",
    default=None,
    help="Print pieces as they come.  [default: on a terminal]",
)
@json_option
def complete(
    target: str | None,
    prompt: str | None,
    suffix: str | None,
    max_tokens: int,
    temperature: float,
    seed: int | None,
    stop: tuple[str, ...],
    base: bool,
    generic: bool,
    revision: str | None,
    compare: bool,
    path: Path | None,
    stream: bool | None,
    as_json: bool,
) -> None:
    """Complete code in a file, after a prompt or after stdin.

    The adapter is the live one of the repository that the file is in; starts the daemon when it
    does not run. The completion goes to stdout, what it took to stderr.
    """
    from code2lora.cli.cursor import read_cursor
    from code2lora.cli.place import open_place, require_commit
    from code2lora.cli.waiting import ensure_daemon
    from code2lora.serving.client import WorkerClient

    if base and generic:
        raise click.UsageError("--base and --generic exclude each other")
    use: Use | None = "base" if base else "generic" if generic else None
    _check_combination(use, revision, compare, stream, as_json)
    cursor = read_cursor(target, prompt, suffix)
    request = CompletionRequest(
        prompt=cursor.prompt,
        suffix=cursor.suffix,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        stop=stop,
    )
    beside = cursor.file.absolute().parent if cursor.file else Path()
    with open_place(path or beside) as place:
        if use is None and revision is None:
            require_commit(place)
        question = _question(place, request, revision)
        ensure_daemon(place.settings)
        socket = place.settings.socket
    with WorkerClient(socket) as client:
        if compare:
            _compare(client, question, as_json)
        elif as_json:
            render.emit_json(_as_json(_ask(client, question, use or "own")))
        elif stream if stream is not None else sys.stdout.isatty():
            _stream(client, question, use or "own")
        else:
            completion = _ask(client, question, use or "own")
            _write(completion.text)
            render.remark(_summary(completion))


def _check_combination(
    use: Use | None, revision: str | None, compare: bool, stream: bool | None, as_json: bool
) -> None:
    if compare and use is not None:
        raise click.UsageError(f"--compare and --{use} exclude each other")
    if revision is not None and use is not None:
        raise click.UsageError(f"--commit and --{use} exclude each other")
    if stream and (as_json or compare):
        raise click.UsageError(
            f"--stream and {'--json' if as_json else '--compare'} exclude each other"
        )


def _question(place: Place, request: CompletionRequest, revision: str | None) -> Question:
    commit = None if revision is None else place.resolve(revision)
    repository = f"{place.repository.id}:{place.worktree.id}"
    return Question(request=request, repository=repository, commit=commit)


def _ask(client: WorkerClient, question: Question, use: Use) -> Completion:
    return client.complete(
        question.request, repository=question.repository, commit=question.commit, use=use
    )


def _stream(client: WorkerClient, question: Question, use: Use) -> None:
    pieces = client.complete_stream(
        question.request, repository=question.repository, commit=question.commit, use=use
    )
    for piece in pieces:
        _write(piece, end="")
    click.echo()
    if pieces.completion is not None:
        render.remark(_summary(pieces.completion))


def _write(text: str, *, end: str = "\n") -> None:
    """Print what a model said: as it is into a pipe, made harmless on a terminal."""
    shown = render.clean(text) if sys.stdout.isatty() else text
    click.echo(shown + end, nl=False, color=True)


def _compare(client: WorkerClient, question: Question, as_json: bool) -> None:
    base = client.complete(question.request, use="base")
    own = _ask(client, question, "own")
    if as_json:
        render.emit_json({"base": _as_json(base), "own": _as_json(own)})
        return
    render.emit(_side_by_side([("base", base), ("adapter", own)], question.request.prompt))


def _side_by_side(columns: Sequence[tuple[str, Completion]], prompt: str) -> str:
    """Return the completions in columns, each after the line that it goes on with."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    last_line = render.clean(prompt.rpartition("\n")[2])
    grid = Table(box=box.SIMPLE, pad_edge=False, header_style="bold", show_footer=True)
    cells = []
    for name, completion in columns:
        grid.add_column(name, footer=Text(_summary(completion), style="dim"), ratio=1)
        text = render.clean(completion.text)
        cells.append(Text.assemble((last_line, "dim"), text, overflow="fold"))
    grid.add_row(*cells)
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)
    with console.capture() as capture:
        console.print(grid)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    return "\n".join(lines).strip("\n")


def _summary(completion: Completion) -> str:
    adapter = completion.adapter
    who = f"adapter {adapter.generation}" if adapter else "base model"
    tokens = render.count(completion.n_tokens, "token")
    return f"{who}, {tokens}, {render.span(completion.total_ms / 1e3)}"


def _as_json(completion: Completion) -> dict[str, object]:
    return asdict(completion)
