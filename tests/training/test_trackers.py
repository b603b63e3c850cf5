"""Laws of trackers: numbers and nothing else, and never the reason why a run stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.training.test_resume import assert_same_run
from tests.training.tiny import altered, config, ended, metrics, run, said, stage, start


class Recorder:
    def __init__(self, name: str, folder: Path) -> None:
        self.file = folder / "tracked.jsonl"

    def log(self, values: dict[str, Any], step: int | None) -> None:
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(values | {"step": step}) + "\n")

    def finish(self) -> None:
        self.log({"finished": 1}, None)


class Broken(Recorder):
    def log(self, values: dict[str, Any], step: int | None) -> None:
        if step == 2:
            raise ConnectionError("no route to host")


def test_trackers_get_every_number_and_no_text(tmp_path: Path, data: Path) -> None:
    held_out = {"holdout": {"fraction": 0.2, "by": "sample"}, "every": 2}
    only = stage("s", data, {"projector": {"lr": 1e-3}, "language": {"lr": 1e-3}}, steps=3)
    folder = run(config(tmp_path / "run", only, trackers=["tests.training.test_trackers:Recorder"], eval=held_out))
    told = [json.loads(line) for line in (folder / "tracked.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(isinstance(value, int | float) for line in told[:-1] for value in line.values())
    assert [line["s/loss"] for line in told if "s/grad_norm" in line] == [line["loss"] for line in metrics(folder)]
    assert any("s/held_out/mixed" in line for line in told)
    assert "finished" in told[-1]


def test_a_tracker_that_fails_is_told_of_and_the_run_goes_on(tmp_path: Path, texts: Path) -> None:
    plain = config(tmp_path / "plain", stage("s", texts, {"language": {"lr": 1e-3}}), vision=None)
    broken = altered(plain, tmp_path / "broken", trackers=["tests.training.test_trackers:Broken", "tensorboard"])
    assert_same_run(run(plain), run(broken))
    assert said(broken).count("Broken fails and is left out (ConnectionError: no route to host)") == 1


def test_a_tracker_that_does_not_exist_is_named(tmp_path: Path, texts: Path) -> None:
    only = stage("s", texts, {"language": {"lr": 1e-3}})
    wanted = config(tmp_path / "run", only, vision=None, trackers=["tensorbord"])
    assert ended(start(wanted)) == 2
    assert "did you mean 'tensorboard'?" in said(wanted)


def test_telemetry_of_dependencies_is_off_before_they_are_imported() -> None:
    program = (
        "import sys\nfrom mmit.cli import main\nsys.argv = ['mmit', 'train', 'no.yaml']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "from huggingface_hub import constants\nprint(constants.HF_HUB_DISABLE_TELEMETRY)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
