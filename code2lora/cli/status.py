"""`code2lora status`: what is known of a repository, and whether it is current."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from code2lora.cli import edge, render
from code2lora.cli.options import examples, json_option, path_argument
from code2lora.errors import UserError

if TYPE_CHECKING:
    from code2lora.cli.overview import Overview
    from code2lora.cli.place import Place
    from code2lora.settings import Settings
    from code2lora.state_store import Store

_WATCH_INTERVAL_S = 1.0


@click.command(
    "status",
    epilog=examples(
        ("code2lora status", "the repository around the current directory"),
        ("code2lora status --all", "one line for every registered worktree"),
        ("code2lora status --watch", "stay, and show what changes"),
        ("code2lora status --json | jq .adapter", "for programs"),
    ),
)
@path_argument
@click.option("--all", "show_all", is_flag=True, help="Show every registered repository.")
@json_option
@click.option("--watch", is_flag=True, help="Stay and refresh every second, until ^C.")
def status(path: Path, show_all: bool, as_json: bool, watch: bool) -> None:
    """Show HEAD, its adapter, the queue and the last failure.

    Reads the database and git, so it works when the daemon does not run. Exits with 1 when the
    repository is not registered.
    """
    if watch:
        _watch(path, show_all, as_json)
        return
    if as_json:
        render.emit_json(_gather_all() if show_all else _gather(path))
        return
    render.emit(_text(path, show_all))


def _watch(path: Path, show_all: bool, as_json: bool) -> None:
    import sys

    if as_json:
        raise click.UsageError("--watch and --json exclude each other")
    if not sys.stdout.isatty():
        raise click.UsageError("--watch needs a terminal")
    from rich.live import Live
    from rich.text import Text

    with edge.ends_by_interrupt(), Live(auto_refresh=False) as live:
        while True:
            live.update(Text.from_ansi(_text(path, show_all)), refresh=True)
            time.sleep(_WATCH_INTERVAL_S)


def _text(path: Path, show_all: bool) -> str:
    if show_all:
        return _render_all(_gather_all())
    return _render(_gather(path))


def _gather(path: Path) -> Overview:
    from code2lora.cli.overview import overview
    from code2lora.cli.place import open_place

    with open_place(path) as place:
        return overview(place)


def _gather_all() -> list[Overview | dict[str, str]]:
    """Return an overview of every worktree; of one that cannot be read, its path and the error."""
    from code2lora.cli.overview import overview
    from code2lora.cli.place import open_store
    from code2lora.settings import load_settings

    settings = load_settings()
    found: list[Overview | dict[str, str]] = []
    with open_store(settings) as store:
        for path, place in _places(settings, store):
            if isinstance(place, UserError):
                found.append({"path": path, "error": place.message})
            else:
                found.append(overview(place))
    return found


def _places(settings: Settings, store: Store) -> Iterator[tuple[str, Place | UserError]]:
    from code2lora.cli.place import place_of
    from code2lora.history import open_history

    for worktree in store.worktrees():
        path = worktree.path or worktree.git_dir
        try:
            with closing(open_history(Path(path))) as history:
                yield path, place_of(settings, store, history)
        except UserError as error:
            yield path, error


def _render(view: Overview) -> str:
    rows = [
        ("head", _head(view)),
        ("adapter", _adapter(view)),
        ("state", _state(view)),
        ("queue", _queue(view)),
        ("drift", _drift(view)),
        ("gain", _gain(view)),
        ("serves", _serves(view)),
        ("model", _model(view)),
        ("audit", _audit(view)),
        ("hooks", _hooks(view)),
        ("daemon", _daemon(view)),
        ("success", _success(view)),
        ("failure", _failure(view)),
    ]
    title = render.styled(f"{render.clean(view.name)}  {render.clean(view.path)}", "bold")
    shown = render.fields((label, value) for label, value in rows if value is not None)
    return f"{title}\n{shown}"


def _head(view: Overview) -> str:
    branch = render.clean(view.branch) if view.branch else "detached"
    if view.head is None:
        return f"{branch}, no commit yet: the first one makes the adapter"
    head = view.head
    return f"{branch} {render.short(head.commit)}  {render.line(head.summary)}"


def _adapter(view: Overview) -> str:
    adapter = view.adapter
    if adapter is None:
        return "none yet"
    what = (
        f"generation {adapter.generation}, {render.size(adapter.n_bytes)}, "
        f"{render.age(adapter.published_at)}"
    )
    if not adapter.on_disk:
        return render.styled(f"missing on disk: {adapter.path}", "red")
    if adapter.is_current:
        return render.styled(f"current: {what}\n{render.clean(adapter.path)}", "green")
    return f"of {render.short(adapter.commit)}: {what}\n{render.clean(adapter.path)}"


def _state(view: Overview) -> str | None:
    state = view.state
    if state is None:
        return None
    anchor = f"{state.anchor_role} anchor {render.short(state.anchor)}"
    sizes = view.sizes
    each = sizes.state_bytes / max(sizes.n_kept_states, 1)
    whole = "" if sizes.n_kept_states == sizes.n_states else f", {sizes.n_kept_states:,} kept,"
    kept = f"{render.count(sizes.n_states, 'state')}{whole} of {render.size(each)}"
    since = state.provisional_since
    provisional = f", provisional since {render.short(since)}" if since else ""
    return f"step {state.step} after the {anchor}{provisional}; {kept}"


def _queue(view: Overview) -> str | None:
    if view.queue is None:
        return None
    if view.state is None:
        text = "waiting for the first state"
    elif view.queue.commits == 0:
        text = "empty"
    else:
        text = f"{render.count(view.queue.commits, 'commit')} behind HEAD"
    if view.backfill is not None:
        total = view.backfill.anchor.total_commits or 0
        text += f"\nolder history {render.bar(view.backfill.done_commits, total)}"
    return text


def _drift(view: Overview) -> str | None:
    if not view.drift:
        return None
    values = [item.drift for item in view.drift]
    last = render.count(len(values), "step")
    return f"{render.sparkline(values)}  last {last}, newest right, highest {max(values):.4f}"


def _gain(view: Overview) -> str | None:
    if view.standing is None:
        return None
    gain = view.standing.gain
    if gain is None:
        off = not view.score_commits
        return (
            "not measured: score_commits is 0" if off else "not measured yet: no commit is scored"
        )
    base = render.gain(gain.over_base.mean, gain.over_base.error)
    generic = render.gain(gain.over_generic.mean, gain.over_generic.error)
    commits = render.count(gain.n_commits, "commit")
    return f"{base} over base, {generic} over generic; nats a token, {commits}"


def _serves(view: Overview) -> str | None:
    """Return whose weights serve and why; the adapter's row says of which commit they are."""
    if view.standing is None or view.adapter is None:
        return None
    if view.standing.gain is None and view.standing.use == view.adapter.use == "own":
        return None  # as everybody expects
    if view.adapter.use != view.standing.use:
        return f"the {view.adapter.use} adapter still; next, {view.standing.why}"
    unusual = view.standing.use != "own"
    return render.styled(view.standing.why, "yellow") if unusual else view.standing.why


