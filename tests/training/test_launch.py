"""The launch files: a job that is told to stop saves, requeues itself and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmit.config import dump_config
from tests.training.ranks import assert_same_losses, free_port, run_ranks
from tests.training.tiny import altered, config, metrics, stage

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "configs/launch"
BOTH = {"projector": {"lr": 1e-3}, "language": {"lr": 1e-3}}

SRUN = """#!{python}
import os, signal, subprocess, sys
tasks = []
for rank in range(2):
    own = dict(SLURM_PROCID=str(rank), SLURM_LOCALID="0", SLURM_NTASKS="2", SLURM_NNODES="2")
    tasks.append(subprocess.Popen(sys.argv[1:], env=os.environ | own))
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
open("srun.pid", "w").write(str(os.getpid()))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> scontrol.txt; fi
"""
MMIT = """#!/bin/bash
exec {python} -m mmit "$@"
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment in which `srun` starts two processes here, and `scontrol` writes down what it is asked."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "mmit": MMIT}.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text.format(python=sys.executable) if "{python}" in text else text, encoding="utf-8")
        file.chmod(0o755)
    settings = {"SLURM_JOB_ID": str(free_port() - 20000 if free_port() > 20000 else 7), "SLURM_JOB_NODELIST": "here"}
    settings |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    return os.environ | settings | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


@pytest.mark.slow
def test_a_job_told_to_stop_saves_requeues_itself_and_goes_on(
    cluster: dict[str, str], tmp_path: Path, data: Path
) -> None:
    wanted = config(tmp_path / "run", stage("s", data, BOTH, steps=60, row_tokens=200), save={"every": 500})
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_config(wanted), encoding="utf-8")
    command = ["bash", str(LAUNCH / "slurm.sbatch"), str(file), "parallel=fsdp"]
    job = subprocess.Popen(command, env=cluster, cwd=tmp_path)
    limit = time.monotonic() + 200
    while not (tmp_path / "run/metrics.jsonl").exists() or len(metrics(tmp_path / "run")) < 2:
        assert time.monotonic() < limit
        assert job.poll() is None
        time.sleep(0.01)
    os.kill(int((tmp_path / "srun.pid").read_text(encoding="utf-8")), signal.SIGUSR1)
    assert job.wait(100) == 75
    assert (tmp_path / "scontrol.txt").read_text(encoding="utf-8").split() == ["requeue", cluster["SLURM_JOB_ID"]]
    stopped = len(metrics(tmp_path / "run"))
    assert stopped < 60
    assert subprocess.run(command, env=cluster, cwd=tmp_path, timeout=200, check=False).returncode == 0
    assert len(metrics(tmp_path / "run")) == 60, "no step was computed twice"
    straight = run_ranks(altered(wanted, tmp_path / "straight", parallel="fsdp"), 2)
    assert_same_losses(straight, tmp_path / "run", relative=1e-12)


def test_launch_files_are_sound_shell() -> None:
    for file in ("slurm.sbatch", "two_machines.sh"):
        subprocess.run(["bash", "-n", str(LAUNCH / file)], check=True)
