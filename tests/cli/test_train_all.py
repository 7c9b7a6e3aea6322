"""`train clone` and `train all`: from what a server has to a model, in one go or in several."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from code2lora.cli.train import stages as running
from code2lora.cli.train import train
from code2lora.cli.train.plan import Plan
from code2lora.cli.train.stages import Stage, run_stages
from code2lora.errors import UserError
from code2lora.hypernetwork.checkpoint import load_family
from code2lora.hypernetwork.models import resolve_model
from code2lora.training.recipe import load_recipe
from code2lora.training.split import bucket
from code2lora.training.times import Times, open_times
from tests.cli.conftest import Run
from tests.cli.test_train_stages import BASE_RECIPE
from tests.gitrepo import GitRepo
from tests.training import worlds
from tests.training.test_run import RECIPE

MEMORY = """
[keys]
n_keys = 3
excerpt_tokens = 32
snapshot_files = 3
diff_files = 2
"""


class Served:
    """Repositories as a server has them, the list that pins them, and a tiny recipe."""

    def __init__(self, root: Path, family: str) -> None:
        self.root = root
        self.list = root / "list.txt"
        self.recipe = root / f"{family}.toml"
        text = RECIPE.replace("repositories = 2", "repositories = 4") + BASE_RECIPE
        if family == "memory":
            kind = '[fit.learner]\nfamily = "memory"\nencoder = "frozen"\n'
            text = text.replace("[fit.learner]\n", kind).replace("n_lanes = 2", "n_lanes = 1")
            text += MEMORY
        self.recipe.write_text(text)
        self.list.write_text("# what is served\n")

    @property
    def source(self) -> str:
        """What names are appended to."""
        return (self.root / "served").as_uri()

    def add(self, world: str, name: str) -> GitRepo:
        """Serve a repository of some words under a name, and list it."""
        made = worlds.make_repository(self.root / "served" / "made", world)
        place = self.root / "served" / name
        place.parent.mkdir(exist_ok=True)
        made.git_dir.parent.rename(place)
        repo = GitRepo(place, init=False)
        self.pin(name, repo.head)
        return repo

    def pin(self, name: str, commit: str) -> None:
        """List a repository."""
        with self.list.open("a") as file:
            file.write(f"{name} {commit}\n")

    def command(self, stage: str, *options: str) -> list[str]:
        """Return a whole command line."""
        given = [f"--list={self.list}", f"--from={self.source}", *options]
        return [sys.executable, "-m", "code2lora", "train", stage, *given]


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path, "gru")


def _names() -> tuple[list[str], list[str]]:
    """Return names of repositories to train on, and of others to choose by."""
    every = [f"owner/name-{i}" for i in range(60)]
    training = [name for name in every if bucket(name) < 8]
    return training, [name for name in every if bucket(name) == 8]


def _end(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("family", ["gru", "memory"])
def test_one_command_makes_a_model(family: str, tmp_path: Path) -> None:
    served = Served(tmp_path, family)
    training, validation = _names()
    worlds_of = [*worlds.WORDS, *worlds.MORE_WORDS]
    for world, name in zip(worlds_of, [*training[:3], *validation[:2]], strict=True):
        served.add(world, name)
    served.add("alpha", training[3])
    served.pin("owner/gone", "0" * 40)
    site = tmp_path / "site"
    site.mkdir()
    out = tmp_path / "made"
    options = [f"--recipe={served.recipe}", f"--out={out}", f"--site={site}", "--name=tiny"]
    command = served.command("all", *options, "--device=cpu")

    first = _end(command)

    # A model that has learnt for two steps does not know its repositories, and the audit says so.
    assert first.returncode == 4, first.stderr
    assert "owner/gone: '" in first.stderr
    reading = ["keys", "embed"] if family == "memory" else []
    stages = ["clone", "base", "mine", *reading, "fit", "baselines", "evaluate", "audit", "bundle"]
    headings = [line for line in first.stderr.splitlines() if line.startswith("[")]
    assert headings == [f"[{i}/{len(stages)}] {name}" for i, name in enumerate(stages, 1)]
    assert "  learnt from  6 of 7 repositories\n" in first.stdout
    times = json.loads((out / "times.json").read_text())
    assert list(times["stages"]) == stages
    assert all(stage["seconds"] > 0 for stage in times["stages"].values())
    assert {n: stage["status"] for n, stage in times["stages"].items() if stage["status"]} == {
        "audit": 4
    }
    assert times["seconds"] == sum(stage["seconds"] for stage in times["stages"].values())
    assert times["machine"]["cores"] == os.cpu_count() and times["machine"]["processor"]
    assert times["versions"]["torch"] and times["versions"]["git"]
    model = resolve_model(str(out / "tiny"), out)
    assert load_family(model).config.family == family
    assert json.loads((out / "tiny/hypernetwork/config.json").read_text())["audit"]
    measured = json.loads((out / "fitted" / "evaluation.json").read_text())
    assert measured["rows"]["shared_lora"]["measured"]

    again = _end([*command, "--json"])

    assert again.returncode == 4
    assert "finished before" in again.stderr and " took " not in again.stderr
    found = json.loads(again.stdout)
    assert found["seconds"] == times["seconds"] and found["path"] == str(out / "tiny")


def test_a_stage_that_fails_is_gone_on_with(
    served: Served, code2lora: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    """The server is down at first; then all is mined, and the given base turns out to be none."""
    out, base = served.root / "made", served.root / "base"
    (base / "export").mkdir(parents=True)
    for part in ("figures.json", "manifest.json"):
        (base / part).write_text("{}")
    served.add("alpha", "owner/name")
    down = (served.root / "served").rename(served.root / "down")
    command = served.command("all", f"--recipe={served.recipe}", f"--out={out}", f"--base={base}")
    command = command[command.index("train") :]

    first = code2lora(*command)

    assert (first.status, first.out) == (1, "")
    assert first.err == "[1/7] clone\nnot finished; the same command goes on from here\n"
    assert "error: none of 1 repository could be cloned\n" in capfd.readouterr().err
    before = json.loads((out / "times.json").read_text())["stages"]
    assert before["clone"]["seconds"] > 0 and before["clone"]["status"] is None
    other = code2lora(*command, "--no-shared")
    assert other.status == 1
    assert other.err.startswith(f"error: {out} was begun with another shared\n")

    down.rename(served.root / "served")
    second = code2lora(*command)

    assert second.status == 1
    shown = capfd.readouterr()
    assert "cloned  owner/name" in shown.out and "mined   owner/name" in shown.out
    assert f"error: there is no base model at {base / 'export'}" in shown.err
    after = json.loads((out / "times.json").read_text())["stages"]
    assert {name: stage["status"] for name, stage in after.items()} == {
        "clone": 0,
        "mine": 0,
        "fit": None,
    }
    assert after["clone"]["seconds"] > before["clone"]["seconds"]


@pytest.fixture
def hanging(served: Served) -> Iterator[Served]:
    """A server that has one repository, and waits for ever when it is asked for a second one."""
    served.add("alpha", "owner/quick")
    slow = served.add("beta", "owner/slow")
    fifo = slow.path / ".git" / "objects" / "info" / "alternates"
    os.mkfifo(fifo)
    yield served
    fifo.unlink(missing_ok=True)


@pytest.mark.parametrize("stage", ["clone", "all"])
def test_an_interrupt_leaves_whole_clones(stage: str, hanging: Served) -> None:
    """^C in a terminal reaches the whole process group."""
    out = hanging.root / "made"
    clones = out / "clones" if stage == "all" else out
    recipe = [f"--recipe={hanging.recipe}"] if stage == "all" else []
    child = subprocess.Popen(
        hanging.command(stage, f"--out={out}", "--workers=2", *recipe),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline_s = time.monotonic() + 120
    while not (clones / ".tmp-owner+slow.git" / "objects").exists():
        assert child.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.05)

    os.killpg(child.pid, signal.SIGINT)

    _, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)  # nobody of the group is left
    assert said.count("stopping at the next whole step; ^C again to stop at once\n") == 1
    assert "stopped; the same command goes on from here\n" in said
    assert not list(clones.glob(".tmp-*"))
    assert not (clones / "owner+slow.git").exists()
    if stage == "all":
        assert said.endswith("not finished; the same command goes on from here\n")
        assert json.loads((out / "times.json").read_text())["stages"]["clone"]["status"] is None


def test_repositories_are_cloned(code2lora: Run, served: Served) -> None:
    there = served.add("alpha", "owner/there")
    served.pin("owner/gone", "0" * 40)
    out = served.root / "clones"
    options = ["--list", served.list, "--from", served.source, "--out", out]

    done = code2lora("train", "clone", *options)

    assert done.status == 0, "those that are there can be mined"
    assert sorted(done.out.splitlines()[1:]) == ["cloned  owner/there", "failed  owner/gone"]
    assert "owner/gone: '" in done.err
    found = json.loads(code2lora("train", "clone", *options, "--json").out)
    assert {each["name"]: each["status"] for each in found} == {
        "owner/there": "kept",
        "owner/gone": "failed",
    }
    assert GitRepo(out / "owner+there.git", init=False).head == there.head
    served.list.write_text("owner/there HEAD\n")
    wrong = code2lora("train", "clone", *options)
    assert (wrong.status, wrong.out) == (1, "")
    assert wrong.err.startswith(f"error: {served.list}, line 1: 'HEAD' is no full commit id\n")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "list.txt").write_text("")
    return Plan(
        recipe_name="mini",
        out_dir=tmp_path,
        name=None,
        clones=None,
        list_file=tmp_path / "list.txt",
        source="https://example.org/",
        base=None,
        sites=(tmp_path, tmp_path),
        shared=True,
        workers=3,
        device="cpu",
    )


BEGINNING, END = ["clone", "base", "mine"], ["evaluate", "audit", "bundle"]


@pytest.mark.parametrize(
    ("recipe", "shared", "expected"),
    [
        ("mini-gru", True, [*BEGINNING, "fit", "baselines", *END]),
        ("mini-gru", False, [*BEGINNING, "fit", *END]),
        ("mini", True, [*BEGINNING, "keys", "embed", "fit", "baselines", *END]),
    ],
)
def test_a_recipe_needs_its_stages_and_each_is_a_command_that_there_is(
    recipe: str, shared: bool, expected: list[str], plan: Plan
) -> None:
    plan = replace(plan, recipe_name=recipe, shared=shared)
    for folder in ("base/export", "clones", "mined", "encoder", "fitted", "baselines"):
        (plan.out_dir / folder).mkdir(parents=True)
    (plan.out_dir / "clones" / "list.txt").write_text("")

    stages = plan.stages(load_recipe(recipe))

    assert [stage.name for stage in stages] == expected
    for stage in stages:
        command = train.commands[stage.name]
        words = stage.command[len(running.COMMAND) + 1 :]
        given = command.make_context(stage.name, list(words)).params
        assert given.get("test_bucket", False) is False
        if stage.name == "audit":
            assert given["shared"] == (plan.out_dir / "baselines" if shared else None)
        if stage.name == "base":
            assert given["site_dirs"] == plan.sites
        if stage.name == "fit":
            encoder = str(plan.out_dir / "encoder")
            assert given["features"] == (encoder if recipe == "mini" else None)
            assert given["base_name"] == recipe


def test_a_base_that_is_given_is_not_trained(plan: Plan, tmp_path: Path) -> None:
    base = tmp_path / "elsewhere"
    with pytest.raises(UserError, match=f"there is no {base / 'export'}"):
        replace(plan, base=base).stages(load_recipe("mini"))
    for part in ("export", "figures.json", "manifest.json"):
        (base / part).mkdir(parents=True)

    stages = {stage.name: stage for stage in replace(plan, base=base).stages(load_recipe("mini"))}

    assert "base" not in stages
    assert stages["fit"].options["base"] == base / "export"
    assert stages["bundle"].options["base"] == base


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--recipe=paper"], "the recipe paper reads with a frozen encoder, which no stage makes"),
        (["--name=fitted"], "a model cannot be called 'fitted'"),
        (["--name=../up"], "a model cannot be called '../up'"),
        (["--recipe=none"], "there is no recipe 'none'"),
    ],
)
def test_what_cannot_be_made_is_said_before_anything_is_done(
    options: list[str], complaint: str, code2lora: Run, tmp_path: Path
) -> None:
    done = code2lora("train", "all", "--out", tmp_path / "made", *options)

    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"error: {complaint}\n")
    assert not (tmp_path / "made").exists()


# Writes a letter to OUT at every start, and ends with the statuses that it is given, one a start.
STAGE = """
import os, sys, time
name, out, statuses = sys.argv[1], *(word.split("=", 1)[1] for word in sys.argv[2:])
n = os.path.getsize(out) if os.path.exists(out) else 0
open(out, "a").write("x")
time.sleep(0.2)
status = int(statuses.split(",")[n])
os.kill(os.getpid(), -status) if status < 0 else sys.exit(status)
"""


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a stage be the script above."""
    monkeypatch.setattr(running, "COMMAND", (sys.executable, "-S", "-c", STAGE))


