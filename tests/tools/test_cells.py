"""Pictures inside tables and tars travel as places, not as bytes, and come back byte for byte."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.cells import SMALL
from data_tools.convert import RejectedRows, Settings, convert
from data_tools.formats import samples_of
from data_tools.merge import merge
from tests.tools.conftest import picture_bytes, read_all

LARGE = (90, 80)


def table(path: Path, *, rows: int = 23, group: int = 5) -> list[list[bytes]]:
    """A parquet file of `rows` rows, `group` in a row group, with one or two large pictures and a small one each."""
    shown = [
        [picture_bytes(100 * n + m, size=LARGE) for m in range(1 + n % 2)] + [picture_bytes(n)] for n in range(rows)
    ]
    assert all(len(pictures[0]) > SMALL > len(pictures[-1]) for pictures in shown)
    listed = [
        {
            "images": [{"bytes": data, "path": None} for data in pictures],
            "texts": [{"user": "q", "assistant": f"a{number}"}],
        }
        for number, pictures in enumerate(shown)
    ]
    pq.write_table(pa.Table.from_pylist(listed), path, row_group_size=group)
    return shown


def tar(path: Path, *, count: int = 6) -> list[list[bytes]]:
    shown = [[picture_bytes(n, size=LARGE)] for n in range(count)]
    with tarfile.open(path, "w") as stream:
        for number, (data,) in enumerate(shown):
            for ending, content in (("png", data), ("txt", b"t")):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                stream.addfile(member, io.BytesIO(content))
    return shown


@pytest.mark.parametrize(("format", "make"), [("cauldron", table), ("webdataset", tar)])
def test_rows_are_read_without_keeping_a_large_picture(tmp_path: Path, format: str, make: Any) -> None:
    path = tmp_path / ("in.tar" if format == "webdataset" else "in.parquet")
    make(path)
    for sample in samples_of(format, path, None, {}):
        assert all(picture.data is None or len(picture.data) <= SMALL for picture in sample.images)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("format", "make"), [("cauldron", table), ("webdataset", tar)])
def test_their_pictures_come_back_byte_for_byte(
    tmp_path: Path, format: str, make: Any, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of 3 rows begin and end inside of row groups of 5."""
    path = tmp_path / ("in.tar" if format == "webdataset" else "in.parquet")
    shown = make(path)
    monkeypatch.chdir(tmp_path)
    settings = Settings(rows_per_shard=3)
    shards = convert(format, Path(path.name), None, tmp_path / "out", settings=settings, processes=processes)
    assert [[picture.data for picture in sample.images] for sample in read_all(shards)] == shown


def test_parts_of_a_table_merge_to_its_rows(tmp_path: Path) -> None:
    shown = table(tmp_path / "in.parquet")
    parts = [tmp_path / f"p{i}" for i in (1, 2, 3)]
    for i, part in enumerate(parts, start=1):
        convert("cauldron", tmp_path / "in.parquet", None, part, settings=Settings(rows_per_shard=2), part=(i, 3))
    merged = merge(parts, tmp_path / "m")
    assert [[picture.data for picture in sample.images] for sample in read_all(merged)] == shown


def test_two_columns_of_pictures_are_read_side_by_side(tmp_path: Path) -> None:
    rows = [{f"image_{side}": picture_bytes(2 * n + (side == "b"), size=LARGE) for side in "ab"} for n in range(5)]
    listed = [row | {"question": "q", "answer": "a"} for row in rows]
    pq.write_table(pa.Table.from_pylist(listed), tmp_path / "in.parquet")
    for side in "ab":
        shards = convert("table", tmp_path / "in.parquet", None, tmp_path / side, options={"image": f"image_{side}"})
        assert [sample.images[0].data for sample in read_all(shards)] == [row[f"image_{side}"] for row in rows]


def test_a_picture_that_is_none_is_rejected_with_its_row(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": data, "path": "x"}, "text": "t"} for data in (picture_bytes(0, size=LARGE), b"\0" * 30000)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    with pytest.raises(RejectedRows, match=r"in\.parquet\[1\]: 30,000 bytes that are no readable picture"):
        convert("table", tmp_path / "in.parquet", None, tmp_path / "out")
