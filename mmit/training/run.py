"""A run directory: what it was asked to do, what it has finished, and where it goes on."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from mmit.config import ConfigError
from mmit.data.remote import Stopped
from mmit.training import checkpoint
from mmit.training.checkpoint import Checkpoint
from mmit.training.identity import compare

PACKAGES = ("mmit", "torch", "transformers", "open_clip_torch", "peft", "accelerate", "tokenizers", "pillow")


NOTHING_LOST = "stopped while loading; nothing is lost, the same command starts anew or goes on"


class Interrupted(Stopped):
    """The run stopped because it was asked to, and has saved where it stands."""


class StopFlag:
    """Set by Ctrl-C, SIGTERM or SIGUSR1; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.set = False
        self._since = 0.0
        self._raises = False
        self._loading = False
        self._waiting = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.set:
            # torchrun passes on a Ctrl-C that the terminal has sent to its ranks as well: that is one signal.
            if not under_torchrun() or now - self._since > 1:
                os._exit(128 + number)
            return
        self.set, self._since = True, now
        if self._raises:
            raise Interrupted(NOTHING_LOST)
        when = "when all ranks have loaded" if self._loading else "as soon as the rows in hand are computed"
        when = "now" if self._waiting else when
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        told = f"{rank}{signal.Signals(number).name}: the run stops {when}; a second signal ends it here and now\n"
        with suppress(OSError):  # a log on a full disk
            os.write(2, told.encode())  # not print, in which the signal may have arrived
        if self._waiting:
            raise Stopped

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals inside the block (in the main thread; elsewhere Python delivers none)."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        try:
            before = {number: signal.signal(number, self._handle) for number in numbers}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # which `mmit train` blocks where there are ranks
        except ValueError:
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def loading(self, *, alone: bool) -> Iterator[None]:
        """Inside the block, where nothing can be lost, a signal raises Interrupted wherever it arrives, if the process
        is `alone`: other ranks would wait for one that left."""
        self._raises, self._loading = alone, True
        try:
            if alone and self.set:
                raise Interrupted(NOTHING_LOST)
            yield
        finally:
            self._raises = self._loading = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside the block, where the next step is waited for, a signal raises Stopped wherever it arrives."""
        self._waiting = True
        try:
            if self.set:
                raise Stopped
            yield
        finally:
            self._waiting = False


def under_torchrun() -> bool:
    """Whether torchrun would start this process again if it failed."""
    return "TORCHELASTIC_RUN_ID" in os.environ


class RunDirectory:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.final = folder / "final"
        self.preempted = folder / "PREEMPTED"
        """Left by an interrupted run under torchrun, whose exit code says nothing."""
        self.moved: list[str] = []
        """Keys of the config under which what has begun reads from other places than it did."""
        self._begun = folder / ".begun.yaml"
        self._asked = ""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the directory; ConfigError names the process that already does."""
        with _told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                # Of this process alone: flock would pass to the loader's workers, which outlive a SIGKILL by seconds.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                holder = os.read(descriptor, 200).decode() or "another process"
                raise ConfigError(
                    f"output: {self.folder} is in use by {holder}; wait for it, stop it, or name another folder"
                ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def begin(self, asked: str, computed_on: str) -> None:
        """Stores the config (YAML) and the environment; ConfigError if a begun stage was asked for differently. A
        config that reads from other places (`moved`) is stored by `settle`, once the same was found there."""
        file, beside = self.folder / "config.yaml", self.folder / "environment.json"
        if file.exists() and not (self._begun.exists() or beside.exists()):  # which every run has
            raise ConfigError(
                f"output: {file} is of no run, and a run would write its own in its place; give that file another name "
                f"or place, or name another output"
            )
        # Compared with a copy of our own: whoever edits the config.yaml of a run and trains it again asks for changes.
        if (before := self._begun if self._begun.exists() else file).exists():
            self.moved = self._refuse_changes(yaml.safe_load(before.read_text(encoding="utf-8")), yaml.safe_load(asked))
        environment = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
        environment["computed_on"] = computed_on
        packages = {name: version(name) for name in PACKAGES}
        self._asked = asked
        if not self.moved:
            self.settle()
        with _told(self.folder):
            write(beside, json.dumps(environment | {"packages": packages}, indent=1).encode())
            self.preempted.unlink(missing_ok=True)
            for name in ("metrics.jsonl", "skipped.jsonl", "answers.jsonl"):
                _drop_torn_line(self.folder / name)

    def settle(self) -> None:
        """Stores the config that `begin` was given."""
        with _told(self.folder):
            for file in (self._begun, self.folder / "config.yaml"):
                write(file, self._asked.encode())
        self.moved = []

    def checkpoint(self, stage: str, step: int) -> Path:
        return self.checkpoints / f"{stage}-step-{step}"

    def newest(self, stage: str) -> Checkpoint | None:
        return checkpoint.newest(self.checkpoints, stage)

    def _refuse_changes(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
        """The keys under which begun stages read from other places now; ConfigError for what else is different."""
        names = [stage["name"] for stage in before["stages"]]
        begun = [name for name in names if checkpoint.has_begun(self.checkpoints, name)]
        if not begun:
            return []
        differences, moved = compare(before, now, begun)
        if differences:
            raise ConfigError(
                f"{self.folder} holds a run that has begun with other settings:\n  "
                + "\n  ".join(differences)
                + "\nset them back to go on with it, or name another output"
            )
        return moved


def write(file: Path, content: bytes) -> None:
    """At once or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_bytes(content)
    temporary.rename(file)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """ConfigError for a folder that cannot be written."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"output: {folder} cannot be written ({error.strerror}: {error.filename}); free some space, or name a "
            f"folder that can"
        ) from error


def _drop_torn_line(file: Path) -> None:
    """Removes a last line that a kill left unfinished."""
    if not file.exists():
        return
    with file.open("rb+") as opened:
        whole = opened.read()
        opened.truncate(whole.rfind(b"\n") + 1)
