"""Runs of several ranks, each a fork of this process, that meet over the loopback as under torchrun."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from mmit.config import Config
from tests.training.tiny import altered, ended, said, start


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def start_ranks(wanted: Config, ranks: int, *, workers: dict[int, int] | None = None, **environment: str) -> list[int]:
    """`mmit train` as `ranks` forked processes; their ids by rank. `workers` gives a rank its own number of them."""
    port = free_port()
    processes = []
    for rank in range(ranks):
        settings = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        with pytest.MonkeyPatch.context() as patched:
            for name, value in (settings | environment).items():
                patched.setenv(name, value)
            own = wanted if workers is None else altered(wanted, Path(wanted.output), workers=workers[rank])
            processes.append(start(own))
    return processes


def ended_ranks(processes: list[int], *, seconds: float = 120) -> list[int]:
    """Exit codes by rank; kills what has not ended after `seconds`, and fails."""
    codes: dict[int, int] = {}
    limit = time.monotonic() + seconds
    while len(codes) < len(processes):
        for process in processes:
            if process not in codes:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    codes[process] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > limit:
            late = [process for process in processes if process not in codes]
            for process in late:
                os.kill(process, signal.SIGKILL)
                ended(process)
            raise AssertionError(f"ranks {[processes.index(process) for process in late]} hang after {seconds} s")
        time.sleep(0.005)
    return [codes[process] for process in processes]


def run_ranks(wanted: Config, ranks: int, **options: Any) -> Path:
    """The run of `wanted` by so many ranks; fails with what they said unless all end well."""
    if ranks == 1:
        assert wanted.parallel == "ddp"
        code = ended(start(wanted))
        assert code == 0, said(wanted)
        return Path(wanted.output)
    try:
        codes = ended_ranks(start_ranks(wanted, ranks, **options))
    except AssertionError as error:
        raise AssertionError(f"{error}\n{said(wanted)}") from None
    assert codes == [0] * ranks, f"{codes}\n{said(wanted)}"
    return Path(wanted.output)


def assert_same_losses(one: Path, other: Path, *, relative: float = 1e-10) -> None:
    """Every step and evaluation of both runs: the same counts, and losses and gradient norms to rounding."""
    left, right = _steps(one), _steps(other)
    assert left.keys() == right.keys()
    assert left
    for place, expected in left.items():
        found = right[place]
        for name in ("loss", "losses", "grad_norm", "held_out", "generated"):
            assert found.get(name) == _near(expected.get(name), relative), f"{place} {name}"
        for name in ("samples", "tokens", "supervised", "pictures", "skipped", "unlabelled", "cut", "lr"):
            assert found.get(name) == expected.get(name), f"{place} {name}"


def _near(value: Any, relative: float) -> Any:
    if isinstance(value, dict):
        return {key: _near(inner, relative) for key, inner in value.items()}
    return pytest.approx(value, rel=relative, abs=1e-15) if isinstance(value, float) else value


def _steps(run: Path) -> dict[tuple[str, int, bool], dict[str, Any]]:
    """One line for each step and each evaluation; a repeated one must be told alike, to rounding."""
    told: dict[tuple[str, int, bool], dict[str, Any]] = {}
    for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        place = line["stage"], line["step"], "held_out" in line
        before = told.setdefault(place, line)
        assert before.get("loss") == _near(line.get("loss"), 1e-10), f"{place} was repeated with another loss"
    return told
