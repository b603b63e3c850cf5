"""Laws of tars indexed where they lie: the samples that conversion makes, nothing followed, nothing dropped unnamed."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import random
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_tools.cli import app
from data_tools.convert import RejectedRows, Settings, convert
from data_tools.index import index
from data_tools.merge import merge
from mmit.config import ConfigError
from mmit.data.sample import SampleError
from mmit.data.shards import ShardSet, verify, write_shards
from tests.data.pictures import mixed
from tests.tools.conftest import picture_bytes, read_all

Members = Sequence[tuple[str, bytes | tarfile.TarInfo]]


def tar_of(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content) if isinstance(content, bytes) else 0
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[str, tarfile.TarInfo]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


def many(count: int, first: int = 0) -> Members:
    """Captions, chats with two pictures, questions, endings in both cases, and members that stand apart."""
    members: list[tuple[str, bytes]] = []
    for n in range(first, first + count):
        chat = {
            "messages": [{"role": "user", "content": "<image> or <image>?"}, {"role": "assistant", "content": f"{n}"}]
        }
        members += [
            [(f"c{n}.JPG", picture_bytes(n, kind="JPEG")), (f"c{n}.txt", f"A {n}.".encode())],
            [
                (f"m{n}.json", json.dumps(chat).encode()),
                (f"m{n}.b.png", picture_bytes(n)),
                (f"m{n}.a.webp", picture_bytes(n + 1, kind="WEBP", lossless=True)),
            ],
            [
                (f"d/q{n}.json", json.dumps({"question": "Q?", "answer": str(n)}).encode()),
                (f"d/q{n}.png", picture_bytes(n, kind="PNG", size=(7, 9))),
            ],
        ][n % 3]
    return [*members[1:], members[0]]


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.suffix != ".arrow"}


def test_samples_in_place_are_those_that_conversion_makes(tmp_path: Path) -> None:
    tar_of(tmp_path / "tars" / "a.tar", many(9))
    tar_of(tmp_path / "tars" / "b.tar", many(7, first=20))
    before = contents(tmp_path / "tars")
    placed = index(tmp_path / "tars")
    assert {name: contents(tmp_path / "tars")[name] for name in before} == before, "the tars are not touched"
    copied = convert("webdataset", tmp_path / "tars", None, tmp_path / "copied", settings=Settings(keep_metadata=True))
    assert len(placed) == len(copied) == 16
    for here, there in zip(read_all(placed), read_all(copied), strict=True):
        assert here.messages == there.messages
        assert here.images == there.images
        assert here.key == there.meta["key"]
    for i in range(len(placed)):
        assert placed.image_sizes(i) == copied.image_sizes(i)
        assert placed.picture_hashes(i) == copied.picture_hashes(i)
        assert [p.data for p in placed.read(i, images=False).images] == [None] * len(placed.image_sizes(i))
    assert list(verify(tmp_path / "tars")) == []


def test_any_number_of_processes_gives_the_same_index(tmp_path: Path) -> None:
    for name in ("one", "three"):
        for number in range(4):
            tar_of(tmp_path / name / "set" / f"{number}.tar", many(3, first=number * 10))
    index(tmp_path / "one" / "set")
    index(tmp_path / "three" / "set", processes=3)
    assert contents(tmp_path / "one" / "set") == contents(tmp_path / "three" / "set")


def test_what_cannot_be_a_sample_is_named_and_all_else_is_indexed(tmp_path: Path) -> None:
    good = [("good.png", picture_bytes(0)), ("good.txt", b"fine")]
    (tmp_path / "secret.txt").write_text("secret")
    cases: dict[str, Members] = {
        "dots in": [
            ("img.v1.png", picture_bytes(1)),
            ("img.v1.txt", b"1"),
            ("img.v2.png", picture_bytes(2)),
            ("img.v2.txt", b"2"),
        ],
        "two members are called": [("dup.png", picture_bytes(1)), ("dup.txt", b"1"), ("dup.PNG", picture_bytes(2))],
        "is a link": [("ln.png", picture_bytes(1)), link("ln.txt", "../secret.txt")],
        "hard.txt' is a link": [("hard.png", picture_bytes(1)), link("hard.txt", "good.txt", tarfile.LNKTYPE)],
        "device or pipe": [("dev.png", picture_bytes(1)), link("dev.txt", "", tarfile.CHRTYPE)],
        "leads out of the tar": [("../up.png", picture_bytes(1)), ("../up.txt", b"up")],
        "/abs.txt' leads out": [("/abs.txt", b"x"), ("/abs.png", picture_bytes(1))],
        "no conversation, answer or caption": [("alone.png", picture_bytes(1))],
        "no readable picture": [("bad.png", b"not a picture"), ("bad.txt", b"x")],
        "not UTF-8": [("enc.png", picture_bytes(1)), ("enc.txt", b"\xff\xfe")],
    }
    tar_of(tmp_path / "tars" / "x.tar", [*good, *(member for members in cases.values() for member in members)])
    with pytest.raises(RejectedRows, match="1 samples indexed, 10 rejected"):
        index(tmp_path / "tars")
    shards = index(tmp_path / "tars", on_bad="drop")
    assert [shards.key(i) for i in range(len(shards))] == ["good"]
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "tars" / "rejected.jsonl").read_text().splitlines()]
    assert len(reasons) == len(cases)
    for expected, reason in zip(cases, reasons, strict=True):
        assert expected in reason
        assert reason.startswith("x.tar:")
    assert "secret" not in "".join(p.read_text(errors="replace") for p in (tmp_path / "tars").glob("*.json*"))


def test_a_tar_cut_anywhere_is_reported_and_gives_no_half_sample(tmp_path: Path) -> None:
    whole = tar_of(
        tmp_path / "x.tar",
        [m for n in range(5) for m in ((f"{n}.txt", f"t{n}".encode()), (f"{n}.png", picture_bytes(n)))],
    )
    raw, folder = whole.read_bytes(), tmp_path / "tars"
    folder.mkdir()
    ends = [512 * n for n in range(1, len(raw.rstrip(b"\0")) // 512 + 1)]
    for end in [*ends, *random.Random(1).sample(range(1, len(raw.rstrip(b"\0"))), 20)]:
        (folder / "x.tar").write_bytes(raw[:end])
        with pytest.raises((RejectedRows, ConfigError), match=r"x\.tar"):
            index(folder)
        if (folder / "index.json").exists():
            for sample in read_all(ShardSet(folder)):
                assert sample.images[0].data == picture_bytes(int(sample.key))
            (folder / "index.json").unlink()


def damaged_header(raw: bytes) -> bytes:
    place = raw.index(b"2.txt")
    return raw[:place] + b"X" + raw[place + 1 :]


def holes(raw: bytes) -> bytes:
    place = raw.index(b"2.txt")
    return raw[:place] + bytes(512) + raw[place + 512 :]


@pytest.mark.parametrize("damage", [damaged_header, holes, lambda raw: raw + raw])
@pytest.mark.parametrize("packed", [lambda raw: raw, gzip.compress, bz2.compress, lzma.compress])
def test_what_tarfile_takes_for_the_end_is_reported(
    tmp_path: Path, damage: Callable[[bytes], bytes], packed: Callable[[bytes], bytes]
) -> None:
    members = [m for n in range(5) for m in ((f"{n}.txt", f"t{n}".encode()), (f"{n}.png", picture_bytes(n)))]
    path = tar_of(tmp_path / "tars" / "x.tar", members)
    path.write_bytes(packed(damage(path.read_bytes())))
    with pytest.raises(RejectedRows, match="ends or breaks here"):
        convert("webdataset", path, None, tmp_path / "out")
    if packed(b"") == b"":
        with pytest.raises(RejectedRows, match="ends or breaks here"):
            index(path.parent)


@pytest.mark.parametrize("packed", [gzip.compress, bz2.compress, lzma.compress])
def test_a_tar_packed_in_several_parts_is_read_whole_and_a_cut_one_reported(
    tmp_path: Path, packed: Callable[[bytes], bytes]
) -> None:
    members = [m for n in range(5) for m in ((f"{n}.txt", f"t{n}".encode()), (f"{n}.png", picture_bytes(n)))]
    path = tar_of(tmp_path / "x.tar", members)
    raw = path.read_bytes()
    squeezed = packed(raw[:3000]) + packed(raw[3000:])
    path.write_bytes(squeezed)
    assert len(convert("webdataset", path, None, tmp_path / "out")) == 5
    for end in random.Random(2).sample(range(1, len(squeezed)), 10):
        path.write_bytes(squeezed[:end])
        with pytest.raises(RejectedRows, match="ends or breaks here"):
            convert("webdataset", path, None, tmp_path / f"cut{end}")


def test_a_tar_changed_after_its_index_is_refused(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "tars" / "x.tar", many(6))
    shards = index(tmp_path / "tars")
    raw = path.read_bytes()
    place = raw.index(shards.read(0).images[0].data or b"?") + 30
    path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
    with pytest.raises(SampleError, match=r"tars/x.tar:c0: picture 0 is not the one that was indexed"):
        [ShardSet(tmp_path / "tars").read(i) for i in range(6)]
    assert any("sha256" in str(fault) for fault in verify(tmp_path / "tars"))
    path.write_bytes(raw + bytes(512))
    with pytest.raises(SampleError, match=r"x.tar: has .* bytes"):
        ShardSet(tmp_path / "tars")


def test_reading_the_same_tars_otherwise_is_another_set_for_every_cache(tmp_path: Path) -> None:
    tar_of(tmp_path / "tars" / "x.tar", many(6))
    first = index(tmp_path / "tars")
    again = index(tmp_path / "tars")
    other = index(tmp_path / "tars", prompt="What is it?")
    assert (first.fingerprint, first.shard_sha256) == (again.fingerprint, again.shard_sha256)
    assert first.fingerprint != other.fingerprint
    assert first.shard_sha256 != other.shard_sha256


def test_what_cannot_be_read_in_place_is_sent_to_convert(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        index(tmp_path / "none")
    (tmp_path / "tars").mkdir()
    with pytest.raises(ConfigError, match=r"holds no .tar file"):
        index(tmp_path / "tars")
    with tarfile.open(tmp_path / "tars" / "x.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(ConfigError, match=r"x.tar is compressed.*convert webdataset"):
        index(tmp_path / "tars")
    ours = write_shards(mixed(3), tmp_path / "ours")
    with pytest.raises(ConfigError, match="has an index already"):
        index(ours.folder)
    placed = index(tar_of(tmp_path / "placed" / "x.tar", many(3)).parent)
    with pytest.raises(ConfigError, match="convert webdataset"):
        merge([ours.folder, placed.folder], tmp_path / "merged")


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    tar_of(tmp_path / "tars" / "x.tar", many(6))
    result = CliRunner().invoke(app, ["index", str(tmp_path / "tars"), "--processes", "1"])
    assert result.exit_code == 0, result.output
    assert "6 samples in 1 tars" in result.output
