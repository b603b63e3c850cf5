"""Laws of dealing out work: heavy jobs do not pile up before processes that are slower than their reader."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools import workers
from data_tools.workers import in_order


def slowly(number: int, folder: Path) -> int:
    time.sleep(0.05)
    (folder / str(number)).touch()
    return number


@pytest.mark.parametrize(("size", "most"), [(10, 1), (3, 3), (0, 6)])
def test_no_more_bytes_wait_than_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, most: int) -> None:
    monkeypatch.setattr(workers, "MOST_WAITING", 9)
    seen = 0

    def jobs() -> Iterator[tuple[int, Path]]:
        nonlocal seen
        for number in range(60):
            ahead = number - len(list(tmp_path.iterdir()))
            seen = max(seen, ahead)
            yield number, tmp_path

    found = list(in_order(slowly, jobs(), 4, preload="time", weigh=lambda *_: size))
    assert found == list(range(60))
    assert seen <= most + 2, "those that wait, the one just drawn and one not yet seen to be done"
    assert seen >= most, "though more may wait"
