"""Laws of going on: kill it anywhere, start it again, and every number is the same; what cannot go on is refused."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mmit.config import Config
from tests.training.tiny import (
    CLIP,
    GPT2,
    altered,
    config,
    ended,
    metrics,
    once_each,
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
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}
OFTEN = {"every": 1}


def two_stages(output: Path, data: Path, **changes: Any) -> Config:
    """Frozen LLM, then all trained; row_tokens makes several micro-steps, dropout in the LLM makes use of the RNG."""
    stages = [stage("align", data, PROJECTOR, row_tokens=200), stage("sft", data, BOTH, row_tokens=300, epochs=1.4)]
    settings = {"language": GPT2, "save": OFTEN, "eval": {"holdout": {"fraction": 0.2, "by": "sample"}, "every": 3}}
    return config(output, *stages, **settings | changes)


def wait_for_steps(wanted: Config, process: int, count: int) -> None:
    """Until the run has told of `count` steps in all."""
    file = Path(wanted.output) / "metrics.jsonl"
    limit = time.monotonic() + 60
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        assert time.monotonic() < limit, said(wanted)
        assert os.waitpid(process, os.WNOHANG)[0] == 0, said(wanted)
        time.sleep(0.002)


def kill_until_done(wanted: Config, kills: int, *, seed: int, longest: float, workers: tuple[int, ...] = (0,)) -> int:
    """Starts the run again and again, each time killed after a random while; the last time it may end. Counts kills."""
    rng = random.Random(seed)
    killed = 0
    for _ in range(kills):
        process = start(altered(wanted, Path(wanted.output), workers=rng.choice(workers)))
        time.sleep(rng.uniform(0.1, longest))
        os.kill(process, signal.SIGKILL)
        code = ended(process)
        assert code in (0, -signal.SIGKILL), said(wanted)  # no start is dead by itself
        killed += code != 0
    # At once: workers of a killed process may still live, and must not hold the run.
    assert ended(start(altered(wanted, Path(wanted.output), workers=rng.choice(workers)))) == 0, said(wanted)
    return killed


def assert_same_run(one: Path, other: Path) -> None:
    for evaluations in (False, True):
        assert once_each(metrics(other, evaluations=evaluations)) == once_each(metrics(one, evaluations=evaluations))
    assert (other / "final/model.safetensors").read_bytes() == (one / "final/model.safetensors").read_bytes()
    assert (other / "final/model.json").read_bytes() == (one / "final/model.json").read_bytes()


def test_four_kills_change_no_number(tmp_path: Path, data: Path) -> None:
    straight = run(two_stages(tmp_path / "straight", data))
    wanted = two_stages(tmp_path / "killed", data)
    kill_until_done(wanted, 4, seed=0, longest=2.0, workers=(0, 1))
    assert_same_run(straight, tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_with_other_workers_each_time_change_no_number(tmp_path: Path, data: Path) -> None:
    settings = {"save": {"every": 2}}
    straight = run(two_stages(tmp_path / "straight", data, **settings))
    before = time.monotonic()
    run(two_stages(tmp_path / "timed", data, **settings))
    longest = time.monotonic() - before
    killed = rounds = 0
    while killed < 20:  # a run that ended is begun anew, so that kills fall on all of it
        rounds += 1
        wanted = two_stages(tmp_path / f"killed{rounds}", data, **settings)
        killed += kill_until_done(wanted, 5, seed=rounds, longest=longest, workers=(0, 1, 3))
        assert_same_run(straight, tmp_path / f"killed{rounds}")


def test_a_kill_right_after_the_stage_border_changes_no_number(tmp_path: Path, data: Path) -> None:
    straight = run(two_stages(tmp_path / "straight", data))
    steps = len([line for line in metrics(straight) if line["stage"] == "align"])
    wanted = two_stages(tmp_path / "killed", data)
    for more in (0, 1, 2, 3):
        process = start(wanted)
        wait_for_steps(wanted, process, steps + more)
        os.kill(process, signal.SIGKILL)
        ended(process)
    assert ended(start(wanted)) == 0, said(wanted)
    assert_same_run(straight, tmp_path / "killed")


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("a LoRA stage", {"train": BOTH | {"language": {"lr": 1e-3, "lora": LORA}}}),
        ("a trained tower and tied embeddings", {"train": BOTH | {"vision": {"lr": 1e-4}}, "tied": True}),
        ("fp64", {"train": BOTH, "precision": "fp64"}),
        ("bf16", {"train": BOTH, "precision": "bf16"}),
        ("gradient checkpointing", {"train": BOTH, "checkpointing": True}),
    ],
)
def test_an_interrupted_stage_goes_on_with_the_same_bits(
    case: str, settings: dict[str, Any], tmp_path: Path, data: Path
) -> None:
    def wanted(name: str) -> Config:
        language = GPT2 | {"tie_word_embeddings": settings.get("tied", False)}
        only = stage("s", data, settings["train"], gradient_checkpointing=settings.get("checkpointing", False), steps=6)
        precision = settings.get("precision", "fp32")
        return config(tmp_path / name, only, language=language, precision=precision, save=OFTEN)

    straight, again = run(wanted("straight")), wanted("again")
    process = start(again)
    wait_for_steps(again, process, 2)
    os.kill(process, signal.SIGINT)
    assert ended(process) == 75, said(again)
    assert ended(start(again)) == 0, said(again)
    assert "going on after step" in said(again)
    assert_same_run(straight, tmp_path / "again")


def test_a_checkpoint_saved_before_the_projector_met_a_picture_goes_on(tmp_path: Path) -> None:
    late = shards(tmp_path / "late", [*(written(number) for number in range(29)), pictured(24)])

    def wanted(name: str) -> Config:
        return config(tmp_path / name, stage("s", late, BOTH), save=OFTEN)

    straight, again = run(wanted("straight")), wanted("again")
    assert [line["step"] for line in metrics(straight) if line["pictures"]] == [6]
    process = start(again)
    wait_for_steps(again, process, 1)
    os.kill(process, signal.SIGINT)
    assert ended(process) == 75, said(again)
    assert ended(start(again)) == 0, said(again)
    assert_same_run(straight, tmp_path / "again")


@pytest.mark.parametrize("place", ["transformers.AutoConfig.for_model", "mmit.training.trackers.TensorBoardTracker"])
def test_a_signal_is_no_fault_of_what_it_interrupts(
    place: str, tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaders and trackers take any exception for a fault of theirs: a preempted job ended as one of a bad config."""

    def interrupting(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(place, interrupting)
    only = stage("s", texts, {"language": {"lr": 1e-3}}, steps=2)
    wanted = config(tmp_path / "run", only, vision=None, trackers=["tensorboard"])
    assert ended(start(wanted)) == 75, said(wanted)
    assert said(wanted).splitlines()[-1].startswith("stopped while loading; nothing is lost")
    assert "fails" not in said(wanted)


def test_a_full_disk_makes_no_failure_of_an_interruption_under_torchrun(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note PREEMPTED could not be written: exit 2, after which torchrun would start the run again."""
    write_text = Path.write_text

    def full(path: Path, *args: Any, **named: Any) -> int:
        if path.name == "PREEMPTED":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, *args, **named)

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    wanted = config(tmp_path / "run", stage("s", texts, {"language": {"lr": 1e-3}}, steps=2000), vision=None)
    process = start(wanted)
    wait_for_steps(wanted, process, 2)
    os.kill(process, signal.SIGTERM)
    assert ended(process) == 0, said(wanted)
    assert list((tmp_path / "run/checkpoints").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_leaves_a_resumable_run(
    number: signal.Signals, tmp_path: Path, texts: Path
) -> None:
    """As a terminal sends Ctrl-C, and a scheduler SIGTERM: to the loader's workers too."""
    wanted = config(tmp_path / "run", stage("s", texts, {"language": {"lr": 1e-3}}, steps=4000), vision=None, workers=1)
    process = start(wanted, lead_group=True)
    wait_for_steps(wanted, process, 3)
    os.killpg(process, number)
    assert ended(process) == 75, said(wanted)
    done = re.search(r"stopped after step (\d+) of stage s; the same command goes on", said(wanted))
    assert done is not None
    assert (tmp_path / "run/checkpoints" / f"s-step-{done[1]}").is_dir()
    assert "Traceback" not in said(wanted)


def test_a_run_of_text_alone_goes_on_across_stages(tmp_path: Path, texts: Path) -> None:
    def wanted(name: str) -> Config:
        adapter = {"language": {"lr": 1e-3, "lora": LORA}}
        stages = [stage("one", texts, {"language": {"lr": 1e-3}}), stage("two", texts, adapter)]
        return config(tmp_path / name, *stages, vision=None, save=OFTEN)

    straight, again = run(wanted("straight")), wanted("again")
    for steps in (2, 4):
        process = start(again)
        wait_for_steps(again, process, steps)
        os.kill(process, signal.SIGKILL)
        ended(process)
    assert ended(start(again)) == 0, said(again)
    assert_same_run(straight, tmp_path / "again")


# What changed ----------------------------------------------------------------------------


def interrupted(wanted: Config, steps: int = 2) -> None:
    process = start(wanted)
    wait_for_steps(wanted, process, steps)
    os.kill(process, signal.SIGINT)
    assert ended(process) == 75, said(wanted)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ({"stages": {"train": {"language": {"lr": 2e-3}}}}, "stages.s.train.language.lr: was 0.001, now 0.002"),
        ({"stages": {"batch_size": 7}}, "stages.s.batch_size: was 5, now 7"),
        ({"seed": 4}, "seed: was 3, now 4"),
        ({"eval": {"holdout": {"fraction": 0.5}}}, "eval.holdout.fraction: was 0.3, now 0.5"),
        ({"eval": None}, "eval.holdout"),
    ],
)
def test_a_begun_stage_refuses_other_settings_and_names_them(
    override: dict[str, Any], told: str, tmp_path: Path, texts: Path
) -> None:
    def wanted(**changes: Any) -> Config:
        only = stage("s", texts, {"language": {"lr": 1e-3}}, steps=2000) | changes.pop("stages", {})
        settings = {"eval": {"holdout": {"fraction": 0.3}, "every": 500}} | changes
        return config(tmp_path / "run", only, vision=None, **settings)

    interrupted(wanted())
    lines = metrics(tmp_path / "run")
    assert ended(start(wanted(**override))) == 2
    assert told in said(wanted())
    assert metrics(tmp_path / "run") == lines
    kept = (tmp_path / "run/config.yaml").read_text(encoding="utf-8")
    assert "lr: 0.001" in kept
    assert "fraction: 0.3" in kept