def _stage(folder: Path, name: str, statuses: str, **more: tuple[int, ...]) -> Stage:
    return Stage(name, {"out": folder / name, "statuses": statuses}, folder / name, **more)


def test_stages_end_with_the_status_of_the_first_that_fails_and_go_on_there(
    scripted: None, tmp_path: Path
) -> None:
    path = tmp_path / "times.json"
    stages = [
        _stage(tmp_path, "one", "0"),
        _stage(tmp_path, "two", "130,-9,4", answers=(0, 4)),
        _stage(tmp_path, "three", "0,0"),
    ]

    def run() -> tuple[int, Times]:
        times = open_times(path, {"recipe": "this"})
        return run_stages(stages, times, output=None), times

    status, first = run()
    assert status == 130
    assert list(first.stages) == ["one", "two"]
    assert run()[0] == 128 + signal.SIGKILL
    status, last = run()
    assert status == 0
    assert {name: stage.status for name, stage in last.stages.items()} == {
        "one": 0,
        "two": 4,
        "three": 0,
    }
    assert last.stages["one"] == first.stages["one"], "it was not run again"
    assert last.stages["two"].seconds > 0.6, "of all three times"
    assert first.stages["two"].seconds < last.stages["two"].seconds - 0.4
    assert (tmp_path / "two").read_text() == "xxx"
    assert open_times(path, {"recipe": "this"}).stages == last.stages
    with pytest.raises(UserError, match="was begun with another recipe"):
        open_times(path, {"recipe": "that"})


