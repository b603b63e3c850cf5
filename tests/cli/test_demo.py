"""What the demo says at its end."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

from rich.console import Console

from mmit.config import load_config
from mmit.demo import _next_steps, _report
from mmit.evaluation.answers import Answered


def test_an_answer_in_brackets_is_shown_as_it_is() -> None:
    answered = [Answered("easy-vqa:1", "what color?", "red", "[/INST] [red]", False, "open", ())]
    result = {"seconds": 60.0, "peak_rss_mb": 1}
    result |= {f"{what}_{kind}": 0.5 for what in ("questions", "accuracy", "guess") for kind in ("open", "yes_no")}
    screen = io.StringIO()
    _report(Console(file=screen, width=120), result, answered, answered)
    assert screen.getvalue().count("[/INST] [red]") == 2


def test_the_last_commands_can_be_copied_whatever_the_folder_is_called() -> None:
    told = _next_steps("/cache/some shards", Path("my demo/run"), Path("my demo"))
    generate, show, mine, larger = (shlex.split(line) for line in told.splitlines() if line.startswith("  "))
    assert generate[:5] == ["mmit", "generate", "my demo/run", "--image", "my demo/parts/easy-vqa/test/images/0.png"]
    assert show == ["mmit-data", "show", "/cache/some shards", "--run", "my demo/run"]
    assert mine[:3] == ["mmit", "train", "my demo/run/config.yaml"]
    assert larger[:2] == ["mmit", "train"]
    overridden = load_config(Path(larger[2]).with_name("demo.yaml"), mine[3:])
    assert overridden.output == "runs/mine"
    assert [(source.format, source.images) for source in overridden.stages[1].data] == [("llava", "photos/")]
