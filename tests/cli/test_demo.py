"""What the demo says at its end."""

from __future__ import annotations

import io

from rich.console import Console

from mmit.demo import _report
from mmit.evaluation.answers import Answered


def test_an_answer_in_brackets_is_shown_as_it_is() -> None:
    answered = [Answered("easy-vqa:1", "what color?", "red", "[/INST] [red]", False, "open")]
    result = {"seconds": 60.0, "peak_rss_mb": 1}
    result |= {f"{what}_{kind}": 0.5 for what in ("questions", "accuracy", "guess") for kind in ("open", "yes_no")}
    screen = io.StringIO()
    _report(Console(file=screen, width=120), result, answered, answered)
    assert screen.getvalue().count("[/INST] [red]") == 2