def test_what_comes_after_a_stage_that_is_run_again_is_run_again(
    scripted: None, tmp_path: Path
) -> None:
    times = open_times(tmp_path / "times.json", {})
    stages = [_stage(tmp_path, name, "0,0") for name in ("one", "two", "three")]
    assert run_stages(stages, times, output=None) == 0
    (tmp_path / "two").unlink()

    assert run_stages(stages, times, output=None) == 0

    written = {name: (tmp_path / name).read_text() for name in ("one", "two", "three")}
    assert written == {"one": "x", "two": "x", "three": "xx"}


@pytest.mark.parametrize(
    ("number", "expected", "finished"),
    [(signal.SIGINT, 130, True), (signal.SIGTERM, 128 + signal.SIGTERM, False)],
)
def test_a_signal_to_this_process_alone_ends_the_run(
    number: int, expected: int, finished: bool, scripted: None, tmp_path: Path
) -> None:
    """After the stage that did not get the interrupt; a termination is passed on to it."""
    times = open_times(tmp_path / "times.json", {})
    stages = [_stage(tmp_path, name, "0,0") for name in ("one", "two")]
    before = signal.getsignal(number)

    def send(*_: object) -> None:
        os.kill(os.getpid(), number)

    previous = signal.signal(signal.SIGALRM, send)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        assert run_stages(stages, times, output=None) == expected
    finally:
        signal.signal(signal.SIGALRM, previous)

    assert (times.stages["one"].status == 0) is finished
    assert not (tmp_path / "two").exists()
    assert signal.getsignal(number) is before
    assert run_stages(stages, times, output=None) == 0


def test_a_record_that_is_damaged_is_said(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    for text in ("{", "[]", "{}", '{"made_with": {}, "stages": {"one": {"hours": 1}}}'):
        path.write_text(text)
        with pytest.raises(UserError, match="cannot be read"):
            open_times(path, {})


def test_help_has_examples(code2lora: Run) -> None:
    for stage in ("all", "clone"):
        done = code2lora("train", stage, "--help")
        assert done.status == 0
        assert f"code2lora train {stage} " in done.out.partition("Examples:")[2]
