"""Laws of answering held-out questions while a stage trains."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mmit.config import Config
from mmit.evaluation.answers import questions
from mmit.evaluation.scores import token_f1
from mmit.inference.generate import load
from tests.training.ranks import run_ranks
from tests.training.test_resume import OFTEN, assert_same_run, wait_for_steps
from tests.training.tiny import LANGUAGE, altered, config, ended, metrics, run, said, stage, start
from tests.training.tiny import opened as opened_stage

BOTH = {"projector": {"lr": 1e-2}, "language": {"lr": 1e-2}}
EVALUATED = {"holdout": {"fraction": 0.4, "by": "sample"}, "every": 3, "generate": 6, "max_new_tokens": 12}


def answered(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def asking(output: Path, data: Path, *, steps: int = 6, **changes: Any) -> Config:
    return config(output, stage("s", data, BOTH, steps=steps, **changes), eval=EVALUATED)


def test_answers_are_those_that_the_finished_run_generates(tmp_path: Path, data: Path) -> None:
    wanted = asking(tmp_path / "run", data, steps=45)
    folder = run(wanted)
    last = [line for line in answered(folder) if line["step"] == 45]
    model = load(folder, device="cpu", cache=tmp_path / "cache")
    shards = opened_stage(wanted, model.saved.assembly).training.encoders[0].shards
    place = {shards.where(index): index for index in range(len(shards))}
    for line in last:
        asked, expected = next(questions([shards.read(place[line["sample"]])], history=True))
        assert line["expected"] == expected.strip()
        assert line["answer"] == model.answers([asked], max_new_tokens=12)[0].strip()
    assert len(last) == 6
    assert len({line["answer"] for line in last}) > 1, "the model must say different things for this to mean anything"


def test_the_row_in_which_a_question_is_answered_changes_no_answer(tmp_path: Path, data: Path) -> None:
    together = run(asking(tmp_path / "one", data, max_tokens=150, row_tokens=4000))
    apart = run(asking(tmp_path / "many", data, max_tokens=150, row_tokens=150))
    assert answered(together) == answered(apart)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_ranks_answer_as_one(how: str, tmp_path: Path, data: Path) -> None:
    one = run(altered(asking(tmp_path / "one", data), tmp_path / "one", precision="fp64"))
    two = run_ranks(altered(asking(tmp_path / "two", data), tmp_path / "two", precision="fp64", parallel=how), 2)
    assert answered(one) == answered(two)


def test_answering_changes_no_number_of_the_training(tmp_path: Path, data: Path) -> None:
    asked = asking(tmp_path / "asked", data)
    plain = altered(asked, tmp_path / "plain", eval=EVALUATED | {"generate": 0})
    assert metrics(run(asked)) == metrics(run(plain))


def test_answers_are_exact_over_a_kill(tmp_path: Path, data: Path) -> None:
    straight = run(asking(tmp_path / "straight", data))
    again = altered(asking(tmp_path / "again", data), tmp_path / "again", save=OFTEN | {"every": 2})
    process = start(again)
    wait_for_steps(again, process, 4)
    os.kill(process, signal.SIGKILL)
    ended(process)
    run(again)
    assert_same_run(straight, tmp_path / "again")
    assert answered(straight) == answered(tmp_path / "again")


def test_scores_are_the_mean_over_the_answers_of_a_source(tmp_path: Path, data: Path) -> None:
    wanted = altered(asking(tmp_path / "run", data), tmp_path / "run", eval=EVALUATED | {"metric": "token_f1"})
    folder = run(wanted)
    told = metrics(folder, evaluations=True)
    assert [line["step"] for line in told] == [3, 6]
    for line in told:
        scores = [token_f1(a["answer"], a["expected"]) for a in answered(folder) if a["step"] == line["step"]]
        assert line["scores"] == {"mixed": pytest.approx(sum(scores) / 6)}
        assert line["answered"] == len(scores) == 6


def test_texts_reach_trackers_only_where_the_run_says_so(tmp_path: Path, data: Path) -> None:
    tracked = ["tests.training.test_trackers:Recorder"]
    quiet = run(altered(asking(tmp_path / "quiet", data), tmp_path / "quiet", trackers=tracked))
    open_ = run(altered(asking(tmp_path / "open", data), tmp_path / "open", trackers=tracked, log_samples=True))
    told = {
        folder.name: [
            value
            for line in (folder / "tracked.jsonl").read_text(encoding="utf-8").splitlines()
            for value in json.loads(line).values()
            if isinstance(value, str)
        ]
        for folder in (quiet, open_)
    }
    assert told["quiet"] == []
    assert len(told["open"]) == 2
    assert all(line["question"] in told["open"][0] for line in answered(open_) if line["step"] == 3)


def test_a_metric_that_does_not_exist_is_named_before_anything_is_trained(tmp_path: Path, texts: Path) -> None:
    only = stage("s", texts, {"language": {"lr": 1e-3}})
    wanted = config(tmp_path / "run", only, vision=None, language=LANGUAGE, eval=EVALUATED | {"metric": "exact_mach"})
    assert ended(start(wanted)) == 2
    assert "did you mean 'exact_match'?" in said(wanted)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("a red square", "a red square", 1.0),
        ("red square", "a red square", 0.8),
        ("blue", "a red square", 0.0),
        ("", "", 1.0),
    ],
)
def test_token_f1_is_the_harmonic_mean_of_precision_and_recall(answer: str, expected: str, score: float) -> None:
    assert token_f1(answer, expected) == pytest.approx(score)
