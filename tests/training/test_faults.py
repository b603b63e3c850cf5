"""Laws of faults: named, counted, survived where they can be, and never a wrong number."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from mmit.api import replay
from mmit.config import Config, dump_config
from mmit.data.images import decode
from mmit.data.packing import Row
from mmit.data.sample import Sample, SampleError
from mmit.model.vlm import VLM
from mmit.training import checkpoint, due, loop, state
from mmit.training.stage import RunningStage
from tests.data.pictures import picture
from tests.training.ranks import assert_same_losses, ended_ranks, run_ranks, start_ranks
from tests.training.test_resume import OFTEN, assert_same_run, wait_for_steps
from tests.training.tiny import (
    altered,
    config,
    ended,
    metrics,
    pictured,
    run,
    said,
    shards,
    stage,
    start,
    written,
)

LANGUAGE = {"language": {"lr": 1e-3}}
BOTH = {"projector": {"lr": 1e-3}, "language": {"lr": 1e-3}}


def alone(number: int) -> Sample:
    """A sample whose picture no other shows."""
    return replace(pictured(3 * number), key=f"p{number:04d}", images=(picture(13, 12, seed=100 + number),))


def skipped(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]


# Data -------------------------------------------------------------------------------------------


@pytest.fixture
def undecodable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shards of which the pictures of three samples cannot be decoded, which only the rank that decodes them sees."""
    folder = shards(tmp_path / "data", [alone(number) for number in range(24)])

    def fails(data: bytes, where: str, **options: Any) -> Any:
        if where.rpartition(":")[2] in ("p0003", "p0010", "p0017"):
            raise SampleError(f"{where}: not a picture")
        return decode(data, where, **options)

    monkeypatch.setattr("mmit.data.loader.decode", fails)
    return folder


def test_pictures_that_one_rank_alone_cannot_decode_are_counted_and_told_by_the_first(
    undecodable: Path, tmp_path: Path
) -> None:
    def wanted(name: str) -> Config:
        settings = {"on_bad_sample": "skip", "max_skipped": 0.2, "row_tokens": 200}
        return config(tmp_path / name, stage("s", undecodable, BOTH, **settings), precision="fp64")

    one, two = run(wanted("one")), run_ranks(wanted("two"), 2)
    assert_same_losses(one, two)
    keys = [entry["sample"].rpartition(":")[2] for entry in skipped(two)]
    assert sorted(keys) == ["p0003", "p0010", "p0017"]
    assert sorted(map(str, skipped(one))) == sorted(map(str, skipped(two)))
    lines = metrics(two)
    assert sum(line["skipped"] for line in lines) == 3
    assert sum(line["samples"] for line in lines) == 21


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("part", ["projector", "vision"])
def test_a_part_that_learns_from_pictures_alone_is_refused_where_there_are_none(
    part: str, later: bool, tmp_path: Path, data: Path, texts: Path
) -> None:
    """Such a stage ran to its end, and the part was what it had been."""
    blind = stage("blind", texts, {part: {"lr": 1e-3}} | LANGUAGE, steps=2)
    stages = [stage("seeing", data, BOTH, steps=2), blind] if later else [blind]
    wanted = config(tmp_path / "run", *stages)
    assert ended(start(wanted)) == 2
    assert f"stages.blind.train: {part} cannot learn, since no sample of the stage shows a picture" in said(wanted)
    assert not (tmp_path / "run/metrics.jsonl").exists()


LATER = {
    "shards": ({"data": [{"shards": "nowhere"}]}, 2, "nowhere: no such folder"),
    "chat": ({"chat": "llama_3"}, 2, "the format llama_3 needs the tokens"),
    "targets": (
        {"train": {"language": {"lr": 1e-3, "lora": {"targets": ["v_proj", "q_pro"]}}}},
        2,
        "stages.later.train.language.lora.targets: 'q_pro' names no layer of the language model; "
        "did you mean 'q_proj'?",
    ),
    "max_tokens": ({"max_tokens": 3}, 2, "max_tokens: 3 leaves nothing of source"),
    "a sample": ({"chat": "plain"}, 3, "the chat format plain writes captions of pictures"),
}