def _model(view: Overview) -> str:
    known = f", checkpoint {render.short(view.checkpoint)}" if view.checkpoint else ""
    return f"{render.clean(view.model)}{known}"


def _audit(view: Overview) -> str | None:
    if view.audit is None:
        return None
    failed = view.audit.verdict == "failed"
    return render.styled(view.audit.text, "yellow") if failed else view.audit.text


def _hooks(view: Overview) -> str:
    installed = [hook for hook in view.hooks if hook.status == "installed" and not hook.outdated]
    if len(installed) == len(view.hooks):
        return "installed"
    lines = []
    for hook in view.hooks:
        if hook in installed:
            continue
        state = "outdated" if hook.status == "installed" else hook.status
        why = f": {render.line(hook.reason)}" if hook.reason else ""
        todo = f" ({hook.hint})" if hook.hint else ""
        lines.append(f"{hook.event} {state}{why}{todo}")
    if not any(hook.hint for hook in view.hooks):
        lines.append("`code2lora init` installs them")
    return render.styled("\n".join(lines), "yellow")


def _daemon(view: Overview) -> str:
    daemon = view.daemon
    if not daemon.running:
        return render.styled("not running: `code2lora daemon start`", "yellow")
    worker = f"model loaded, process {daemon.worker.pid}" if daemon.worker else "model not loaded"
    process = f", process {daemon.supervisor.pid}" if daemon.supervisor else ""
    return f"running{process}; {worker}"


def _success(view: Overview) -> str | None:
    event = view.last_success
    if event is None:
        return None
    commit = str(event.detail.get("commit", ""))
    return f"{event.kind} the adapter of {render.short(commit)} {render.age(event.at)}"


def _failure(view: Overview) -> str | None:
    failure = view.last_failure
    if failure is None:
        return None
    times = f", {render.count(failure.n_times, 'time')}" if failure.n_times > 1 else ""
    text = f"{render.age(failure.at)}{times}: {render.line(failure.message)}"
    if failure.resolved_at is not None:
        return f"{text} (resolved)"
    if failure.hint:
        text += f"\nhint: {render.clean(failure.hint)}"
    return render.styled(text, "red")


def _render_all(found: list[Overview | dict[str, str]]) -> str:
    if not found:
        return "no repository is registered yet: `code2lora init` in one"
    rows: list[list[str]] = []
    for view in found:
        if isinstance(view, dict):
            why = render.styled(render.line(view["error"]), "red")
            rows.append(["?", "", "", why, render.clean(view["path"])])
            continue
        generation = str(view.adapter.generation) if view.adapter else "-"
        head = render.short(view.head.commit) if view.head else "-"
        rows.append([render.clean(view.name), head, generation, _summary(view), view.path])
    return render.table(
        ["NAME", "HEAD", "ADAPTER", "STATE", "PATH"], rows, right=["ADAPTER"], elastic="PATH"
    )


def _summary(view: Overview) -> str:
    if view.last_failure is not None and view.last_failure.resolved_at is None:
        return render.styled("failing", "red")
    if view.head is None:
        return "no commit yet"
    if view.adapter is None or view.queue is None:
        return "no adapter yet"
    if view.adapter.is_current and view.adapter.on_disk:
        return render.styled("current", "green")
    more = "+" if view.queue.is_bounded else ""
    return f"{view.queue.commits}{more} behind" if view.queue.commits else "switching"