def test_a_stage_may_be_appended_and_a_later_one_edited(tmp_path: Path, texts: Path) -> None:
    first = stage("one", texts, {"language": {"lr": 1e-3}})
    second = stage("two", texts, {"language": {"lr": 1e-3}}, steps=2)
    run(config(tmp_path / "run", first, vision=None))
    begun = once_each(metrics(tmp_path / "run"))
    longer = run(config(tmp_path / "run", first, second | {"steps": 3}, vision=None))
    at_once = run(config(tmp_path / "other", first, second | {"steps": 3}, vision=None))
    assert metrics(longer)[: len(begun)] == begun
    assert_same_run(at_once, longer)


def test_a_begun_stage_cannot_be_taken_out(tmp_path: Path, texts: Path) -> None:
    stages = [stage(name, texts, {"language": {"lr": 1e-3}}) for name in ("one", "two")]
    run(config(tmp_path / "run", *stages, vision=None))
    again = config(tmp_path / "run", stages[1], vision=None)
    assert ended(start(again)) == 2
    assert "'one' has begun and was stage 1, now ['two']" in said(again)


def test_changed_shards_are_refused(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data", [written(number) for number in range(12)])
    wanted = config(tmp_path / "run", stage("s", folder, {"language": {"lr": 1e-3}}, steps=2000), vision=None)
    interrupted(wanted)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    shards(folder, [written(number + 1) for number in range(12)])
    assert ended(start(wanted)) == 2
    assert "the data of the stage has changed since (sources data)" in said(wanted)


def test_a_second_process_is_refused_and_told_who_holds_the_run(tmp_path: Path, texts: Path) -> None:
    wanted = config(tmp_path / "run", stage("s", texts, {"language": {"lr": 1e-3}}, steps=4000), vision=None)
    process = start(wanted)
    wait_for_steps(wanted, process, 1)
    assert ended(start(wanted)) == 2
    assert f"is in use by process {process} on" in said(wanted)
    os.kill(process, signal.SIGINT)
    assert ended(process) == 75


def test_a_run_killed_with_a_worker_alive_can_go_on_at_once(tmp_path: Path, texts: Path) -> None:
    wanted = config(tmp_path / "run", stage("s", texts, {"language": {"lr": 1e-3}}, steps=4000), vision=None, workers=1)
    process = start(wanted)
    wait_for_steps(wanted, process, 2)
    os.kill(process, signal.SIGKILL)
    ended(process)
    process = start(wanted)
    wait_for_steps(wanted, process, len(metrics(tmp_path / "run")) + 1)
    os.kill(process, signal.SIGINT)
    assert ended(process) == 75, said(wanted)


def test_a_finished_stage_whose_files_were_lost_is_not_trained_again(tmp_path: Path, texts: Path) -> None:
    def wanted(name: str) -> Config:
        stages = [stage("one", texts, {"language": {"lr": 1e-3}}), stage("two", texts, {"language": {"lr": 1e-3}})]
        return config(tmp_path / name, *stages, vision=None, save=OFTEN)

    straight, again = run(wanted("straight")), wanted("again")
    process = start(again)
    steps = sum(line["stage"] == "one" for line in metrics(straight)) + 1
    wait_for_steps(again, process, steps)
    os.kill(process, signal.SIGINT)
    assert ended(process) == 75, said(again)
    (checkpoint,) = (tmp_path / "again/checkpoints").glob("one-step-*")
    (checkpoint / "model.safetensors").write_bytes(b"")
    assert ended(start(again)) == 0, said(again)
    assert len([line for line in metrics(tmp_path / "again") if line["stage"] == "one"]) == steps - 1
    assert_same_run(straight, tmp_path / "again")


# What a run leaves ----------------------------------------------------------------------------


def test_the_stored_config_makes_the_same_run(tmp_path: Path, data: Path) -> None:
    first = run(two_stages(tmp_path / "first", data, language=None or GPT2))
    from mmit.config import load_config

    second = run(load_config(first / "config.yaml", [f"output={tmp_path / 'second'}", "workers=1"]))
    assert_same_run(first, second)


@pytest.mark.parametrize("recipe", ["lr: 3  # mine\n", "- a\n", "stages:\n- {name: s}\n"])
def test_a_file_of_the_users_in_the_output_folder_is_not_overwritten(tmp_path: Path, texts: Path, recipe: str) -> None:
    """A recipe was replaced by the config spelled out, without its comments; anything else was a traceback."""
    wanted = config(tmp_path / "run", stage("s", texts, {"language": {"lr": 1e-3}}, steps=2), vision=None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(recipe, encoding="utf-8")
    assert ended(start(wanted)) == 2
    assert f"output: {tmp_path}/run/config.yaml is of no run" in said(wanted)
    assert (tmp_path / "run/config.yaml").read_text(encoding="utf-8") == recipe


def test_a_run_copied_without_hidden_files_goes_on(tmp_path: Path, texts: Path) -> None:
    wanted = config(tmp_path / "run", stage("s", texts, {"language": {"lr": 1e-3}}, steps=2000), vision=None)
    interrupted(wanted)
    (tmp_path / "run/.begun.yaml").unlink()
    interrupted(wanted, len(metrics(tmp_path / "run")) + 2)
    assert "going on after step" in said(wanted)


def test_a_run_directory_holds_what_others_rely_on(tmp_path: Path, data: Path) -> None:
    folder = run(two_stages(tmp_path / "run", data, vision=CLIP))
    names = {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "final"}
    assert names <= {path.name for path in folder.iterdir()}
    assert {path.name for path in folder.iterdir()} - names <= {".lock", ".begun.yaml", "skipped.jsonl"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = {"stage", "step", "loss", "losses", "lr", "samples", "tokens", "supervised", "seconds"}
    for line in lines:
        if "held_out" not in line:
            assert keys <= line.keys()
            weighed = sum(line["losses"].values())  # one source: its loss is the step's
            assert line["supervised"] == 0 or weighed == pytest.approx(line["loss"], rel=1e-12)
    assert {"model.json", "model.safetensors", "tokenizer", "language"} <= {
        p.name for p in (folder / "final").iterdir()
    }
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    assert environment["packages"]["torch"]