@pytest.mark.parametrize("fault", LATER)
def test_a_fault_of_a_later_stage_is_told_before_the_first_one_trains(fault: str, tmp_path: Path, texts: Path) -> None:
    """It was told once the stages before it had trained, for hours."""
    changes, code, told = LATER[fault]
    first, later = stage("first", texts, LANGUAGE, steps=2), stage("later", texts, LANGUAGE, steps=2) | changes
    wanted = config(tmp_path / "run", first, later, vision=None)
    assert ended(start(wanted)) == code
    assert told in said(wanted)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_held_out_sample_that_cannot_be_read_is_told_and_left_out_of_every_evaluation_alike(
    undecodable: Path, data: Path, tmp_path: Path
) -> None:
    """They were left out of loss and answers without a word."""

    def wanted(name: str) -> Config:
        only = stage("s", data, BOTH, on_bad_sample="skip", steps=6, row_tokens=200)
        evaluated = {"data": [{"shards": str(undecodable)}], "every": 3, "generate": 30, "max_new_tokens": 2}
        return config(tmp_path / name, only, precision="fp64", eval=evaluated)

    one, two = run(wanted("one")), run_ranks(wanted("two"), 2)
    assert_same_losses(one, two)
    first, last = metrics(one, evaluations=True)
    assert (first["skipped"], last["skipped"]) == (3, 3)
    assert first["supervised"] == last["supervised"]
    assert first["answered"] == last["answered"] == 21
    lines = [line for line in skipped(one) if line["held_out"]]
    told = [(line["step"], line["sample"].rpartition(":")[2], line["kind"]) for line in lines]
    assert told == [(step, key, "bad") for step in (3, 6) for key in ("p0003", "p0010", "p0017")]
    assert [line for line in skipped(two) if line["held_out"]] == lines
    assert "step 3: 3 held-out samples are left out, see skipped.jsonl" in said(wanted("one"))
    assert sum(line["skipped"] for line in metrics(one)) == len(skipped(one)) - len(lines)


