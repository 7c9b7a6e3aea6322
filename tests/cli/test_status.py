"""`status`: whole texts, from a real store and a real repository, with no daemon anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from code2lora.cli.render import short
from code2lora.hooks import EVENTS
from code2lora.settings import Settings
from code2lora.state_store import Store
from tests.cli.conftest import CHECKPOINT, Known, Run
from tests.cli.models import AUDIT, make_model, of_mini
from tests.gitrepo import GitRepo


def test_everything_of_one_repository(code2lora: Run, known: Known, here: Path) -> None:
    live = known.store.live_adapter(known.worktree.id)
    assert live is not None
    root, head = known.repo.git("rev-parse", "HEAD~3"), known.repo.head

    done = code2lora("status")

    assert (done.status, done.err) == (0, "")
    assert done.out == (
        f"repo  {here}\n"
        f"  head     main {short(head)}  not absorbed\n"
        f"  adapter  of {short(live.commit)}: generation 1, 1.2 MB, 3 min ago\n"
        f"           {live.path}\n"
        f"  state    step 2 after the active anchor {short(root)}; 3 states of 2.0 kB\n"
        "  queue    1 commit behind HEAD\n"
        "  drift    ▅█  last 2 steps, newest right, highest 0.2500\n"
        "  gain     not measured yet: no commit is scored\n"
        "  model    tiny, checkpoint cccccccccccc\n"
        "  hooks    installed\n"
        "  daemon   not running: `code2lora daemon start`\n"
        f"  success  published the adapter of {short(live.commit)} 3 min ago\n"
    )


def test_thinned_states_are_told_apart(code2lora: Run, known: Known, here: Path) -> None:
    known.thin(step=1)
    assert "; 3 states, 2 kept, of 2.0 kB\n" in code2lora("status").out
    assert json.loads(code2lora("status", "--json").out)["sizes"]["n_kept_states"] == 2


def test_a_head_between_steps_is_current_and_provisional(
    code2lora: Run, home: Settings, store: Store, repo: GitRepo, here: Path
) -> None:
    known = Known(home, store, repo)
    commits = [repo.commit({"a.py": f"x = {n}\n"}) for n in range(4)]
    known.absorb(commits, between={1}, provisional={3})
    known.publish(commits[-1])

    out = code2lora("status").out

    state = f"step 3 after the active anchor {short(commits[0])}, provisional since "
    assert f"  state    {state}{short(commits[2])}; 3 states of 2.0 kB\n" in out
    assert "  queue    empty\n" in out
    assert "  drift    █  last 1 step, newest right, highest 0.2500\n" in out


def test_a_current_adapter_says_so(code2lora: Run, known: Known, here: Path) -> None:
    known.repo.reset("HEAD~1")
    out = code2lora("status").out
    assert "  adapter  current: generation 1, 1.2 MB, 3 min ago\n" in out
    assert "  queue    empty\n" in out


def test_an_adapter_that_was_deleted_by_hand(code2lora: Run, known: Known, here: Path) -> None:
    live = known.store.live_adapter(known.worktree.id)
    assert live is not None
    shutil.rmtree(live.path)
    assert f"  adapter  missing on disk: {live.path}\n" in code2lora("status").out


def test_the_last_failure_has_its_reason_and_hint(code2lora: Run, known: Known, here: Path) -> None:
    for _ in range(2):
        known.store.record_failure(
            known.repository_id, "refresh", "the disk\x1b[2J is full", hint="`df`"
        )
    expected = "  failure  3 min ago, 2 times: the disk\ufffd[2J is full"
    assert f"{expected}\n           hint: `df`\n" in code2lora("status").out
    known.store.resolve_failures(known.repository_id)
    assert f"{expected} (resolved)\n" in code2lora("status").out


def test_backfill_shows_how_far(code2lora: Run, known: Known, here: Path) -> None:
    known.store.add_anchor(
        known.repository_id,
        CHECKPOINT,
        known.repo.head,
        "backfill",
        target_commit=known.repo.head,
        total_commits=200,
    )
    expected = f"  queue    1 commit behind HEAD\n           older history {'░' * 24} 0/200\n"
    assert expected in code2lora("status").out


def test_before_the_first_commit(code2lora: Run, home: Settings, store: Store, here: Path) -> None:
    Known(home, store, GitRepo(here, init=False))
    out = code2lora("status").out
    assert out == (
        f"repo  {here}\n"
        "  head     main, no commit yet: the first one makes the adapter\n"
        "  adapter  none yet\n"
        "  model    mini\n"
        f"  audit    {of_mini()}\n"
        "  hooks    installed\n"
        "  daemon   not running: `code2lora daemon start`\n"
    )


def test_before_the_first_state(
    code2lora: Run, home: Settings, store: Store, repo: GitRepo, here: Path
) -> None:
    repo.commit({"a.py": "x = 1\n"})
    Known(home, store, repo)
    assert "  queue    waiting for the first state\n" in code2lora("status").out


def test_the_audit_of_the_model_that_made_the_states(
    code2lora: Run, known: Known, here: Path, home: Settings
) -> None:
    """Those are of `tiny`, whatever the settings name."""
    assert "  audit  " not in code2lora("status").out, "its files are not there"
    assert json.loads(code2lora("status", "--json").out)["audit"] is None
    model = make_model(home.models_dir / "tiny", audit=AUDIT)
    said = "failed: the own adapter does not beat the generic one; 1 more test failed"
    assert f"  audit    {said}\n" in code2lora("status").out
    view = json.loads(code2lora("status", "--json").out)["audit"]
    assert view == {"verdict": "failed", "text": said}
    (model / "hypernetwork" / "config.json").write_text("{")
    assert "  audit  " not in code2lora("status").out


def test_a_detached_head_is_named(code2lora: Run, known: Known, here: Path) -> None:
    known.repo.git("switch", "--quiet", "--detach", "HEAD~1")
    assert f"  head     detached {short(known.repo.head)}  change 2\n" in code2lora("status").out


def test_the_gain_and_what_serves_for_it(code2lora: Run, known: Known, here: Path) -> None:
    commits = [f"{n:040x}" for n in range(12)]
    known.score(commits[:1], base=0.25, generic=-0.1)
    out = code2lora("status").out
    figures = "+0.250 over base, -0.100 over generic; nats a token, 1 commit"
    assert f"  gain     {figures}\n" in out
    waiting = "1 of the 10 scored commits that the gate waits for"
    assert f"  serves   the repository's own adapter: {waiting}\n" in out

    known.score(commits[1:], use="generic", base=0.25, generic=-0.1)
    out = code2lora("status").out
    figures = "+0.250 ±0.000 over base, -0.100 ±0.000 over generic; nats a token, 12 commits"
    better = "the generic adapter: 0.100 ±0.000 nats a token better than the own adapter"
    assert f"  gain     {figures}\n  serves   the own adapter still; next, {better}\n" in out
    live = known.store.live_adapter(known.worktree.id)
    assert live is not None
    known.publish(live.commit, use="generic")
    assert f"  serves   {better}\n" in code2lora("status").out

    standing = json.loads(code2lora("status", "--json").out)["standing"]
    assert (standing["use"], standing["gate"], standing["why"]) == ("generic", "on", better)
    gain = standing["gain"]
    assert (gain["n_commits"], gain["n_tokens"]) == (12, 1200)
    assert gain["over_generic"]["mean"] == pytest.approx(-0.1)
    assert gain["over_base"]["error"] == pytest.approx(0.0, abs=1e-9)


def test_the_base_serves_by_an_adapter_that_adds_nothing(
    code2lora: Run, known: Known, here: Path
) -> None:
    live = known.store.live_adapter(known.worktree.id)
    assert live is not None
    known.publish(live.commit, use="base")
    known.score([f"{n:040x}" for n in range(12)], use="base", base=-0.5, generic=-0.25)
    why = "the base model: 0.500 ±0.000 nats a token better than the own adapter"
    assert f"  serves   {why}\n" in code2lora("status").out
    view = json.loads(code2lora("status", "--json").out)
    assert (view["adapter"]["use"], view["standing"]["gate_use"]) == ("base", "base")


def test_the_gate_and_scoring_can_be_off(
    code2lora: Run, known: Known, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODE2LORA_SCORE_COMMITS", "0")
    assert "  gain     not measured: score_commits is 0\n" in code2lora("status").out
    monkeypatch.setenv("CODE2LORA_GATE", "off")
    known.score([f"{n:040x}" for n in range(12)], use="generic", generic=-0.1)
    off = "the gate is off, which would serve the generic adapter"
    assert f"  serves   the repository's own adapter: {off}\n" in code2lora("status").out


def test_missing_hooks_are_named_one_by_one(code2lora: Run, known: Known, here: Path) -> None:
    (here / ".git/hooks/post-merge").unlink()
    (here / ".git/hooks/post-commit").unlink()
    assert (
        "  hooks    post-commit missing\n"
        "           post-merge missing\n"
        "           `code2lora init` installs them\n"
    ) in code2lora("status").out


def test_all_has_a_line_for_each_worktree(
    code2lora: Run, known: Known, tmp_path: Path, here: Path
) -> None:
    known.repo.worktree(tmp_path / "beside", "topic")
    code2lora("status", tmp_path / "beside")  # takes it up
    gone = GitRepo(tmp_path / "gone")
    Known(known.settings, known.store, gone)
    shutil.rmtree(gone.path)
    head = short(known.repo.head)

    done = code2lora("status", "--all")

    lines = done.out.splitlines()
    assert (done.status, done.err) == (0, "")
    assert lines[0].split() == ["NAME", "HEAD", "ADAPTER", "STATE", "PATH"]
    assert lines[1].split() == ["repo", head, "1", "1", "behind", str(here)]
    assert lines[2].split() == ["repo", head, "-", "no", "adapter", "yet", str(tmp_path / "beside")]
    assert lines[3].startswith("?") and lines[3].endswith(str(gone.path))
    assert len(lines) == 4


def test_all_of_nothing(code2lora: Run) -> None:
    assert code2lora("status", "--all").out == (
        "no repository is registered yet: `code2lora init` in one\n"
    )


def test_json_has_everything(code2lora: Run, known: Known, here: Path) -> None:
    view = json.loads(code2lora("status", "--json").out)
    assert view["head"]["commit"] == known.repo.head
    assert view["head"]["summary"] == "not absorbed"
    assert (view["branch"], view["path"]) == ("main", str(here))
    assert (view["adapter"]["generation"], view["adapter"]["is_current"]) == (1, False)
    assert (view["state"]["step"], view["state"]["anchor_role"]) == (2, "active")
    assert view["queue"] == {"commits": 1, "is_bounded": False}
    assert [item["drift"] for item in view["drift"]] == [0.125, 0.25]
    assert view["last_success"]["kind"] == "published"
    assert [hook["event"] for hook in view["hooks"]] == list(EVENTS)
    assert view["daemon"] == {"running": False, "supervisor": None, "worker": None}
    assert view["sizes"]["n_states"] == 3
    assert view["repository_id"] == known.repository_id


def test_json_of_all_is_a_list(code2lora: Run, known: Known) -> None:
    (view,) = json.loads(code2lora("status", "--all", "--json").out)
    assert view["repository_id"] == known.repository_id


def test_watch_needs_a_terminal(code2lora: Run, known: Known, here: Path) -> None:
    done = code2lora("status", "--watch")
    assert done.status == 2
    assert done.err == "error: --watch needs a terminal\nhint: `code2lora status --help`\n"
    done = code2lora("status", "--watch", "--json")
    assert done.err.startswith("error: --watch and --json exclude each other\n")


def test_a_summary_cannot_draw_on_the_terminal(code2lora: Run, known: Known, here: Path) -> None:
    known.repo.commit({"c.py": "z = 1\n"}, "\x1b]0;owned\x07 and \x1b[31mred")
    assert "\ufffd]0;owned\ufffd and \ufffd[31mred\n" in code2lora("status").out
