"""Laws of ranks: however many compute a step, and however the model lies on them, it is the same step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from mmit.config import Config, dump_config
from mmit.data.shards import write_shards
from mmit.model.vlm import VLM
from mmit.training import parallel
from tests.training.ranks import assert_same_losses, ended_ranks, free_port, run_ranks, start_ranks
from tests.training.test_resume import OFTEN, wait_for_steps
from tests.training.tiny import (
    altered,
    assembled,
    config,
    ended,
    metrics,
    opened,
    pictured,
    run,
    said,
    shards,
    stage,
    start,
    written,
)

PROJECTOR = {"projector": {"lr": 1e-3}}
BOTH = PROJECTOR | {"language": {"lr": 1e-3}}
ALL = BOTH | {"vision": {"lr": 1e-4}}
LORA = PROJECTOR | {"language": {"lr": 1e-3, "lora": {"rank": 4, "alpha": 8}}}
TRAIN = {"all": ALL, "lora": LORA}
HELD_OUT = {"holdout": {"fraction": 0.2, "by": "sample"}, "every": 3}


def two_stages(output: Path, data: Path, name: str, *, checkpointing: bool = False, **changes: Any) -> Config:
    """Alignment, then what `name` trains, with several micro-steps a step, in fp64."""
    settings = {"gradient_checkpointing": checkpointing, "row_tokens": 200}
    stages = [
        stage("align", data, PROJECTOR, steps=3, **settings),
        stage("sft", data, TRAIN[name], steps=5, **settings),
    ]
    return config(output, *stages, **{"precision": "fp64", "eval": HELD_OUT} | changes)


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Path]:
    """The same runs by one rank."""
    return {name: run(two_stages(tmp_path_factory.mktemp(name) / "run", data, name)) for name in TRAIN}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", TRAIN)
def test_two_ranks_are_one(
    name: str, how: str, checkpointing: bool, by_one: dict[str, Path], tmp_path: Path, data: Path
) -> None:
    wanted = two_stages(tmp_path / "run", data, name, checkpointing=checkpointing, parallel=how)
    assert_same_losses(by_one[name], run_ranks(wanted, 2))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp", "hsdp"])
@pytest.mark.parametrize("name", TRAIN)
def test_four_ranks_are_one(name: str, how: str, by_one: dict[str, Path], tmp_path: Path, data: Path) -> None:
    wanted = two_stages(tmp_path / "run", data, name, parallel=how)
    assert_same_losses(by_one[name], run_ranks(wanted, 4, LOCAL_WORLD_SIZE="2"))


def test_an_offloaded_model_takes_the_same_steps(by_one: dict[str, Path], tmp_path: Path, data: Path) -> None:
    wanted = two_stages(tmp_path / "run", data, "all", parallel="fsdp", offload=True)
    assert_same_losses(by_one["all"], run_ranks(wanted, 2))


def test_ranks_may_have_other_numbers_of_workers(by_one: dict[str, Path], tmp_path: Path, data: Path) -> None:
    wanted = two_stages(tmp_path / "run", data, "all")
    assert_same_losses(by_one["all"], run_ranks(wanted, 2, workers={0: 2, 1: 0}))


def test_the_first_rank_alone_tells_that_a_run_is_done(tmp_path: Path, texts: Path) -> None:
    """The others read final/ as well, which a node may not see yet, and failed a run that was done."""
    wanted = config(tmp_path / "run", stage("s", texts, {"language": {"lr": 1e-3}}, steps=2), vision=None)
    run_ranks(wanted, 2)
    assert said(wanted).count("done: ") == 1


@pytest.mark.parametrize("name", TRAIN)
def test_under_fsdp_every_trained_tensor_and_moment_is_a_shard(
    name: str, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread = parallel.spread

    def recorded(vlm: VLM, how: Any, accelerator: Accelerator, *, offload: bool) -> nn.Module:
        model = spread(vlm, how, accelerator, offload=offload)
        rank = accelerator.process_index
        facts = {
            key: [isinstance(p, DTensor), p.to_local().numel() if isinstance(p, DTensor) else p.numel(), p.numel()]
            for key, p in model.named_parameters()
        }
        (tmp_path / f"rank{rank}.json").write_text(json.dumps(facts), encoding="utf-8")
        return model

    step = torch.optim.AdamW.step

    def checked(optimizer: torch.optim.AdamW, closure: Any = None) -> Any:
        result = step(optimizer, closure)
        moments = [value for s in optimizer.state.values() for key, value in s.items() if key.startswith("exp_avg")]
        assert moments
        assert all(isinstance(moment, DTensor) for moment in moments)
        return result

    monkeypatch.setattr(parallel, "spread", recorded)
    monkeypatch.setattr(torch.optim.AdamW, "step", checked)
    only = stage("s", data, TRAIN[name], steps=2)
    run_ranks(config(tmp_path / "run", only, parallel="fsdp"), 2)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    frozen_tower = [key for key in first if key.startswith("vision.")] if name == "lora" else []
    for key, (is_shard, size, whole) in first.items():
        assert is_shard == (key not in frozen_tower), key
        if is_shard:
            assert size + second[key][1] == whole
            assert size < whole or whole == 1, key


# Pictures here, text there ----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_rank_without_pictures_neither_hangs_nor_changes_the_loss(how: str, tmp_path: Path) -> None:
    samples = [pictured(number) if number % 6 == 0 else written(number) for number in range(24)]
    folder = shards(tmp_path / "data", samples)

    def wanted(name: str, **changes: Any) -> Config:
        settings = {"batch_size": 3, "row_tokens": 200}
        stages = [stage("align", folder, PROJECTOR, **settings), stage("sft", folder, BOTH, **settings)]
        return config(tmp_path / name, *stages, precision="fp64", **changes)

    found = wanted("looked")
    shown = [
        [tuple(len(row.pixels) for row in data.training[step].rows) for data in both]
        for both in [[opened(found, assembled(found), rank=rank, ranks=2) for rank in (0, 1)]]
        for step in range(both[0].total)
    ]
    assert any(bool(sum(one)) != bool(sum(other)) for one, other in shown), "one rank sees, the other does not"
    assert any(not sum(one) and not sum(other) for one, other in shown), "none sees"
    assert_same_losses(run(wanted("one")), run_ranks(wanted("two", parallel=how), 2))


# Going on with other ranks ----------------------------------------------------------------------


def interrupted(wanted: Config, ranks: int, steps: int) -> None:
    """Stops the run by a signal to its last rank alone."""
    processes = [start(wanted)] if ranks == 1 else start_ranks(wanted, ranks)
    wait_for_steps(wanted, processes[0], steps)
    os.kill(processes[-1], signal.SIGTERM)
    assert ended_ranks(processes) == [75] * ranks, said(wanted)


RESHARDED = [
    ("ddp", 2, "ddp", 1),
    ("fsdp", 2, "ddp", 1),
    ("ddp", 1, "fsdp", 2),
]
RESHARDED_MORE = [("fsdp", 2, "fsdp", 4), ("fsdp", 4, "ddp", 2), ("ddp", 1, "fsdp", 4), ("fsdp", 2, "ddp", 2)]


@pytest.mark.parametrize("name", TRAIN)
@pytest.mark.parametrize(
    ("how", "ranks", "then_how", "then_ranks"),
    [*RESHARDED, *(pytest.param(*case, marks=pytest.mark.slow) for case in RESHARDED_MORE)],
)
def test_a_run_goes_on_with_other_ranks(
    name: str, how: str, ranks: int, then_how: str, then_ranks: int, by_one: dict[str, Path], tmp_path: Path, data: Path
) -> None:
    wanted = two_stages(tmp_path / "run", data, name, parallel=how, save=OFTEN)
    interrupted(wanted, ranks, 5)
    assert len(metrics(tmp_path / "run")) < 8
    run_ranks(altered(wanted, tmp_path / "run", parallel=then_how), then_ranks)
    assert "going on after step" in said(wanted)
    assert_same_losses(by_one[name], tmp_path / "run")


def test_when_a_rank_is_killed_the_other_ends_and_the_run_goes_on(tmp_path: Path, data: Path) -> None:
    def wanted(name: str) -> Config:
        return config(tmp_path / name, stage("s", data, BOTH, steps=30, row_tokens=200), save={"every": 2})

    again = wanted("again")
    processes = start_ranks(again, 2)
    wait_for_steps(again, processes[0], 5)
    os.kill(processes[1], signal.SIGKILL)
    codes = ended_ranks(processes, seconds=10)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0
    run_ranks(again, 2)
    assert_same_losses(run_ranks(wanted("straight"), 2), tmp_path / "again", relative=0)


def test_killed_with_two_ranks_of_three_workers_it_goes_on_with_one_of_none(
    by_one: dict[str, Path], tmp_path: Path, data: Path
) -> None:
    wanted = two_stages(tmp_path / "run", data, "all", save=OFTEN)
    processes = start_ranks(wanted, 2, workers={0: 3, 1: 3})
    wait_for_steps(wanted, processes[0], 5)
    for process in processes:
        os.kill(process, signal.SIGKILL)
    assert ended_ranks(processes) == [-signal.SIGKILL] * 2
    run(wanted)
    assert_same_losses(by_one["all"], tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(23,), (5, 50, 500)])
def test_shards_fewer_than_workers_and_of_unequal_sizes_make_the_same_steps(
    sizes: tuple[int, ...], tmp_path: Path
) -> None:
    folders = []
    for count in sizes:
        samples = [written(number) for number in range(count)]
        folders.append(write_shards(samples, tmp_path / f"data{count}", samples_per_shard=1000).folder)

    def wanted(name: str) -> Config:
        only = stage("s", folders, {"language": {"lr": 1e-3}}, batch_size=16, steps=12)
        return config(tmp_path / name, only, vision=None, precision="fp64")

    one = run(wanted("one"))
    assert_same_losses(one, run_ranks(wanted("two"), 2, workers={0: 4, 1: 4}))


# Launchers --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_usual_launchers_start_it(launcher: str, by_one: dict[str, Path], tmp_path: Path, data: Path) -> None:
    wanted = two_stages(tmp_path / "run", data, "all", parallel="fsdp")
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(wanted), encoding="utf-8")
    port = str(free_port())
    commands = {
        "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "-m", "mmit"],
        "accelerate": [
            *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
            *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port, "-m", "mmit"),
        ],
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *commands[launcher], "train", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_losses(by_one["all"], tmp_path / "run")


def test_fsdp_without_ranks_is_refused_with_the_command_to_use(tmp_path: Path, texts: Path) -> None:
    wanted = config(tmp_path / "run", stage("s", texts, {"language": {"lr": 1e-3}}), vision=None, parallel="fsdp")
    assert ended(start(wanted)) == 2
    assert "needs ranks; start with torchrun" in said(wanted)
