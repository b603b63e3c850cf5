"""What only a GPU would show, held on CPUs."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmit.api import train
from mmit.config import ConfigError, load_config
from mmit.inference.generate import load
from mmit.model.build import set_trained
from mmit.training import loop, parallel
from mmit.training import stage as running
from mmit.training.stage import RunningStage, dtypes
from tests.model.test_build import with_folders
from tests.training.ranks import assert_same_losses, run_ranks
from tests.training.tiny import altered, assembled, config, ended, mixed, run, said, shards, stage, start

BOTH = {"projector": {"lr": 1e-3}, "language": {"lr": 1e-3}}


def gpu(monkeypatch: pytest.MonkeyPatch, *, has_bf16: bool) -> None:
    """As on a machine with a GPU, which has bf16 or only emulates it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation
    )


def precisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str) -> tuple[str, torch.dtype, torch.dtype]:
    """Of the computation, and of trained and frozen parameters."""
    monkeypatch.setattr(parallel, "Accelerator", lambda **given: SimpleNamespace(device=torch.device("cuda"), **given))
    run = config(tmp_path / "run", stage("s", tmp_path, {"language": {"lr": 1e-3}}), vision=None)
    run = altered(run, tmp_path / "run", precision=wanted, device="auto")
    accelerator: Any = parallel.start(run)
    return accelerator.mixed_precision, *dtypes(run, accelerator)


@pytest.mark.parametrize(
    ("has_bf16", "wanted", "expected"),
    [
        (True, "auto", ("bf16", torch.float32, torch.bfloat16)),
        (False, "auto", ("no", torch.float32, torch.float32)),
        (False, "bf16", ("bf16", torch.float32, torch.bfloat16)),
        (True, "fp32", ("no", torch.float32, torch.float32)),
    ],
)
def test_a_gpu_that_only_emulates_bf16_gets_it_if_it_is_asked_for(
    has_bf16: bool,
    wanted: str,
    expected: tuple[str, torch.dtype, torch.dtype],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu(monkeypatch, has_bf16=has_bf16)
    assert precisions(tmp_path, monkeypatch, wanted) == expected


def test_a_stage_that_has_ended_leaves_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next one has to fit beside it: weights, and twice as much again of moments."""
    before: list[weakref.ref[Any]] = []
    prepare = loop.prepare

    def watched(*arguments: Any) -> RunningStage:
        assert [found for reference in before if (found := reference()) is not None] == []
        gc.disable()  # it comes when it will
        at = prepare(*arguments)
        before.extend(weakref.ref(part) for part in (at.assembly.vlm, at.optimizer))
        return at

    monkeypatch.setattr(loop, "prepare", watched)
    data = shards(tmp_path / "data", mixed(10))
    run(config(tmp_path / "run", stage("a", data, BOTH, steps=1), stage("b", data, BOTH, steps=1)))


ADAPTED = {"projector": {"lr": 1e-3}, "language": {"lr": 1e-3, "lora": {"rank": 4, "alpha": 8}}}


@pytest.mark.parametrize("trained", [ADAPTED, {"projector": {"lr": 1e-3}}, BOTH], ids=["lora", "align", "whole"])
def test_the_precisions_of_a_gpu_are_sharded_as_they_are_replicated(
    trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained parameters in fp32 beside frozen ones in bf16, gathered in bf16 and their gradients summed in fp32."""
    gathered = parallel.MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    monkeypatch.setattr(parallel, "MixedPrecisionPolicy", lambda: gathered)
    monkeypatch.setattr(running, "dtypes", lambda *_: (torch.float32, torch.bfloat16))
    data = shards(tmp_path / "data", mixed(20))
    only = stage("s", data, trained, steps=2, gradient_checkpointing=True)
    # From files: what the seed has drawn is kept whole in every checkpoint, and so stays fp32 where it is frozen.
    settings: dict[str, Any] = {"precision": "bf16", "eval": {"holdout": {"fraction": 0.2, "by": "sample"}}}
    wanted = with_folders(tmp_path / "ddp", only, **settings)
    frozen = assembled(wanted, dtype=torch.float32)
    set_trained(frozen, wanted.stages[0].train, trained_dtype=torch.float32, frozen_dtype=torch.bfloat16)
    found = {parameter.dtype for parameter in frozen.vlm.parameters()}
    assert found == {torch.float32, torch.bfloat16}
    one = run_ranks(wanted, 1)
    two = run_ranks(altered(wanted, tmp_path / "fsdp", parallel="fsdp"), 2)
    assert_same_losses(one, two, relative=0.02)


# Ranks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("local_rank", "gpus", "expected"), [("3", 8, 3), ("3", 1, 0)], ids=["all GPUs are seen", "each its own"]
)
def test_a_rank_takes_its_own_gpu_and_a_group_that_sums_on_cpus_too(
    local_rank: str, gpus: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Any] = []
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(parallel, "rendezvous", lambda *_, **__: iter([(None, 3, 8)]))
    monkeypatch.setattr(parallel, "PrefixStore", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: taken.append(backend))
    parallel._meet(on_cuda=True)
    assert taken == [expected, "cpu:gloo,cuda:nccl"]