def test_held_out_samples_of_which_none_can_be_read_have_no_loss(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was 0, the best there is."""
    folder = shards(tmp_path / "held", [replace(alone(number), key=f"x{number}") for number in range(4)])

    def fails(data: bytes, where: str, **options: Any) -> Any:
        if ":x" in where:
            raise SampleError(f"{where}: not a picture")
        return decode(data, where, **options)

    monkeypatch.setattr("mmit.data.loader.decode", fails)
    only = stage("s", data, BOTH, on_bad_sample="skip", steps=3)
    evaluated = {"data": [{"shards": str(folder)}], "every": 3, "keep_best": True}
    folder = run(config(tmp_path / "run", only, eval=evaluated))
    (line,) = metrics(folder, evaluations=True)
    assert (line["loss"], line["held_out"], line["supervised"]) == (None, {}, 0)
    assert not (folder / "best").exists()


def test_a_bad_sample_in_the_hands_of_a_worker_ends_the_process_and_all_its_workers(tmp_path: Path) -> None:
    """In a process of its own: what tests fork does not end as a program does, which first waits for its workers."""
    whole = picture(13, 12, seed=1)
    assert whole.data is not None
    data = whole.data[: len(whole.data) // 2]
    bad = replace(whole, data=data, sha256=hashlib.sha256(data).hexdigest())
    samples = [alone(number) if number != 7 else replace(alone(7), images=(bad,)) for number in range(12)]
    wanted = config(tmp_path / "run", stage("s", shards(tmp_path / "data", samples), BOTH, epochs=3), workers=2)
    (tmp_path / "run.yaml").write_text(dump_config(wanted), encoding="utf-8")
    command = [sys.executable, "-m", "mmit", "train", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 3, done.stderr
    assert "p0007" in done.stderr
    assert "Traceback" not in done.stderr


def test_too_many_bad_samples_stop_the_run_with_code_3_on_every_rank(tmp_path: Path, undecodable: Path) -> None:
    only = stage("s", undecodable, BOTH, on_bad_sample="skip", epochs=6)
    wanted = config(tmp_path / "run", only, save={"every": 15})
    assert ended_ranks(start_ranks(wanted, 2)) == [3, 3]
    assert "samples could not be read" in said(wanted)
    assert "stages.s.max_skipped" in said(wanted)
    seen = sum(line["samples"] + line["skipped"] for line in metrics(tmp_path / "run"))
    assert 95 <= seen <= 105, "the share counts from the 100th sample on"
    assert len(skipped(tmp_path / "run")) >= 12
    run(config(tmp_path / "run", only | {"max_skipped": 0.5}))


def test_a_hundred_bad_samples_in_a_row_stop_the_run_whatever_the_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shards(tmp_path / "data", [alone(number) for number in range(24)])

    def fails(data: bytes, where: str, **options: Any) -> Any:
        raise SampleError(f"{where}: not a picture")

    monkeypatch.setattr("mmit.data.loader.decode", fails)
    only = stage("s", folder, BOTH, on_bad_sample="skip", max_skipped=1, epochs=20)
    wanted = config(tmp_path / "run", only)
    assert ended(start(wanted)) == 3
    assert re.search(r"(\d+) of \1 samples could not be read, 10[0-4] in a row", said(wanted))


def test_the_ledger_and_its_counts_are_exact_after_signals_and_a_kill(
    tmp_path: Path, undecodable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wanted(name: str) -> Config:
        settings = {"on_bad_sample": "skip", "max_skipped": 0.2, "epochs": 2}
        evaluated = {"data": [{"shards": str(undecodable)}], "every": 3}
        only = stage("s", undecodable, BOTH, **settings)
        return config(tmp_path / name, only, save={"every": 4}, eval=evaluated)

    straight, again = run(wanted("straight")), wanted("again")
    process = start(again)
    wait_for_steps(again, process, 7)
    os.kill(process, signal.SIGKILL)
    ended(process)
    gradients = loop._gradients

    def stopped(at: RunningStage, *arguments: Any) -> Any:
        if at.progress.done == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return gradients(at, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_gradients", stopped)
        for _ in range(2):
            assert ended(start(again)) == 75, said(again)
    run(again)
    assert skipped(tmp_path / "again") == skipped(straight)
    assert [line["held_out"] for line in skipped(straight)].count(False) == 6
    assert [line["step"] for line in skipped(straight) if line["held_out"]] == [3] * 3 + [6] * 3 + [9] * 3 + [10] * 3
    last = "checkpoints/s-step-10/state.json"
    assert (tmp_path / "again" / last).read_bytes() == (straight / last).read_bytes()


# Signals ----------------------------------------------------------------------------------------


def slowly(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, marker: Path) -> None:
    """Lets `target.name` leave `marker` and then take its time, the first time it is called."""
    original = getattr(target, name)

    def slow(*arguments: Any, **options: Any) -> Any:
        if not marker.exists():
            marker.touch()
            time.sleep(30)
        return original(*arguments, **options)

    monkeypatch.setattr(target, name, slow)


def wait_for(file: Path) -> None:
    limit = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_while_the_model_is_loaded_ends_it_at_once(
    number: signal.Signals, tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(tmp_path / "run", stage("s", texts, LANGUAGE), vision=None)
    slowly(monkeypatch, state, "start", tmp_path / "loading")
    process = start(wanted)
    wait_for(tmp_path / "loading")
    before = time.monotonic()
    os.kill(process, number)
    assert ended(process) == 75, said(wanted)
    assert time.monotonic() - before < 5
    assert "nothing is lost" in said(wanted)
    assert ended(start(wanted)) == 0, said(wanted)


def test_a_signal_while_data_is_converted_ends_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = stage("s", tmp_path, LANGUAGE, steps=2) | {"data": [{"synthetic": "captions", "options": {"count": 20}}]}
    wanted = config(tmp_path / "run", only)
    slowly(monkeypatch, __import__("data_tools.convert").convert, "converted", tmp_path / "converting")
    process = start(wanted)
    wait_for(tmp_path / "converting")
    os.kill(process, signal.SIGTERM)
    assert ended(process) == 75, said(wanted)


def test_an_evaluation_that_is_interrupted_is_made_after_the_resume_exactly(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wanted(name: str) -> Config:
        held_out = {"holdout": {"fraction": 0.4, "by": "sample"}, "every": 2}
        return config(tmp_path / name, stage("s", data, BOTH, steps=4, row_tokens=200), eval=held_out)

    straight, again = run(wanted("straight")), wanted("again")
    for steps in (2, 4):  # within the stage, and in the evaluation that ends it
        with monkeypatch.context() as patched:
            evaluate = due._evaluate

            def stopped(at: RunningStage, evaluate: Any = evaluate, steps: int = steps) -> Any:
                if at.progress.done == steps:
                    os.kill(os.getpid(), signal.SIGTERM)
                return evaluate(at)

            patched.setattr(due, "_evaluate", stopped)
            assert ended(start(again)) == 75, said(again)
        assert f"stopped after step {steps}" in said(again)
    assert ended(start(again)) == 0, said(again)
    assert [line["step"] for line in metrics(tmp_path / "again", evaluations=True)] == [2, 4]
    assert [line["step"] for line in metrics(tmp_path / "again")] == [1, 2, 3, 4]
    assert_same_run(straight, tmp_path / "again")


@pytest.mark.parametrize("moment", ["loading", "training", "evaluation"])
def test_a_signal_to_one_of_two_ranks_ends_both_and_loses_no_step(
    moment: str, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wanted(name: str) -> Config:
        held_out = {"holdout": {"fraction": 0.4, "by": "sample"}, "every": 2}
        return config(tmp_path / name, stage("s", data, BOTH, steps=4, row_tokens=200), eval=held_out)

    places = {"loading": (loop, "prepare"), "training": (loop, "_gradients"), "evaluation": (due, "_evaluate")}
    again, (module, name) = wanted("again"), places[moment]
    with monkeypatch.context() as patched:
        original = getattr(module, name)

        def stopped(*arguments: Any) -> Any:
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments)

        patched.setattr(module, name, stopped)
        assert ended_ranks(start_ranks(again, 2)) == [75, 75], said(again)
    steps = {"loading": 0, "training": 0, "evaluation": 2}[moment]
    when = "when all ranks have loaded" if moment == "loading" else "as soon as the rows in hand are computed"
    assert said(again).count(f"rank 1: SIGTERM: the run stops {when}") == 1
    assert (tmp_path / "again/checkpoints" / f"s-step-{steps}").is_dir() == (steps > 0)
    run_ranks(again, 2)
    assert len(metrics(tmp_path / "again")) == 4, "no step was computed twice"
    assert_same_losses(run_ranks(wanted("straight"), 2), tmp_path / "again", relative=0)


def test_a_signal_to_one_of_two_ranks_before_they_have_met_ends_both(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(tmp_path / "run", stage("s", texts, LANGUAGE), vision=None)

    def early(*arguments: Any) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return checked(*arguments)

    from mmit import api

    checked = api.check_names
    monkeypatch.setattr(api, "check_names", early)
    assert ended_ranks(start_ranks(wanted, 2), seconds=60) == [75, 75], said(wanted)


def test_under_torchrun_an_interrupted_run_leaves_a_note_and_ends_well(tmp_path: Path, texts: Path) -> None:
    wanted = config(tmp_path / "run", stage("s", texts, LANGUAGE, steps=3000), vision=None)
    processes = start_ranks(wanted, 2, TORCHELASTIC_RUN_ID="none")
    wait_for_steps(wanted, processes[0], 2)
    for process in processes:  # as a terminal and torchrun do together
        os.kill(process, signal.SIGINT)
        os.kill(process, signal.SIGINT)
    assert ended_ranks(processes) == [0, 0], said(wanted)
    note = (tmp_path / "run/PREEMPTED").read_text(encoding="utf-8")
    assert "the same command goes on from there" in note
    process = start(wanted)
    wait_for_steps(wanted, process, len(metrics(tmp_path / "run")) + 1)
    assert not (tmp_path / "run/PREEMPTED").exists()
    os.kill(process, signal.SIGKILL)
    ended(process)


def test_a_second_signal_leaves_at_once(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = config(tmp_path / "run", stage("s", texts, LANGUAGE, steps=3), vision=None)
    slowly(monkeypatch, loop, "_forward_backward", tmp_path / "slow")
    process = start(wanted)
    wait_for(tmp_path / "slow")
    os.kill(process, signal.SIGTERM)
    time.sleep(0.3)
    os.kill(process, signal.SIGTERM)
    before = time.monotonic()
    assert ended(process) == 128 + signal.SIGTERM
    assert time.monotonic() - before < 5


# Numbers ----------------------------------------------------------------------------------------


def poisoned(monkeypatch: pytest.MonkeyPatch, keys: set[str]) -> None:
    """Makes the loss of rows with one of those samples NaN."""
    forward = VLM.forward

    def bad(vlm: VLM, row: Row, *, want: Literal["losses", "states", "scores"] = "losses") -> torch.Tensor:
        found = forward(vlm, row, want=want)
        names = {where.rpartition(":")[2] for where in row.samples}
        return found * math.nan if names & keys and want == "losses" else found

    monkeypatch.setattr(VLM, "forward", bad)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_is_not_finite_is_kept_and_can_be_repeated(
    ranks: int, tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(tmp_path / "run", stage("s", texts, LANGUAGE, row_tokens=200), vision=None)
    with monkeypatch.context() as patched:
        poisoned(patched, {"t0007"})
        if ranks == 1:
            assert ended(start(wanted)) == 3
        else:
            assert ended_ranks(start_ranks(wanted, 2)) == [3, 3]
        (folder,) = (tmp_path / "run").glob("fault-step-*")
        assert f"mmit replay {folder}" in said(wanted)
        fault = json.loads((folder / "fault.json").read_text(encoding="utf-8"))
        assert "t0007" in str(fault["samples"])
        told = list(replay(folder))
        assert any("losses of sample" in line and "t0007" in line for line in told), told
        assert any("gradient of language" in line for line in told), told
    assert all(tensor.isfinite().all() for tensor in checkpoint.load(folder).tensors().values())
    told = list(replay(folder))
    assert "everything is finite here" in told[-1]
    run(wanted)  # what was at fault is gone


def test_steps_that_are_not_finite_are_passed_over_only_as_often_in_a_row_as_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shards(tmp_path / "data", [written(number) for number in range(12)])
    only = stage("s", folder, LANGUAGE, batch_size=1, skip_nonfinite=1, max_tokens=100)

    def wanted(name: str, keys: set[str], **changes: Any) -> Config:
        poisoned(monkeypatch, keys)
        return config(tmp_path / name, only | changes, vision=None)

    passed = run(wanted("passed", {"t0003"}))
    lines = metrics(passed)
    assert [line["grad_norm"] for line in lines].count(None) == 1
    assert [line["loss"] for line in lines].count(None) == 1
    assert len(lines) == 12
    assert ended(start(wanted("stopped", {f"t{number:04d}" for number in range(12)}))) == 3
    assert len(metrics(tmp_path / "stopped")) == 1


def test_a_step_without_memory_names_its_samples_and_three_cheaper_settings(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(tmp_path / "run", stage("s", data, BOTH, steps=4), save=OFTEN)
    with monkeypatch.context() as patched:
        original, calls = loop._forward_backward, []

        def full(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(*arguments, **options)

        patched.setattr(loop, "_forward_backward", full)
        assert ended(start(wanted)) == 2
    assert "step 3: out of memory" in said(wanted)
    assert ".tar:" in said(wanted)
    for setting in ("row_tokens=512", "gradient_checkpointing=true", "row_images="):
        assert setting in said(wanted)
    assert "Traceback" not in said(wanted)
    run(wanted)
    assert len(metrics(tmp_path / "run")) == 4


def test_checking_memory_first_changes_no_number(tmp_path: Path, data: Path) -> None:
    from mmit.api import train

    plain = config(tmp_path / "plain", stage("s", data, BOTH, steps=3))
    checked = altered(plain, tmp_path / "checked")
    train(plain)
    train(checked, check_memory=True)
    assert_same_run(tmp_path / "plain", tmp_path / "checked")


# Disk -------------------------------------------------------------------------------------------


def failing_at(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> list[str]:
    """Makes the `number`-th call that changes a checkpoint's files do `action` first; lists all such calls."""
    calls: list[str] = []

    def watch(target: Any, name: str) -> None:
        original = getattr(target, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            place = str(arguments[0] if arguments else options)
            if (
                name in ("save_file", "_flushed_sha256", "_flush_folder")
                or "checkpoints" in place
                or "dir_fd" in options
            ):
                calls.append(f"{name} {Path(place).name}" if "/" in place else name)
                if len(calls) - 1 == number:
                    action()
            return original(*arguments, **options)

        monkeypatch.setattr(target, name, watched)

    for target, name in [
        *((os, name) for name in ("mkdir", "rename", "rmdir", "unlink", "fsync")),
        *((Path, name) for name in ("write_text",)),
        *((checkpoint, name) for name in ("save_file", "_flushed_sha256", "_flush_folder", "_write_shards")),
    ]:
        watch(target, name)
    return calls


def saved(folder: Path, step: int) -> None:
    from tests.training.test_checkpoint import save

    save(folder, step)
    checkpoint.prune(folder, "sft", step=step, keep=2)


def test_a_process_killed_at_any_write_of_a_checkpoint_leaves_one_that_loads(tmp_path: Path) -> None:
    """The third save, which also removes the first: killed before each call that changes the disk, in turn."""
    with pytest.MonkeyPatch.context() as patched:
        (tmp_path / "count/checkpoints").mkdir(parents=True)
        for step in (1, 2):
            saved(tmp_path / "count/checkpoints", step)
        calls = failing_at(patched, -1, lambda: None)
        saved(tmp_path / "count/checkpoints", 3)
    assert len(calls) >= 20, calls
    for number, call in enumerate(calls):
        folder = tmp_path / f"{number}/checkpoints"
        folder.mkdir(parents=True)
        for step in (1, 2):
            saved(folder, step)
        process = os.fork()
        if not process:
            with pytest.MonkeyPatch.context() as patched:
                failing_at(patched, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
                saved(folder, 3)
            os._exit(0)
        assert ended(process) == -signal.SIGKILL, call
        found = checkpoint.newest(folder, "sft")
        assert found is not None, call
        assert found.step in (2, 3), call
        found.tensors()
        saved(folder, 4)
        assert sorted(path.name for path in folder.iterdir())[-1] == "sft-step-4"
        assert not list(folder.glob("*.tmp"))


def test_a_step_saved_again_is_never_lost_to_a_kill(tmp_path: Path) -> None:
    """The only checkpoint, written once more: killed before each call that changes the disk, in turn."""
    number, codes = 0, [-signal.SIGKILL]
    while codes[-1]:
        folder = tmp_path / f"{number}/checkpoints"
        folder.mkdir(parents=True)
        saved(folder, 3)
        process = os.fork()
        if not process:
            with pytest.MonkeyPatch.context() as patched:
                failing_at(patched, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
                saved(folder, 3)
            os._exit(0)
        codes.append(ended(process))
        found = checkpoint.newest(folder, "sft")
        assert found is not None, number
        found.tensors()
        saved(folder, 4)
        assert not list(folder.glob("*.before"))
        number += 1
    assert number >= 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no disk of 3 MiB can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_costs_checkpoints_and_nothing_else(
    tmp_path: Path, small_disk: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full from step 3 to step 6: the saves between fail, training and metrics go on, later saves work again."""
    step = torch.optim.AdamW.step
    calls = []

    def filled(optimizer: torch.optim.AdamW, closure: Any = None) -> Any:
        calls.append(1)  # the first is of `_begin`
        if len(calls) == 4:
            with (small_disk / "filler").open("wb", buffering=0) as opened, suppress(OSError):
                while opened.write(bytes(4096)) == 4096:
                    pass
        if len(calls) == 7:
            (small_disk / "filler").unlink()
        return step(optimizer, closure)

    def wanted(output: Path) -> Config:
        cache = str(tmp_path / "cache")
        return config(output, stage("s", texts, LANGUAGE, steps=8), vision=None, save=OFTEN, cache=cache)

    straight = run(wanted(tmp_path / "straight"))
    monkeypatch.setattr(torch.optim.AdamW, "step", filled)
    full = wanted(small_disk / "run")
    assert ended(start(altered(full, small_disk / "run"))) == 0, said(full)
    for number in (3, 4, 5):
        assert f"s step {number}: not saved" in said(full)
    assert "s step 6: not saved" not in said(full)
    assert said(full).count("No space left") >= 3
    assert_same_run(straight, small_disk / "run")


@pytest.mark.parametrize("signalled", [False, True])
@pytest.mark.parametrize("what", ["a full disk", "a pipe that nobody reads"])
def test_a_log_that_cannot_be_written_costs_the_log_alone(
    what: str, signalled: bool, tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redirected to a disk that filled up, or through a `tee` that died, a run stopped, and a signal saved nothing."""
    step = torch.optim.AdamW.step
    calls = []

    def muted(optimizer: torch.optim.AdamW, closure: Any = None) -> Any:
        calls.append(1)  # the first is of `_begin`
        if len(calls) == 3:
            full = os.open("/dev/full", os.O_WRONLY)
            reader, writer = os.pipe()
            os.close(reader)
            for number in (1, 2):
                os.dup2(full if what == "a full disk" else writer, number)
            if signalled:
                os.kill(os.getpid(), signal.SIGTERM)
        return step(optimizer, closure)

    only = stage("s", texts, LANGUAGE, steps=4)
    wanted = config(
        tmp_path / "run", only, vision=None, eval={"holdout": {"fraction": 0.3, "by": "sample"}, "every": 1}
    )
    monkeypatch.setattr(torch.optim.AdamW, "step", muted)
    code = ended(start(wanted))
    assert [line["step"] for line in metrics(tmp_path / "run")] == ([1, 2] if signalled else [1, 2, 3, 4])
    assert list((tmp_path / "run/checkpoints").glob("s-step-2" if signalled else "s-step-4"))
    assert code == 75 if signalled else (tmp_path / "run/final").is_dir()


def test_a_disk_that_is_full_at_the_start_or_at_the_end_is_told_of(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "some/file")

    wanted = config(tmp_path / "run", stage("s", texts, LANGUAGE, steps=2), vision=None)
    for module, name in (("mmit.training.run", "write"), ("mmit.training.state", "_hand_over")):
        with monkeypatch.context() as patched:
            patched.setattr(f"{module}.{name}", full)
            assert ended(start(wanted)) == 2
        assert f"{tmp_path / 'run'}" in said(wanted).splitlines()[-1]
        assert "No space left" in said(wanted).splitlines()[-1]
    assert "Traceback" not in said(wanted)
    run(wanted)
    assert len(metrics(tmp_path / "run")) == 2


def test_an_output_that_is_a_file_is_told_of(tmp_path: Path, texts: Path) -> None:
    (tmp_path / "run").write_text("taken")
    wanted = config(tmp_path / "run", stage("s", texts, LANGUAGE, steps=2), vision=None)
    assert ended(start(wanted)) == 2
    assert f"output: {tmp_path / 'run'} cannot be written" in said(wanted)


def test_a_fault_that_cannot_be_kept_is_told_all_the_same(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    poisoned(monkeypatch, {"t0007"})
    monkeypatch.setattr(state, "write", full)
    wanted = config(tmp_path / "run", stage("s", texts, LANGUAGE), vision=None)
    assert ended(start(wanted)) == 3
    assert "loss or gradient is not finite" in said(wanted)
    assert "could not be kept ([Errno 28] No space left on device)" in said(wanted)


def test_a_run_stops_with_code_2_only_if_its_last_checkpoint_cannot_be_written(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(tmp_path / "run", stage("s", texts, LANGUAGE, steps=4), vision=None, save={"every": 2})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_flushed_sha256", full)
        assert ended(start(wanted)) == 2
    assert "s step 2: not saved" in said(wanted)
    assert "the last checkpoint of stage s could not be written" in said(wanted)
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
    run(wanted)


def test_a_disk_too_small_for_two_checkpoints_is_refused_before_step_0(
    tmp_path: Path, small_disk: Path, texts: Path
) -> None:
    large = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    wanted = config(
        small_disk / "run",
        stage("s", texts, LANGUAGE),
        vision=None,
        language=large | {"num_attention_heads": 4},
        cache=str(tmp_path / "cache"),
    )
    assert ended(start(wanted)) == 2
    assert re.search(r"has \d+\.\d MB free, and two checkpoints of stage s need \d+\.\d MB", said(wanted))


# The best ---------------------------------------------------------------------------------------


def test_the_checkpoint_of_least_held_out_loss_is_kept_also_over_a_kill(tmp_path: Path, texts: Path) -> None:
    def wanted(name: str) -> Config:
        held_out = {"holdout": {"fraction": 0.3, "by": "sample"}, "every": 2, "keep_best": True}
        only = stage("s", texts, {"language": {"lr": 0.05}}, steps=16, schedule="constant")
        return config(tmp_path / name, only, vision=None, eval=held_out, save={"every": 3, "keep": 1})

    straight, again = run(wanted("straight")), wanted("again")
    told = metrics(straight, evaluations=True)
    best = min(told, key=lambda line: line["loss"])["step"]
    assert best < 16, "the test shows nothing if the last is the best"
    assert sorted(folder.name for folder in (straight / "checkpoints").iterdir()) == sorted(
        {f"s-step-{best}", "s-step-16"}
    )
    kept = straight / "checkpoints" / f"s-step-{best}" / "model.safetensors"
    assert (straight / "best/model.safetensors").read_bytes() == kept.read_bytes()
    assert (straight / "best/model.json").is_file()
    process = start(again)
    wait_for_steps(again, process, best + 2)
    os.kill(process, signal.SIGKILL)
    ended(process)
    run(again)
    assert_same_run(straight, tmp_path / "again")
    assert (tmp_path / "again/best/model.safetensors").read_bytes() == kept.read_bytes()


def test_the_best_is_one_that_could_be_written(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that was full at the best step left a run that could never end: final/ asked for that checkpoint."""
    evaluate, losses = due._evaluate, iter([3.0, 1.0, 2.0, 4.0])
    save = state.save

    def evaluated(at: RunningStage) -> Any:
        record = evaluate(at)
        return None if record is None else record | {"loss": next(losses)}

    def full_at_the_second(*args: Any) -> None:
        if args[6].done == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args)

    monkeypatch.setattr(due, "_evaluate", evaluated)
    monkeypatch.setattr(state, "save", full_at_the_second)
    held_out = {"holdout": {"fraction": 0.3, "by": "sample"}, "every": 1, "keep_best": True}
    wanted = config(tmp_path / "run", stage("s", texts, LANGUAGE, steps=4), vision=None, eval=held_out)
    folder = run(wanted)
    assert "s step 2: not saved" in said(wanted)
    assert json.loads((folder / "best/model.json").read_text(encoding="utf-8"))["step"] == 3


def test_a_held_out_loss_that_is_not_finite_is_told_as_null_and_never_the_best(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = VLM.forward

    def bad(vlm: VLM, row: Row, *, want: Literal["losses", "states", "scores"] = "losses") -> torch.Tensor:
        return forward(vlm, row, want=want) * (1 if want == "states" or vlm.language.training else math.nan)

    monkeypatch.setattr(VLM, "forward", bad)
    held_out = {"holdout": {"fraction": 0.3, "by": "sample"}, "every": 1, "keep_best": True}
    folder = run(config(tmp_path / "run", stage("s", texts, LANGUAGE, steps=2), vision=None, eval=held_out))
    assert "NaN" not in (folder / "metrics.jsonl").read_text(encoding="utf-8")
    assert [line["loss"] for line in metrics(folder, evaluations=True)] == [None, None]
    assert not (folder / "best").exists()


def test_evaluation_may_be_taken_out_after_one_was_interrupted(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"eval": {"data": [{"shards": str(texts)}], "every": 2}}
    wanted = config(tmp_path / "run", stage("s", texts, LANGUAGE, steps=2), vision=None, **settings)
    evaluate = due._evaluate

    def stopped(at: RunningStage) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(at)

    with monkeypatch.context() as patched:
        patched.setattr(due, "_evaluate", stopped)
        assert ended(start(wanted)) == 75, said(wanted)
    run(altered(wanted, tmp_path / "run", eval=None))
