from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from data_tools.convert import RejectedRows, Settings, convert
from data_tools.merge import merge
from mmit.config import ConfigError
from mmit.data.sample import SampleError
from mmit.data.shards import ShardSet, verify
from tests.tools.test_convert import files, rows_with

SMALL = Settings(rows_per_shard=7, on_bad="drop")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_merge_to_the_bytes_of_one_run(photos: Path, tmp_path: Path, parts: int) -> None:
    path = rows_with(photos, 40, bad=(3, 30))
    convert("llava", path, photos, tmp_path / "whole", settings=SMALL)
    folders = []
    for i in range(parts):
        folders.append(tmp_path / f"part{i}")
        convert("llava", path, photos, folders[-1], settings=SMALL, part=(i + 1, parts))
    merge(list(reversed(folders)), tmp_path / "merged")
    assert files(tmp_path / "merged") == files(tmp_path / "whole")
    assert list(verify(tmp_path / "merged")) == []


def test_rejected_rows_of_parts_come_in_the_order_of_one_run(photos: Path, tmp_path: Path) -> None:
    rows = json.loads(rows_with(photos, 20, bad=(1, 5, 8, 13, 14)).read_text())
    (tmp_path / "in" / "b").mkdir(parents=True)
    (tmp_path / "in" / "a").mkdir()
    (tmp_path / "in" / "a" / "z.json").write_text(json.dumps(rows[:10]))
    (tmp_path / "in" / "b" / "c.json").write_text(json.dumps(rows[10:]))
    settings = Settings(rows_per_shard=3, on_bad="drop")
    convert("llava", tmp_path / "in", photos, tmp_path / "whole", settings=settings)
    for i in range(3):
        convert("llava", tmp_path / "in", photos, tmp_path / f"p{i}", settings=settings, part=(i + 1, 3))
    merge([tmp_path / f"p{i}" for i in range(3)], tmp_path / "merged")
    assert files(tmp_path / "merged") == files(tmp_path / "whole")


def test_parts_made_from_folders_of_other_names_merge(photos: Path, tmp_path: Path) -> None:
    path = rows_with(photos, 20)
    convert("llava", path, photos, tmp_path / "p1", settings=SMALL, part=(1, 2))
    photos.rename(tmp_path / "fotos")
    convert("llava", path, tmp_path / "fotos", tmp_path / "p2", settings=SMALL, part=(2, 2))
    assert len(merge([tmp_path / "p1", tmp_path / "p2"], tmp_path / "m")) == 20


def test_parts_made_from_copies_of_one_folder_merge(photos: Path, tmp_path: Path) -> None:
    """Another machine has its own times, and what its system left in the folder."""
    for number in range(5):
        (photos / f"{number}.txt").write_text(f"Picture {number}.")
    (photos / "deep" / "5.txt").write_text("Picture 5.")
    small = Settings(rows_per_shard=2, on_bad="drop")
    convert("folder", photos, None, tmp_path / "whole", settings=small)
    convert("folder", photos, None, tmp_path / "p1", settings=small, part=(1, 2))
    copy = tmp_path / "elsewhere" / "photos"
    shutil.copytree(photos, copy)
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    (copy / "._0.jpg").write_bytes(b"left by a system")
    (copy / ".trash").mkdir()
    (copy / ".trash" / "0.txt").write_text("gone")
    convert("folder", copy, None, tmp_path / "p2", settings=small, part=(2, 2))
    merge([tmp_path / "p1", tmp_path / "p2"], tmp_path / "m")
    assert files(tmp_path / "m") == files(tmp_path / "whole")


@pytest.mark.parametrize("name", ["1.txt", "1.png", "notes.bin"])
def test_parts_made_from_folders_that_differ_do_not(photos: Path, tmp_path: Path, name: str) -> None:
    for number in range(5):
        (photos / f"{number}.txt").write_text(f"Picture {number}.")
    (photos / "deep" / "5.txt").write_text("Picture 5.")
    (photos / "notes.bin").write_bytes(b"12")
    small = Settings(rows_per_shard=2, on_bad="drop")
    convert("folder", photos, None, tmp_path / "p1", settings=small, part=(1, 2))
    data = (photos / name).read_bytes()
    (photos / name).write_bytes(data + b"x" if name.endswith(".png") else bytes(reversed(data)))
    convert("folder", photos, None, tmp_path / "p2", settings=small, part=(2, 2))
    with pytest.raises(ConfigError, match="different inputs or options"):
        merge([tmp_path / "p1", tmp_path / "p2"], tmp_path / "m")


def test_more_parts_than_shards_still_merge(photos: Path, tmp_path: Path) -> None:
    path = rows_with(photos, 10)
    convert("llava", path, photos, tmp_path / "whole", settings=SMALL)
    folders = [tmp_path / f"part{i}" for i in range(4)]
    for i, folder in enumerate(folders):
        convert("llava", path, photos, folder, settings=SMALL, part=(i + 1, 4))
    merge(folders, tmp_path / "merged")
    assert files(tmp_path / "merged") == files(tmp_path / "whole")


def test_a_missing_or_foreign_part_is_refused(photos: Path, tmp_path: Path) -> None:
    path = rows_with(photos, 20)
    for i in (1, 2):
        convert("llava", path, photos, tmp_path / f"p{i}", settings=SMALL, part=(i, 2))
    other = Settings(rows_per_shard=5)
    convert("llava", path, photos, tmp_path / "other", settings=other, part=(2, 2))
    with pytest.raises(ConfigError, match="these are here: 1;"):
        merge([tmp_path / "p1"], tmp_path / "m")
    with pytest.raises(ConfigError, match="different inputs or options"):
        merge([tmp_path / "p1", tmp_path / "other"], tmp_path / "m")


