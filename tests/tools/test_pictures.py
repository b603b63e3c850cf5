from __future__ import annotations

import io
import struct
from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from data_tools.album import Album, develop, read, unread, without_metadata
from data_tools.convert import RejectedRows, Settings, convert
from data_tools.quality.pictures import prints_of
from data_tools.quality.subset import silent
from mmit.data.images import decode
from mmit.data.sample import SampleError
from mmit.data.shards import ShardSet, verify
from tests.tools.conftest import Converter, picture_bytes
from tests.tools.test_convert import rows_with

CANARY = "canary-37.7749N"


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x010E] = CANARY
    if orientation:
        tags[0x0112] = orientation
    return tags


def with_metadata(kind: str, orientation: int = 0) -> bytes:
    xmp = f"<x:xmpmeta>{CANARY}</x:xmpmeta>".encode()
    match kind:
        case "JPEG":
            return picture_bytes(kind=kind, exif=exif(orientation), comment=CANARY, xmp=xmp) + CANARY.encode()
        case "PNG":
            text = PngImagePlugin.PngInfo()
            text.add_text("where", CANARY)
            text.add_itxt("XML:com.adobe.xmp", xmp.decode())
            return picture_bytes(kind=kind, exif=exif(orientation), pnginfo=text) + CANARY.encode()
        case "WEBP":
            return picture_bytes(kind=kind, exif=exif(orientation), xmp=xmp, lossless=True)
        case "GIF":
            return picture_bytes(kind=kind, comment=CANARY) + CANARY.encode()
        case _:
            return picture_bytes(kind=kind, tiffinfo={0x010E: CANARY})


KINDS = ["JPEG", "PNG", "WEBP", "GIF", "TIFF"]


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_goes_and_every_pixel_stays(kind: str) -> None:
    data = with_metadata(kind)
    assert CANARY.encode() in data
    picture = develop(unread(data, "p"), "p")
    assert picture.data is not None
    assert CANARY.encode() not in picture.data
    assert np.array_equal(decode(picture.data, "p"), decode(data, "p"))
    with Image.open(io.BytesIO(picture.data)) as again:
        assert not again.getexif()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_pixels_are_not_encoded_again(kind: str) -> None:
    plain = picture_bytes(kind=kind, **({"lossless": True} if kind == "WEBP" else {}))
    kept = develop(unread(with_metadata(kind), "p"), "p").data or b""
    body = plain[plain.index(b"\xff\xda") :] if kind == "JPEG" else plain[plain.index(b"VP8L") :]
    assert body.rstrip(b"\0") in kept


@pytest.mark.parametrize("progressive", [False, True])
def test_a_progressive_jpeg_keeps_all_its_scans(progressive: bool) -> None:
    data = picture_bytes(kind="JPEG", size=(64, 48), progressive=progressive, comment=CANARY, restart_marker_rows=1)
    picture = develop(unread(data, "p"), "p")
    assert np.array_equal(decode(picture.data or b"", "p"), decode(data, "p"))
    assert len(picture.data or b"") == len(data) - len(CANARY) - 4