def test_one_rank_of_torchrun_has_a_group_that_sums_on_cpus_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `parallel: fsdp` with `offload` needs it on one GPU."""
    joined: list[str] = []
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(parallel, "rendezvous", lambda *_, **__: iter([(None, 0, 1)]))
    monkeypatch.setattr(parallel, "PrefixStore", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: joined.append(backend))
    parallel._meet(on_cuda=True)
    assert joined == ["cpu:gloo,cuda:nccl"]


def test_ranks_that_do_not_know_their_place_on_the_machine_are_no_runs_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ConfigError, match="LOCAL_RANK, the number of the process on its machine, is not"):
        parallel._meet(on_cuda=True)


# Attention -------------------------------------------------------------------------------


def test_no_row_is_computed_by_attention_of_cudnn(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        asked.append(torch.backends.cuda.cudnn_sdp_enabled())
        return plain(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    train(config(tmp_path / "run", stage("s", shards(tmp_path / "data", mixed(5)), BOTH, steps=1)))
    trained = len(asked)
    assert trained
    load(tiny_run, device="cpu", cache=tmp_path).answer("what?", max_new_tokens=2)
    assert len(asked) > trained
    assert not any(asked)
    assert torch.backends.cuda.cudnn_sdp_enabled()


# Memory ----------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_the_device_is_told_with_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    wanted = config(tmp_path / "run", stage("s", shards(tmp_path / "data", mixed(5)), BOTH, steps=1))
    monkeypatch.setattr(parallel, "spread", full)
    assert ended(start(wanted)) == 2
    assert "stage s: out of memory beside the rows" in said(wanted)
    for setting in ("parallel=fsdp", "stages.s.train.language.lora={rank: 64", "a smaller model.language"):
        assert setting in said(wanted)
    assert "Traceback" not in said(wanted)


def test_recipes_that_train_all_of_7b_share_it_out() -> None:
    """16 bytes a parameter, in fp32 with its gradient and moments, are more than 80 GB."""
    files = sorted((Path(__file__).parents[2] / "configs").glob("*7b*.yaml"))
    assert files
    for file in files:
        recipe = load_config(file)
        whole = [s for s in recipe.stages if s.train.language is not None and s.train.language.lora is None]
        assert not whole or recipe.parallel == "fsdp", file


# What is told ----------------------------------------------------------------------------


def test_a_run_says_and_keeps_what_it_is_computed_on(tmp_path: Path) -> None:
    wanted = config(tmp_path / "run", stage("s", shards(tmp_path / "data", mixed(5)), BOTH, steps=1))
    run(wanted)
    assert "CPU, fp32, attention sdpa" in said(wanted)
    assert json.loads((tmp_path / "run/environment.json").read_text(encoding="utf-8"))["computed_on"] == "CPU, fp32"


@pytest.mark.parametrize(
    ("device", "told"),
    [("gpu", "device: gpu is none; write auto"), ("cuda:2", "cuda:2, but torch sees 2 GPUs, counted from 0")],
)
def test_an_answer_on_a_device_that_is_not_there_is_refused(
    device: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, has_bf16=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=told):
        load(tmp_path, device=device)


def test_an_answer_that_memory_cannot_hold_says_what_would(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_run, device="cpu", cache=tmp_path)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(model.vlm.language, "generate", full)
    with pytest.raises(ConfigError, match=r"full \(CUDA out of memory\); ask fewer questions at a time"):
        model.answer("what?")
