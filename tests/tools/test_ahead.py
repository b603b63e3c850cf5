"""Laws of looking at all rows first: each batch is dealt out once, and what is missing is told in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import pytest

from data_tools import ahead
from data_tools.ahead import Missed, Rows, looked_at
from data_tools.convert import convert
from data_tools.rows import Rejected
from data_tools.workers import Team
from mmit.config import ConfigError
from mmit.data.sample import SampleError
from mmit.data.shards import ShardSet
from tests.tools.test_convert import SMALL, files, rows_with


class Busy(Team[tuple[int, int]]):
    """Processes that are free whenever the pattern says so."""

    def __init__(self, pattern: str) -> None:
        super().__init__(1, "time")
        self.pattern = cycle(pattern)

    def free(self, size: int = 0) -> bool:
        return next(self.pattern) == "1"


def batches() -> Iterator[tuple[int, Rows]]:
    for number in range(1, 20, 2):
        yield number, [Rejected("f", number, "", "why")] * 3


@pytest.mark.parametrize("pattern", ["0", "1", "01", "100", "0000001"])
@pytest.mark.parametrize("room", [0, 30_000, 2**30])
def test_each_batch_is_dealt_out_once(monkeypatch: pytest.MonkeyPatch, pattern: str, room: int) -> None:
    monkeypatch.setattr(ahead, "MOST_KEPT", room)
    found = list(looked_at(batches, Missed(Path("f"), Path("."), None), 3, Busy(pattern)))
    assert sorted(found, key=lambda batch: batch[0]) == list(batches())


@pytest.mark.parametrize("room", [0, 2**20])
def test_with_other_processes_and_little_room_the_bytes_are_the_same(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    path = rows_with(photos, 30)
    convert("llava", path, photos, tmp_path / "straight", settings=SMALL)
    monkeypatch.setattr(ahead, "MOST_KEPT", room)
    for processes in (1, 2):
        convert("llava", path, photos, tmp_path / str(processes), settings=SMALL, processes=processes)
        assert files(tmp_path / str(processes)) == files(tmp_path / "straight")


def test_what_others_finished_before_a_picture_was_found_missing_is_kept_for_the_same_command(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = rows_with(photos, 30, gone=(29,)), tmp_path / "out"
    look, free = Missed.look, Team.free

    def once(happened: Callable[[], bool]) -> bool:
        begun = time.monotonic()
        while not happened():
            assert time.monotonic() < begun + 60
            time.sleep(0.01)
        return True

    def late(self: Missed, items: Rows, first: int) -> None:
        if first == 28 and not (photos / "p29.png").exists():
            once((out / ".unfinished" / "000001.json").exists)
        look(self, items, first)

    monkeypatch.setattr(Missed, "look", late)
    monkeypatch.setattr(Team, "free", lambda self, size=0: once(lambda: free(self, size)))
    with pytest.raises(ConfigError, match=r"1 file named by 1 row is missing[^\0]*p29.png"):
        convert("llava", path, photos, out, settings=SMALL, processes=2)
    with pytest.raises(SampleError, match="its writing was not finished: convert again"):
        ShardSet(out)
    finished = (out / "shard-000001.tar").stat().st_mtime_ns

    (photos / "p29.png").write_bytes((photos / "p0.png").read_bytes())
    convert("llava", path, photos, out, settings=SMALL, processes=2)
    assert (out / "shard-000001.tar").stat().st_mtime_ns == finished
    monkeypatch.undo()
    convert("llava", path, photos, tmp_path / "straight", settings=SMALL)
    assert files(out) == files(tmp_path / "straight")