def test_a_colour_profile_and_a_cmyk_marker_stay(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("CMYK", (8, 8), (10, 200, 30, 40)).save(stream, format="JPEG", icc_profile=b"profile" * 9, comment=CANARY)
    picture = develop(unread(stream.getvalue(), "p"), "p")
    assert np.array_equal(decode(picture.data or b"", "p"), decode(stream.getvalue(), "p"))
    assert b"profileprofile" in (picture.data or b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_is_baked_in_without_loss(kind: str, orientation: int) -> None:
    data = with_metadata(kind, orientation)
    picture = develop(unread(data, "p"), "p")
    assert np.array_equal(decode(picture.data or b"", "p"), decode(data, "p"))
    assert (picture.width, picture.height) == ((20, 12) if orientation < 5 else (12, 20))
    with Image.open(io.BytesIO(picture.data or b"")) as again:
        assert again.size == (picture.width, picture.height)


@pytest.mark.parametrize("kind", KINDS)
def test_keep_metadata_copies_the_bytes(kind: str) -> None:
    data = with_metadata(kind)
    assert develop(unread(data, "p"), "p", keep_metadata=True).data == data


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_a_cut_picture_is_refused_wherever_it_is_cut(kind: str) -> None:
    data = with_metadata(kind)
    good = decode(data, "p")
    for end in range(0, len(data) - 1, 37):
        try:
            picture = develop(unread(data[:end], "p"), "p")
        except SampleError:
            continue
        # Only what trails the picture was cut off.
        assert np.array_equal(decode(picture.data or b"", "p"), good)


def test_a_scan_header_that_reaches_past_the_end_does_not_hang() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(stream, "JPEG", progressive=True)
    last = stream.getvalue().rindex(b"\xff\xda")
    for end in range(last, last + 12):
        cut = stream.getvalue()[:end]
        assert without_metadata(cut, ending="jpg", orientation=1) in (None, cut)


def test_deep_pictures_keep_their_window_and_16_bits() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(stream, format="PNG")
    with pytest.raises(SampleError, match="window"):
        develop(unread(stream.getvalue(), "p"), "p")
    picture = develop(unread(stream.getvalue(), "p"), "p", window=(0, 4095))
    assert picture.window == (0, 4095)
    assert np.array_equal(
        decode(picture.data or b"", "p", window=picture.window), decode(stream.getvalue(), "p", window=(0, 4095))
    )


@pytest.mark.parametrize("name", ["http://x/y.png", "https://x/y.png", "file:///etc/passwd", "s3://b/k.png"])
def test_addresses_are_not_fetched(name: str, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="nothing is fetched"):
        Album(tmp_path).picture(name, "row 3")


def test_a_pipe_that_poses_as_a_picture_does_not_hang(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(SampleError, match="not an ordinary file"):
        develop(Album(tmp_path).picture("pipe.png", "row 3"), "row 3")


def test_links_inside_the_folder_are_read_and_links_out_of_it_refused(tmp_path: Path) -> None:
    data = picture_bytes(3)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "true.png").write_bytes(data)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "p.png").write_bytes(data)
    (tmp_path / "in" / "file.png").symlink_to("deep/true.png")
    (tmp_path / "in" / "folder").symlink_to("deep")
    (tmp_path / "in" / "secret.png").symlink_to(tmp_path / "out" / "p.png")
    (tmp_path / "in" / "away").symlink_to(tmp_path / "out")
    album = Album(tmp_path / "in")
    for name in ("deep/true.png", "file.png", "folder/true.png"):
        assert read(album.picture(name, "p")) == data
    for name in ("secret.png", "away/p.png"):
        with pytest.raises(SampleError, match="leads out of the images folder"):
            read(album.picture(name, "p"))


def test_a_kept_print_is_the_hash_of_imagehash_and_the_one_that_dedup_makes(photos: Path, tmp_path: Path) -> None:
    path = rows_with(photos, 4)
    convert("llava", path, photos, tmp_path / "kept", settings=Settings(prints=True))
    convert("llava", path, photos, tmp_path / "bare")
    kept, bare = ShardSet(tmp_path / "kept"), ShardSet(tmp_path / "bare")
    for number in range(4):
        picture = kept.read(number).images[0]
        shown = Image.fromarray(decode(picture.data or b"", "p"))
        assert (picture.print or "")[:16] == str(imagehash.phash(shown))
        assert bare.read(number).images[0].print is None
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    made = prints_of(bare, tmp_path / "a", silent).values
    assert np.array_equal(prints_of(kept, tmp_path / "b", silent).values, made)
    assert list(verify(tmp_path / "kept")) == []


def test_pictures_with_prints_are_not_decoded_again(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = convert("llava", rows_with(photos, 4), photos, tmp_path / "kept", settings=Settings(prints=True))
    monkeypatch.setattr("data_tools.quality.pictures.decode", lambda *_, **__: 1 / 0)
    assert len(prints_of(shards, tmp_path, silent).values) == 4


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(30 * 2**20)
    with pytest.raises(SampleError, match=r"huge\.png has 31,457,280 bytes"):
        develop(Album(tmp_path).picture("huge.png", "row 3"), "row 3")


def test_a_bomb_is_refused_from_its_header() -> None:
    header = struct.pack(">IIBBBBB", 14_000, 14_000, 8, 2, 0, 0, 0)
    import zlib

    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(SampleError, match="pixels"):
        develop(unread(data + picture_bytes()[33:], "p"), "p")


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("keep", [False, True])
def test_boxes_on_a_picture_that_its_exif_turns_are_refused(
    run: Converter, tmp_path: Path, orientation: int, keep: bool
) -> None:
    """Nobody knows whether they were drawn before or after the turn."""
    (tmp_path / "0.jpg").write_bytes(picture_bytes(kind="JPEG", size=(20, 20), exif=exif(orientation)))
    row = {"image": "0.jpg", "bbox": [1, 2, 6, 4], "sentences": [{"sent": "s"}]}
    settings = Settings(keep_metadata=keep)
    if orientation == 1:
        assert run("refcoco", [row], tmp_path, settings=settings)
        return
    with pytest.raises(RejectedRows, match=r"0\.jpg: the picture has boxes and is turned by its EXIF"):
        run("refcoco", [row], tmp_path, settings=settings)
