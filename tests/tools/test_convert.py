from __future__ import annotations

import fcntl
import inspect
import io
import json
import os
import random
import resource
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import data_tools.convert as module
import data_tools.one_shard as one
from data_tools.album import unread
from data_tools.cli import main
from data_tools.convert import RejectedRows, Settings, conversion, convert, converted
from data_tools.formats import FORMATS, samples_function
from data_tools.index import index
from data_tools.quality.filter import Rules, filter_set
from data_tools.rows import Rejected
from mmit.api import with_shards
from mmit.config import ConfigError, Source, parse_config
from mmit.data.sample import ImagePart, Sample, SampleError, message
from mmit.data.shards import ShardSet, verify
from tests.tools.conftest import flat, picture_bytes, read_all


def rows_with(photos: Path, count: int, *, bad: tuple[int, ...] = (), gone: tuple[int, ...] = ()) -> Path:
    """LLaVA rows each with its own picture; those of `bad` hold no picture, those of `gone` are not there."""
    rows = []
    for number in range(count):
        name = f"p{number}.png"
        if number not in gone:
            data = picture_bytes(number)
            (photos / name).write_bytes(data[: len(data) // 2] if number in bad else data)
        turns = [{"from": "human", "value": f"<image>\n{number}?"}, {"from": "gpt", "value": f"{number}!"}]
        rows.append({"id": f"r{number}", "image": name, "conversations": turns})
    path = photos.parent / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".arrow"}


SMALL = Settings(rows_per_shard=7)


def test_the_number_of_processes_changes_no_byte(photos: Path, tmp_path: Path) -> None:
    path = rows_with(photos, 30, bad=(3, 21))
    for processes in (1, 3):
        with pytest.raises(RejectedRows):
            convert("llava", path, photos, tmp_path / f"out{processes}", settings=SMALL, processes=processes)
    assert files(tmp_path / "out1") == files(tmp_path / "out3")
    assert list(verify(tmp_path / "out1")) == []


@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_an_interrupted_conversion_goes_on_to_the_same_bytes(
    photos: Path, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows_with(photos, 30)
    convert("llava", path, photos, tmp_path / "straight", settings=SMALL)
    written: list[str] = []
    write = one.write_shard

    def counting(path: Path, samples: Any) -> Any:
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, samples)

    monkeypatch.setattr(one, "write_shard", counting)
    with pytest.raises(KeyboardInterrupt):
        convert("llava", path, photos, tmp_path / "out", settings=SMALL)
    with pytest.raises(SampleError, match="not finished"):
        ShardSet(tmp_path / "out")
    monkeypatch.setattr(one, "write_shard", lambda path, samples: (written.append(path.name), write(path, samples))[1])
    convert("llava", path, photos, tmp_path / "out", settings=SMALL)
    assert files(tmp_path / "out") == files(tmp_path / "straight")
    assert len(written) == 5, "a finished shard is not written again"


def test_another_input_does_not_go_on_with_the_shards_of_the_first(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows_with(photos, 14)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert("llava", path, photos, tmp_path / "out", settings=SMALL)
    path.write_text(path.read_text().replace("3!", "three"))
    shards = convert("llava", path, photos, tmp_path / "out", settings=SMALL)
    assert shards.read(3).messages[1].text == "three"


def test_pictures_of_another_folder_are_never_mixed_with_those_of_the_first(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, others = rows_with(photos, 14), tmp_path / "elsewhere" / "photos"
    others.mkdir(parents=True)
    for number in range(14):
        (others / f"p{number}.png").write_bytes(picture_bytes(100 + number))
    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert("llava", path, photos, tmp_path / "out", settings=SMALL)
    shards = convert("llava", path, others, tmp_path / "out", settings=SMALL)
    assert [shards.read(n).images[0].data for n in range(14)] == [picture_bytes(100 + n) for n in range(14)]
    others.rename(tmp_path / "renamed")
    with pytest.raises(ConfigError, match="another input or other options"):
        convert("llava", path, tmp_path / "renamed", tmp_path / "out", settings=SMALL)


def test_a_picture_replaced_by_one_of_its_size_meanwhile_is_seen(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the plan of a folder does not hold of pictures, their content, an interrupted run sees by their times."""
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.bmp").write_bytes(picture_bytes(number, kind="BMP"))
        (tmp_path / "in" / f"{number}.txt").write_text("t")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert("folder", tmp_path / "in", None, tmp_path / "out")
    (tmp_path / "in" / "1.bmp").write_bytes(picture_bytes(9, kind="BMP"))
    shards = convert("folder", tmp_path / "in", None, tmp_path / "out")
    assert shards.read(1).images[0].data == picture_bytes(9, kind="BMP")


def test_two_conversions_do_not_write_into_one_folder(photos: Path, tmp_path: Path) -> None:
    path = rows_with(photos, 3)
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "UNFINISHED").open("w") as note:
        fcntl.flock(note, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is writing here"):
            convert("llava", path, photos, tmp_path / "out")
    assert len(convert("llava", path, photos, tmp_path / "out")) == 3


def test_whoever_was_killed_at_the_very_start_or_end_is_taken_up(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows_with(photos, 3)
    convert("llava", path, photos, tmp_path / "straight")
    (tmp_path / "out" / ".unfinished").mkdir(parents=True)
    (tmp_path / "out" / "UNFINISHED").touch()
    (tmp_path / "out" / "shard-000000.tar.99.tmp").write_bytes(b"half")
    (tmp_path / "out" / ".unfinished" / "plan.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_tidy", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert("llava", path, photos, tmp_path / "out")
    convert("llava", path, photos, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "straight")


def test_a_shard_that_vanishes_meanwhile_is_not_left_out_silently(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows_with(photos, 20)
    finish = module._finish

    def losing(out: Path, *rest: Any) -> None:
        (out / "shard-000001.tar").unlink()
        finish(out, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", losing)
        with pytest.raises(SampleError, match="of 20 rows only 13 are in finished shards"):
            convert("llava", path, photos, tmp_path / "out", settings=SMALL)
    assert len(convert("llava", path, photos, tmp_path / "out", settings=SMALL)) == 20


def test_rows_beyond_the_last_shard_are_refused_not_left_out(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_SHARDS", 2)
    with pytest.raises(ConfigError, match="more than 2 shards of 7 rows; raise --rows-per-shard"):
        convert("llava", rows_with(photos, 15), photos, tmp_path / "out", settings=SMALL)
    assert len(convert("llava", rows_with(photos, 14), photos, tmp_path / "out", settings=SMALL)) == 14


def test_a_full_disk_is_told_and_leaves_no_half_file(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = rows_with(photos, 60), tmp_path / "out"
    arguments = ["convert", "llava", path, "--images", photos, "--out", out, "--processes", 1]
    monkeypatch.setattr(sys, "argv", ["mmit-data", *map(str, arguments)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"mmit-data: {out}/shard-000000.tar: ")
    assert "make room and give the same command again" in told
    assert list(out.glob("*tar*")) == []
    assert len(convert("llava", path, photos, out)) == 60


@pytest.mark.parametrize("source", ["my data", "数据", "x" * 200, "a/../b"])
def test_a_source_may_be_called_anything(photos: Path, tmp_path: Path, source: str) -> None:
    shards = convert("llava", rows_with(photos, 2), photos, tmp_path / "out", settings=Settings(source=source))
    assert shards.source(1) == source
    assert list(verify(tmp_path / "out")) == []


def test_a_name_that_no_file_can_have_is_a_rejected_row(photos: Path, tmp_path: Path) -> None:
    path = rows_with(photos, 2)
    path.write_text(path.read_text().replace("p1.png", "\\ud800.png"))
    with pytest.raises(RejectedRows, match="half a character"):
        convert("llava", path, photos, tmp_path / "out", settings=Settings(on_missing="drop"))
    assert len(ShardSet(tmp_path / "out")) == 1


def test_a_finished_set_is_found_again_and_never_overwritten(photos: Path, tmp_path: Path) -> None:
    path = rows_with(photos, 3)
    convert("llava", path, photos, tmp_path / "out")
    before = files(tmp_path / "out")
    convert("llava", path, photos, tmp_path / "out")
    with pytest.raises(ConfigError, match="already holds a finished shard set"):
        convert("llava", path, photos, tmp_path / "out", options={"strip": False})
    assert files(tmp_path / "out") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="other files"):
        convert("llava", path, photos, tmp_path / "full")


def test_planted_bad_pictures_are_exactly_the_rejected_rows(photos: Path, tmp_path: Path) -> None:
    bad = (0, 19, 20, 33, 59)
    path = rows_with(photos, 60, bad=bad)
    with pytest.raises(RejectedRows, match="5 of 60 rows rejected"):
        convert("llava", path, photos, tmp_path / "out", settings=SMALL)
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(item["file"], item["row"], item["key"]) for item in rejected] == [("rows.json", n, f"r{n}") for n in bad]
    assert all(f"p{item['row']}.png" in item["reason"] for item in rejected)
    samples = read_all(ShardSet(tmp_path / "out"))
    assert [sample.meta["id"] for sample in samples] == [f"r{n}" for n in range(60) if n not in bad]
    summary = conversion(tmp_path / "out")
    assert summary is not None
    assert summary["rows"] == 60 == summary["samples"] + summary["rejected"]


def test_dropping_bad_rows_ends_well_and_asks_no_second_time(photos: Path, tmp_path: Path) -> None:
    path = rows_with(photos, 10, bad=(4,))
    with pytest.raises(RejectedRows, match="on-bad drop"):
        convert("llava", path, photos, tmp_path / "out")
    before = files(tmp_path / "out")
    assert len(convert("llava", path, photos, tmp_path / "out", settings=Settings(on_bad="drop"))) == 9
    assert files(tmp_path / "out") == before


def test_all_missing_pictures_are_told_at_once_before_anything_is_written(photos: Path, tmp_path: Path) -> None:
    gone = (1, 5, 8, 13, 21, 34, 49)
    path = rows_with(photos, 50, gone=gone, bad=(2,))
    with pytest.raises(ConfigError) as caught:
        convert("llava", path, photos, tmp_path / "out")
    text = str(caught.value)
    assert "7 files named by 7 rows are missing" in text
    assert all(f"p{n}.png   (rows.json[{n}] (id r{n}))" in text for n in gone)
    assert "p2.png" not in text
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize(
    ("name", "options", "remedy"),
    [
        ("data/0.png", {}, "--set image_prefix=data/ "),
        ("a/b/deep/5.jpg", {}, "--set image_prefix=a/b/ "),
        ("x/data/0.png", {"image_prefix": "x/"}, "--set image_prefix=x/data/ "),
        ("5.jpg", {}, "--images {photos}/deep "),
        ("deep\\5.jpg", {}, "Write / for \\ in the names: deep/5.jpg is there"),
        ("0.PNG", {}, "Write the names as the files have them: 0.png is there, 0.PNG is not"),
        ("9.png", {}, "Check --images"),
    ],
)
def test_a_picture_that_lies_close_by_is_pointed_at(
    photos: Path, tmp_path: Path, name: str, options: dict[str, str], remedy: str
) -> None:
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "rows.json").write_text(
        json.dumps([{"image": item, "conversations": turns} for item in ("gone", name)])
    )
    with pytest.raises(ConfigError) as caught:
        convert("llava", tmp_path / "rows.json", photos, tmp_path / "out", options=options)
    assert remedy.format(photos=photos) in str(caught.value)


def test_a_picture_named_by_its_whole_path_is_answered_with_the_prefix_that_finds_it(
    photos: Path, tmp_path: Path
) -> None:
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    rows = [{"image": name, "conversations": turns} for name in (f"{photos}/deep/5.jpg", f"{tmp_path}/x.jpg")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(RejectedRows) as caught:
        convert("llava", tmp_path / "rows.json", photos, tmp_path / "out")
    assert (
        "5.jpg' is named by a whole path; write it below the images folder, or take the beginning away with --set "
        f"image_prefix={photos}/" in str(caught.value)
    )
    assert "x.jpg' would be read from outside the images folder" in str(caught.value)
    good = {"options": {"image_prefix": f"{photos}/"}, "settings": Settings(on_bad="drop")}
    assert len(convert("llava", tmp_path / "rows.json", photos, tmp_path / "good", **good)) == 1


@pytest.mark.parametrize("length", [300, 5000])
def test_a_picture_named_by_its_bytes_rejects_the_row_and_no_more(photos: Path, tmp_path: Path, length: int) -> None:
    """As base64 without `data:`; a name too long for the system ended the command without a row."""
    path = rows_with(photos, 3)
    rows = json.loads(path.read_text())
    rows[1]["image"] = "A" * length
    path.write_text(json.dumps(rows))
    said = "is named by a text of 5,000 characters" if length > 4096 else "1 file named by 1 row is missing"
    with pytest.raises(RejectedRows if length > 4096 else ConfigError, match=said):
        convert("llava", path, photos, tmp_path / "out")


def test_shards_are_not_written_into_the_folder_that_is_read(photos: Path, tmp_path: Path) -> None:
    """The folder would change: an interrupted conversion began anew, and the shards were data the second time."""
    (photos / "0.txt").write_text("a caption")
    for out in (photos, photos / "shards"):
        with pytest.raises(ConfigError, match="lies inside the input"):
            convert("folder", photos, None, out, settings=Settings(on_bad="drop"))
    assert not (photos / "shards").exists()


def test_missing_pictures_can_drop_the_row_or_leave_its_text(photos: Path, tmp_path: Path) -> None:
    path = rows_with(photos, 4, gone=(1,))
    dropped = convert("llava", path, photos, tmp_path / "a", settings=Settings(on_missing="drop"))
    assert [sample.meta["id"] for sample in read_all(dropped)] == ["r0", "r2", "r3"]
    assert "p1.png is missing" in (tmp_path / "a" / "rejected.jsonl").read_text()
    kept = convert("llava", path, photos, tmp_path / "b", settings=Settings(on_missing="text-only"))
    assert flat(kept.read(1)) == [("user", ["1?"]), ("assistant", ["1!"])]
    assert flat(kept.read(2)) == [("user", [0, "\n2?"]), ("assistant", ["2!"])]
    summary = conversion(tmp_path / "b")
    assert summary is not None
    assert summary["without_pictures"] == 1


def test_dropping_missing_pictures_accepts_no_other_loss(photos: Path, tmp_path: Path) -> None:
    path = rows_with(photos, 6, gone=(1,), bad=(4,))
    with pytest.raises(RejectedRows, match="2 of 6 rows rejected"):
        convert("llava", path, photos, tmp_path / "a", settings=Settings(on_missing="drop"))
    summary = conversion(tmp_path / "a")
    assert summary is not None
    assert (summary["rejected"], summary["missing"]) == (2, 1)


def test_no_decode_leaves_damage_below_the_header_unseen(photos: Path, tmp_path: Path) -> None:
    path = rows_with(photos, 5, bad=(2,))
    settings = Settings(decode=False, keep_metadata=True)
    assert len(convert("llava", path, photos, tmp_path / "out", settings=settings)) == 5


# Sources of a config --------------------------------------------------------------------------------------------------


def test_a_source_is_converted_once_until_its_content_changes(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows_with(photos, 3)
    calls: list[str] = []
    write = one.write_shard
    monkeypatch.setattr(one, "write_shard", lambda path, samples: (calls.append(path.name), write(path, samples))[1])
    source = Source.model_validate({"llava": str(path), "images": str(photos)})
    first = converted(source, tmp_path / "cache")
    assert converted(source, tmp_path / "cache") == first
    assert len(calls) == 1
    data = picture_bytes(99)
    (photos / "p0.png").write_bytes(data)
    second = converted(source, tmp_path / "cache")
    assert second != first
    path.write_text(path.read_text().replace("0!", "zero"))
    third = converted(source, tmp_path / "cache")
    fourth = converted(source.model_copy(update={"options": {"strip": False}}), tmp_path / "cache")
    assert len({first, second, third, fourth}) == 4 == len(calls)


def test_two_at_once_convert_once(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rows_with(photos, 20)
    calls: list[str] = []
    write = one.write_shard
    monkeypatch.setattr(one, "write_shard", lambda path, samples: (calls.append(path.name), write(path, samples))[1])
    source = Source.model_validate({"llava": str(path), "images": str(photos)})
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: converted(source, tmp_path / "cache"), range(4)))
    assert len(folders) == 1 == len(calls)


def test_a_source_with_bad_rows_stops_every_time_unless_the_config_drops_them(photos: Path, tmp_path: Path) -> None:
    path = rows_with(photos, 5, bad=(1,))
    source = Source.model_validate({"llava": str(path), "images": str(photos)})
    for _ in range(2):
        with pytest.raises(RejectedRows):
            converted(source, tmp_path / "cache")
    dropping = source.model_copy(update={"options": {"on_bad": "drop"}})
    assert len(ShardSet(converted(dropping, tmp_path / "cache"))) == 4


def test_what_a_conversion_left_out_is_told_of_sets_made_from_its_own_too(photos: Path, tmp_path: Path) -> None:
    convert("llava", rows_with(photos, 5, bad=(1,)), photos, tmp_path / "set", settings=Settings(on_bad="drop"))
    filter_set(tmp_path / "set", tmp_path / "fewer", Rules(most_turns=9))
    filter_set(tmp_path / "fewer", tmp_path / "fewest", Rules(most_turns=8))
    for made in ("fewer", "fewest"):
        assert list(module.losses(tmp_path / made)) == ["1 of 5 rows are rejected and left out"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"on_bad": "drop", "on_missing": "drop"}, "rows.json: 2 of 5 rows are rejected and left out, listed in "),
        ({"on_bad": "drop", "on_missing": "text-only"}, "rows.json: 1 samples lost a missing picture and kept their"),
    ],
)
def test_a_run_says_each_time_what_conversion_has_left_out_of_its_source(
    photos: Path, tmp_path: Path, options: dict[str, str], told: str
) -> None:
    path = rows_with(photos, 5, bad=(1,), gone=(2,))
    source = {"llava": str(path), "images": str(photos), "options": options}
    tree = {
        "output": str(tmp_path / "run"),
        "cache": str(tmp_path / "cache"),
        "model": {"language": {"random": {}}},
        "stages": [{"name": "sft", "data": [source], "train": {"language": {"lr": 1}}, "batch_size": 1}],
    }
    for _ in range(2):
        lines: list[str] = []
        with_shards(parse_config(tree, "config"), say=lines.append)
        assert sum(line.startswith(told) for line in lines) == 1


def test_a_run_says_once_what_is_left_out_of_the_shards_it_is_given(photos: Path, tmp_path: Path) -> None:
    path = rows_with(photos, 5, bad=(1,))
    convert("llava", path, photos, tmp_path / "set", settings=Settings(on_bad="drop"))
    tars = tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tars / "0.tar", "w") as tar:
        for name, content in (("a.png", picture_bytes()), ("a.txt", b"a thing"), ("b.png", b"none"), ("b.txt", b"b")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    index(tars, on_bad="drop")
    stages = [
        {
            "name": name,
            "data": [{"shards": str(tmp_path / "set")}, {"shards": str(tars)}, {"shards": "memory://far/set"}],
            "train": {"language": {"lr": 1}},
            "batch_size": 1,
        }
        for name in ("one", "two")
    ]
    tree = {"output": str(tmp_path / "run"), "model": {"language": {"random": {}}}, "stages": stages}
    lines: list[str] = []
    with_shards(parse_config(tree, "config"), say=lines.append)
    assert lines == [
        f"set: 1 of 5 rows are rejected and left out, listed in {tmp_path / 'set' / 'rejected.jsonl'}",
        f"tars: 1 samples of its tars are rejected and left out, listed in {tars / 'rejected.jsonl'}",
    ]


def test_an_option_may_be_a_long_text(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = len(picture_bytes())
        tar.addfile(member, io.BytesIO(picture_bytes()))
        member = tarfile.TarInfo("a.txt")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    prompt = "What is it? " * 400
    samples = convert("webdataset", tmp_path / "0.tar", None, tmp_path / "set", options={"prompt": prompt})
    assert samples.read(0).messages[0].text.strip() == prompt.strip()


def test_a_damaged_account_of_a_conversion_is_named(photos: Path, tmp_path: Path) -> None:
    convert("llava", rows_with(photos, 2), photos, tmp_path / "set")
    (tmp_path / "set" / "conversion.json").write_text("{")
    with pytest.raises(SampleError, match=r"set/conversion.json: damaged"):
        conversion(tmp_path / "set")


def test_synthetic_samples_depend_on_seed_and_number_alone(tmp_path: Path) -> None:
    def made(**options: Any) -> list[Sample]:
        source = Source.model_validate({"synthetic": "shapes", "options": options})
        return read_all(ShardSet(converted(source, tmp_path / "cache")))

    ten, five, other = made(count=10), made(count=5), made(count=5, seed=1)
    assert [flat(sample) for sample in ten[:5]] == [flat(sample) for sample in five]
    assert [sample.images[0].sha256 for sample in ten[:5]] == [sample.images[0].sha256 for sample in five]
    assert [sample.images[0].sha256 for sample in five] != [sample.images[0].sha256 for sample in other]


def test_synthetic_answers_are_true(tmp_path: Path) -> None:
    source = Source.model_validate({"synthetic": "shapes", "options": {"count": 40, "questions": 4}})
    for sample in read_all(ShardSet(converted(source, tmp_path))):
        answers = {sample.messages[n].text.strip(): sample.messages[n + 1].text for n in (0, 2, 4, 6)}
        assert answers.pop("Which shape is shown?") == sample.meta["shape"]
        assert answers.pop("What colour is the shape?") == sample.meta["colour"]
        assert answers.pop("What colour is the ground?") == sample.meta["ground"]
        ((question, answer),) = answers.items()
        assert (answer == "yes") == (str(sample.meta["shape"]) in question)


# Formats of one's own -------------------------------------------------------------------------------------------------


def own_format(path: Path, images: Path | None = None, *, shout: bool = False) -> Iterator[Sample | Rejected]:
    for number, line in enumerate(path.read_text().splitlines()):
        if not line:
            yield Rejected(path.name, number, "", f"{path.name}:{number}: an empty line")
            continue
        text = line.upper() if shout else line
        yield Sample(
            f"my.key/{number}",
            "mine",
            (message("user", ImagePart(0), "What?"), message("assistant", text)),
            (unread(picture_bytes(number), f"{path.name}:{number}"),),
        )


def test_a_format_of_ones_own_is_named_by_module_and_function(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\n\ntwo\n")
    name = f"{__name__}:own_format"
    settings = Settings(on_bad="drop")
    shards = convert(name, tmp_path / "in.txt", None, tmp_path / "o", options={"shout": True}, settings=settings)
    assert [sample.messages[1].text for sample in read_all(shards)] == ["ONE", "TWO"]
    assert [sample.meta["key"] for sample in read_all(shards)] == ["my.key/0", "my.key/2"]
    assert shards.source(0) == "mine"
    with pytest.raises(ConfigError, match="unknown option 'shuot'; did you mean shout"):
        convert(name, tmp_path / "in.txt", None, tmp_path / "p", options={"shuot": True})
    with pytest.raises(ConfigError, match="holds no nothing"):
        convert(f"{__name__}:nothing", tmp_path / "in.txt", None, tmp_path / "p")


def test_an_edit_of_a_format_of_ones_own_is_another_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "my_own_format.py"
    code.write_text(
        "from mmit.data.sample import Sample, message\n"
        "def samples(path, images=None):\n"
        "    yield Sample('', '', (message('assistant', 'one'),))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "in.txt").write_text("x")
    convert("my_own_format:samples", tmp_path / "in.txt", None, tmp_path / "out")
    code.write_text(code.read_text().replace("one", "two"))
    with pytest.raises(ConfigError, match="another input or other options"):
        convert("my_own_format:samples", tmp_path / "in.txt", None, tmp_path / "out")


@pytest.mark.parametrize(
    ("meta", "found"), [({"x": object()}, "cannot be stored as JSON"), ({"x": "\ud800"}, "cannot be stored as JSON")]
)
def test_what_cannot_be_stored_is_rejected_and_not_a_crash(
    tmp_path: Path, meta: dict[str, Any], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(path: Path, images: Path | None = None) -> Iterator[Sample]:
        yield Sample("", "", (message("assistant", "a"),), (), meta)
        yield Sample("", "", (message("assistant", "b"),))

    monkeypatch.setattr("tests.tools.test_convert.own_format", odd)
    (tmp_path / "in.txt").write_text("x")
    with pytest.raises(RejectedRows, match=found):
        convert(f"{__name__}:own_format", tmp_path / "in.txt", None, tmp_path / "out")
    assert len(ShardSet(tmp_path / "out")) == 1


def test_an_unknown_format_is_answered_with_the_nearest_and_the_list(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'llava'"):
        convert("lava", tmp_path, None, tmp_path / "out")
    assert not os.path.exists(tmp_path / "out")


def test_no_option_of_a_format_hides_a_setting_of_every_conversion() -> None:
    for name in FORMATS:
        parameters = inspect.signature(samples_function(name)).parameters
        assert parameters.keys() & Settings.__dataclass_fields__.keys() == set(), name


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bytes_and_leaves_nobody_running(
    photos: Path, tmp_path: Path
) -> None:
    path, out = rows_with(photos, 400), tmp_path / "out"
    convert("llava", path, photos, tmp_path / "straight", settings=Settings(rows_per_shard=4))
    arguments = [sys.executable, "-m", "data_tools.cli", "convert", "llava", str(path), "--images", str(photos)]
    arguments += ["--out", str(out), "--rows-per-shard", "4", "--processes", "2"]
    sessions, draw = [], random.Random(0)
    for kills in range(9):
        worker = subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        sessions.append(worker.pid)
        enough = kills * 10 + draw.randrange(10) if kills < 8 else 10**9
        while worker.poll() is None:
            if len(list(out.glob("*.tar"))) >= enough:
                worker.kill()
            time.sleep(0.02)
        worker.wait()
    assert files(out) == files(tmp_path / "straight")
    deadline = time.monotonic() + 20
    while set(map(str, sessions)) & set(subprocess.check_output(["ps", "-eo", "sid="], text=True).split()):
        assert time.monotonic() < deadline, "a worker outlived its conversion"
        time.sleep(0.5)
