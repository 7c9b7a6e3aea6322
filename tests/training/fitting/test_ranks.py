"""Several processes must train what one does; these are real ones."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from code2lora.errors import UserError
from code2lora.training.fitting import fit
from tests.training.fitting.rank_worker import CONFIG, train

ROOT = Path(__file__).parents[3]


def _launch(n: int, *arguments: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.fitting.rank_worker", *arguments],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]
    try:
        for process in processes:
            _, said = process.communicate(timeout=240)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()


def test_two_processes_train_what_one_does_also_in_two_pieces(mined: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "whole").mkdir(parents=True)
        (tmp_path / name / "cut").mkdir()
    _launch(2, str(mined), str(tmp_path / "two"))
    expected = train(mined, tmp_path / "one" / "whole")

    whole, resumed = (
        [float(loss) for loss in line.split()]
        for line in (tmp_path / "two" / "losses.txt").read_text().splitlines()
    )
    assert len(expected) == CONFIG.max_steps
    assert whole == pytest.approx(expected, rel=1e-4)
    assert resumed == whole
    one = load_file(tmp_path / "one" / "whole" / "learner-0.safetensors")
    for kind in ("whole", "cut"):
        ranks = [
            load_file(tmp_path / "two" / kind / f"learner-{rank}.safetensors") for rank in (0, 1)
        ]
        for name, tensor in one.items():
            assert torch.equal(ranks[0][name], ranks[1][name]), name
            # Adam makes a part of a step, 1e-2, of what rounding leaves of a gradient near zero.
            torch.testing.assert_close(ranks[0][name], tensor, rtol=1e-3, atol=1e-3)


def test_more_processes_than_pairs_of_repositories_are_a_user_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fit, "n_ranks", lambda: 3)
    with pytest.raises(UserError, match="3 processes share 5 repositories a step"):
        fit._check(CONFIG, 9)
