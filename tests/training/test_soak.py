"""The full counts, by hand before a release: pytest -m soak tests/training/test_soak.py"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmit.config import Config, dump_config
from tests.training.ranks import assert_same_losses, ended_ranks, run_ranks, start_ranks
from tests.training.test_resume import OFTEN, assert_same_run, kill_until_done, two_stages
from tests.training.tiny import altered, config, metrics, run, said, stage

BOTH = {"projector": {"lr": 1e-3}, "language": {"lr": 1e-3}}


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_two_hundred_kills_with_other_workers_each_time_change_no_number(tmp_path: Path, data: Path) -> None:
    held_out = {"holdout": {"fraction": 0.2, "by": "sample"}, "every": 3}
    settings = {"save": {"every": 2}, "eval": held_out}
    straight = run(two_stages(tmp_path / "straight", data, **settings))
    before = time.monotonic()
    run(two_stages(tmp_path / "timed", data, **settings))
    longest = time.monotonic() - before
    killed = rounds = 0
    while killed < 200:
        rounds += 1
        wanted = two_stages(tmp_path / f"killed{rounds}", data, **settings)
        killed += kill_until_done(wanted, 6, seed=rounds, longest=longest, workers=(0, 1, 3))
        assert_same_run(straight, tmp_path / f"killed{rounds}")
    print(f"{killed} kills in {rounds} runs")


def _two_ranks(output: Path, data: Path) -> Config:
    held_out = {"holdout": {"fraction": 0.4, "by": "sample"}, "every": 2}
    return config(output, stage("s", data, BOTH, steps=12, row_tokens=200), eval=held_out, save={"every": 4})


def _heeds_signals(process: int) -> bool:
    """Whether it blocks or handles SIGTERM."""
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    masks = dict(line.split(":", 1) for line in status.splitlines())
    return bool((int(masks["SigBlk"], 16) | int(masks["SigCgt"], 16)) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_sigterm_to_one_of_two_ranks_at_forty_moments_loses_no_step(tmp_path: Path, data: Path) -> None:
    rng = random.Random(0)
    before = time.monotonic()
    straight = run_ranks(_two_ranks(tmp_path / "straight", data), 2)
    longest = time.monotonic() - before
    stopped = 0
    for number in range(40):
        wanted = _two_ranks(tmp_path / f"stopped{number}", data)
        processes = start_ranks(wanted, 2)
        moment, rank = 0.1 + longest * number / 40, rng.randrange(2)
        print(f"{number}: rank {rank} after {moment:.2f} s", flush=True)
        while not _heeds_signals(processes[rank]):  # `mmit train` has begun; before, a signal is the launcher's matter
            time.sleep(0.01)
        time.sleep(moment)
        os.kill(processes[rank], signal.SIGTERM)
        codes = ended_ranks(processes)
        assert codes in ([75, 75], [0, 0]), said(wanted)
        stopped += codes == [75, 75]
        run_ranks(wanted, 2)
        assert_same_losses(straight, tmp_path / f"stopped{number}", relative=0)
        assert len(metrics(tmp_path / f"stopped{number}")) == 12, "no step was computed twice"
    assert stopped >= 20
    print(f"{stopped} of 40 stopped")


@pytest.mark.slow
def test_torchrun_starts_a_crashed_run_again_and_it_goes_on_by_itself(tmp_path: Path, data: Path) -> None:
    """A rank kills itself once, in the middle of the run; nobody types anything."""
    wanted = altered(_two_ranks(tmp_path / "run", data), tmp_path / "run", save=OFTEN)
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(wanted), encoding="utf-8")
    once = tmp_path / "once.py"
    once.write_text(
        f"""
import os, signal, sys
from pathlib import Path
from mmit.training import loop
original, marker = loop._update, Path({str(tmp_path / "crashed")!r})
def crash(at, step, losses):
    if step.number == 5 and os.environ["RANK"] == "1" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(at, step, losses)
loop._update = crash
from mmit.cli import main
sys.argv = ["mmit", "train", {str(file)!r}]
main()
""",
        encoding="utf-8",
    )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", str(once)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "crashed").exists()
    assert_same_losses(run_ranks(_two_ranks(tmp_path / "straight", data), 2), tmp_path / "run", relative=0)
