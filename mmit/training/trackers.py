"""Trackers that get the numbers of metrics.jsonl, and nothing else: no picture, no setting, no path, and no text unless
`log_samples` says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from accelerate.tracking import MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from mmit.config import imported


class Tracker(Protocol):
    """What `package.module:Name` must give when it is called with the run's name and folder."""

    def log(self, values: dict[str, Any], step: int | None) -> None: ...

    def finish(self) -> None: ...


KNOWN: dict[str, Callable[[str, Path], Any]] = {
    "tensorboard": lambda name, run: TensorBoardTracker(name, run / "tensorboard"),
    "wandb": lambda name, run: WandBTracker(name, dir=str(run)),
    "trackio": lambda name, run: TrackioTracker(name),
    "mlflow": lambda name, run: MLflowTracker(name, run / "mlflow"),
}


class Trackers:
    """All trackers of a run. One that fails is told of once, and left out from then on: it never stops the run."""

    def __init__(self, names: Sequence[str], run: Path, say: Callable[[str], None]) -> None:
        self._say = say
        self._open: dict[str, Tracker] = {}
        self._faults: dict[str, Exception] = {}
        for name in names:
            make = maker(name)
            self._try(name, lambda name=name, make=make: self._open.update({name: _begun(make(run.name, run))}))

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """The numbers of a line of metrics.jsonl, under `stage/...`."""
        values = dict(_numbers(record, str(record["stage"])))
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.log(values, step=step))

    def log_text(self, title: str, text: str, step: int) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.log({title: text}, step=step))

    def finish(self) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.finish)

    def _try(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self._faults[name] = error
            self._open.pop(name, None)
            told = " ".join(str(error).split())[:200]
            self._say(f"trackers: {name} fails and is left out ({type(error).__name__}: {told}); the run goes on")


def maker(name: str) -> Callable[[str, Path], Any]:
    return KNOWN[name] if name in KNOWN else imported(name, "trackers", KNOWN)


def _begun(tracker: Any) -> Tracker:
    if type(tracker) in (MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker):
        tracker.start()
    return tracker


def _numbers(value: Any, path: str) -> list[tuple[str, float]]:
    if isinstance(value, Mapping):
        return [pair for key, inner in value.items() if key != "stage" for pair in _numbers(inner, f"{path}/{key}")]
    return [(path, value)] if isinstance(value, int | float) else []
