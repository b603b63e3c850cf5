"""What a run tells: metrics.jsonl always, skipped.jsonl for holes, and the terminal (a bar) or a log (plain lines)."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from mmit.config import Stage
from mmit.data.loader import Hole, Step
from mmit.training.data import StageData
from mmit.training.run import write
from mmit.training.trackers import Trackers


class RunLog:
    """The log of one stage; only rank 0 writes."""

    def __init__(
        self,
        run: Path,
        stage: str,
        *,
        total: int,
        start: int,
        active: bool,
        trackers: Sequence[str] = (),
        log_samples: bool = False,
    ) -> None:
        self.run, self.stage, self.total, self.active = run, stage, total, active
        # No markup: a source may be called notes[1], which rich would take for a style, or [/notes], which it refuses.
        wrap = not sys.stdout.isatty()
        self.console = Console(quiet=not active, highlight=False, markup=False, emoji=False, soft_wrap=wrap)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._start = start
        self._last_line = 0.0
        self._waiting: dict[str, bytes] = {}
        self._told_full = False
        self._log_samples = log_samples
        self._trackers = Trackers(trackers if active else (), run, self.say)
        if active:
            for file in ("skipped.jsonl", "answers.jsonl"):
                _forget_after(run / file, stage, start)

    def __enter__(self) -> Self:
        if self.active and self.console.is_terminal:
            columns = (
                TextColumn(f"[bold]{self.stage}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self.console)
            self._task = self._progress.add_task(self.stage, total=self.total, completed=self._start, facts="")
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._trackers.finish()
        for file in (name for name, lines in self._waiting.items() if lines):
            self._try_to_write(file)

    def step(self, record: Mapping[str, Any], holes: Sequence[Hole]) -> None:
        """One finished step: a line of metrics.jsonl, its holes, and how it looks to whoever watches."""
        if not self.active:
            return
        self.append("metrics.jsonl", record)
        self._trackers.log(record, record["step"])
        self.holes(record["step"], holes)
        loss = _shown(record["loss"]) + (", no update" if record["grad_norm"] is None else "")
        facts = (
            f"loss {loss}  {record['samples'] / record['seconds']:.1f} samples/s  "
            f"{record['tokens'] / record['seconds']:.0f} tokens/s"
        )
        number, now = int(record["step"]), time.monotonic()
        if self._progress is not None:
            self._progress.update(self._task, completed=number, facts=facts)
        elif number == self.total or number <= self._start + 1 or now - self._last_line > 10:
            self._last_line = now
            left = (self.total - number) * record["seconds"]
            self.say(f"{self.stage} {number}/{self.total}  {facts}  {left / 60:.1f} min left")

    def holes(self, step: int, holes: Sequence[Hole], *, held_out: bool = False) -> None:
        for hole in holes if self.active else ():
            entry = {"stage": self.stage, "step": step, "held_out": held_out, "sample": hole.where}
            self.append("skipped.jsonl", entry | {"kind": hole.kind, "reason": hole.reason})

    def evaluation(self, record: Mapping[str, Any]) -> None:
        if self.active:
            self.append("metrics.jsonl", record)
            self._trackers.log(record, record["step"])
            losses = "  ".join(f"{name} {_shown(loss)}" for name, loss in record["held_out"].items())
            self.say(f"{self.stage} step {record['step']}: held-out loss {losses or 'of nothing'}")
            if record["skipped"]:
                left_out = f"{record['skipped']} held-out samples are left out, see skipped.jsonl"
                self.say(f"{self.stage} step {record['step']}: {left_out}")
            if "scores" in record:
                scores = "  ".join(f"{name} {score:.1%}" for name, score in record["scores"].items())
                self.say(
                    f"{self.stage} step {record['step']}: {record['answered']} answers, {record['metric']} {scores}"
                )

    def answers(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """What was answered to held-out questions, into answers.jsonl; to trackers only where the run says so."""
        if not self.active:
            return
        for line in lines:
            self.append("answers.jsonl", {"stage": self.stage, "step": step, **line})
        if self._log_samples:
            told = (f"{line['question']} -> {line['answer']} (expected: {line['expected']})" for line in lines)
            self._trackers.log_text(f"{self.stage}/answers", "\n\n".join(told), step)

    def say(self, text: str | Table) -> None:
        if not self.active:
            return
        try:
            self.console.print(text)
        except (OSError, SystemExit):
            # The disk of a log is full, or who read it has left, for which rich would end the process. Numbers and
            # faults are in the run's files.
            self.console.quiet = True

    def append(self, file: str, record: Mapping[str, Any]) -> None:
        """One line, written and handed to the system at once, so that a kill loses none.

        On a full disk it waits in memory and is written with the next one.
        """
        self._waiting[file] = self._waiting.get(file, b"") + json.dumps(record, ensure_ascii=False).encode() + b"\n"
        self._try_to_write(file)

    def _try_to_write(self, file: str) -> None:
        try:
            self._write(file)
        except OSError as error:
            if not self._told_full:
                self.say(f"{self.run / file}: cannot be written ({error.strerror}); its lines wait until it can")
            self._told_full = True

    def _write(self, file: str) -> None:
        with (self.run / file).open("ab", buffering=0) as opened:
            before = opened.tell()
            text = self._waiting[file]
            try:
                written = opened.write(text)
            except OSError:
                opened.truncate(before)
                raise
            if written != len(text):
                opened.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._waiting[file] = b""


def _forget_after(file: Path, stage: str, step: int) -> None:
    """Takes out the lines of a stage's steps that will be computed, and told of, again."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    kept = [line for line in lines if (told := json.loads(line))["stage"] != stage or told["step"] <= step]
    if len(kept) < len(lines):
        write(file, b"".join(kept))


def _shown(loss: float | None) -> str:
    return f"{loss:.4f}" if loss is not None else "not finite"


def record_of(
    stage: Stage, step: Step, sums: Tensor, data: StageData, holes: Sequence[Hole] | None = None
) -> dict[str, Any]:
    """The line of the step in metrics.jsonl; `holes` are those of all ranks."""
    totals = sums.tolist()
    count = sum(tokens for _, tokens in totals)
    losses = {title: loss / tokens for title, (loss, tokens) in zip(data.titles, totals, strict=True) if tokens}
    holes = step.holes if holes is None else holes
    elsewhere = [hole for hole in holes if hole.here and hole not in step.holes]
    return {
        "stage": stage.name,
        "step": step.number + 1,
        "loss": or_none(sum(loss for loss, _ in totals) / max(count, 1)),
        "losses": {title: or_none(loss) for title, loss in losses.items()},
        "samples": step.samples - len(elsewhere),
        "tokens": step.tokens - sum(hole.tokens for hole in elsewhere),
        "supervised": int(count),
        "pictures": step.pictures - sum(hole.pictures for hole in elsewhere),
        "rows": len(step.rows),
        "cut": step.cut - sum(hole.was_cut for hole in elsewhere),
        "skipped": len(holes),
        "unlabelled": step.unlabelled - sum(hole.unlabelled for hole in elsewhere),
    }


def or_none(loss: float) -> float | None:
    """JSON knows no NaN."""
    return loss if math.isfinite(loss) else None