def test_sets_of_different_origin_follow_each_other(photos: Path, tmp_path: Path) -> None:
    path = rows_with(photos, 10)
    a = convert("llava", path, photos, tmp_path / "a", settings=Settings(source="a", rows_per_shard=7))
    b = convert("llava", path, photos, tmp_path / "b", settings=Settings(source="b", rows_per_shard=7))
    merged = merge([tmp_path / "b", tmp_path / "a"], tmp_path / "m")
    assert [merged.read(n) for n in range(20)] == [b.read(n) for n in range(10)] + [a.read(n) for n in range(10)]
    with pytest.raises(SampleError, match="--source"):
        merge([tmp_path / "a", tmp_path / "a"], tmp_path / "n")


def test_a_cut_or_changed_tar_is_always_found(photos: Path, tmp_path: Path) -> None:
    convert("llava", rows_with(photos, 5), photos, tmp_path / "set")
    tar = tmp_path / "set" / "shard-000000.tar"
    whole = tar.read_bytes()
    random.seed(0)
    for _ in range(200):
        end = random.randrange(len(whole))
        tar.write_bytes(whole[:end])
        with pytest.raises(SampleError, match=r"shard-000000\.tar"):
            ShardSet(tmp_path / "set")
        assert next(verify(tmp_path / "set"), None) is not None
    for _ in range(20):
        place = random.randrange(len(whole))
        tar.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert next(verify(tmp_path / "set"), None) is not None


def test_our_tars_are_ordinary(photos: Path, tmp_path: Path) -> None:
    convert("llava", rows_with(photos, 3), photos, tmp_path / "set")
    listed = subprocess.run(
        ["tar", "tf", str(tmp_path / "set" / "shard-000000.tar")], capture_output=True, text=True, check=True
    ).stdout.split()
    assert listed == [f"rows-00000000{n}.{ending}" for n in range(3) for ending in ("json", "0.png")]


def test_rejections_survive_merging(photos: Path, tmp_path: Path) -> None:
    path = rows_with(photos, 20, bad=(1, 8))
    for i in (1, 2):
        with pytest.raises(RejectedRows):
            convert("llava", path, photos, tmp_path / f"p{i}", settings=Settings(rows_per_shard=7), part=(i, 2))
    merge([tmp_path / "p1", tmp_path / "p2"], tmp_path / "m")
    assert len((tmp_path / "m" / "rejected.jsonl").read_text().splitlines()) == 2
    assert os.path.exists(tmp_path / "p1" / "rejected.jsonl"), "the parts stay"


def dying(function: Callable[..., Any], left: Iterator[int]) -> Callable[..., Any]:
    """The function, the call of which that finds nothing left is the last of the process, as by kill -9."""

    def call(*arguments: Any, **more: Any) -> Any:
        if next(left) == 0:
            os._exit(9)
        return function(*arguments, **more)

    return call


def merge_killed_at_every_call(parts: list[Path], out: Path, *, copied: bool) -> int:
    """Merges into `out`-1, `out`-2, ..., killed at the first, second, ... call that changes the folder, and then once
    more unharmed; gives how many. To be run by a process of its own."""
    merge(parts, out.with_name(f"{out.name}-0"))  # so that no child has to import anything
    for number in count(1):
        statuses = []
        for calls in (range(number), None):
            child = os.fork()
            if child == 0:
                if calls is not None:
                    left = iter(reversed(calls))
                    for name in ("link", "replace", "unlink", "mkdir", "rmdir", "fsync", "open"):
                        setattr(os, name, dying(getattr(os, name), left))
                if copied:
                    os.link = Mock(side_effect=OSError)
                merge(parts, out.with_name(f"{out.name}-{number}"))
                os._exit(0)
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        assert statuses in ([9, 0], [0, 0])
        if statuses[0] == 0:
            return number
    raise AssertionError


@pytest.mark.parametrize("copied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_merge_killed_anywhere_is_finished_by_the_same_command(photos: Path, tmp_path: Path, copied: bool) -> None:
    path = rows_with(photos, 20, bad=(1, 8))
    parts = [tmp_path / f"p{i}" for i in (1, 2)]
    for i, part in enumerate(parts, start=1):
        convert("llava", path, photos, part, settings=SMALL, part=(i, 2))
    convert("llava", path, photos, tmp_path / "whole", settings=SMALL)
    code = (
        "from pathlib import Path; from tests.tools.test_merge import merge_killed_at_every_call as f; "
        f"print(f([Path(p) for p in {list(map(str, parts))!r}], Path({str(tmp_path / 'm')!r}), copied={copied}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 10
    for number in range(1, int(ran.stdout) + 1):
        found = {name: data for name, data in files(tmp_path / f"m-{number}").items() if ".arrow." not in name}
        assert found == files(tmp_path / "whole"), f"killed at call {number}"


def test_an_unfinished_merge_of_others_is_begun_anew(photos: Path, tmp_path: Path) -> None:
    path = rows_with(photos, 20)
    for name in "ab":
        convert("llava", path, photos, tmp_path / name, settings=Settings(source=name, rows_per_shard=7))
    with pytest.raises(SampleError, match="--source"):
        merge([tmp_path / "a", tmp_path / "a"], tmp_path / "m")
    merged = merge([tmp_path / "b", tmp_path / "a"], tmp_path / "m")
    assert merged.key(0).startswith("b-")
    with pytest.raises(ConfigError, match="already holds a finished shard set"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")


def test_a_merge_touches_no_folder_of_other_things(photos: Path, tmp_path: Path) -> None:
    convert("llava", rows_with(photos, 3), photos, tmp_path / "a")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "shard-000000.tar").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        merge([tmp_path / "a"], tmp_path / "m")
    assert (tmp_path / "m" / "shard-000000.tar").read_text() == "mine"
