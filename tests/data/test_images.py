"""Laws of decoding and fitting, against arrays worked out here and against transformers' own processors."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import warnings
import zlib
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin
from transformers import CLIPImageProcessor, LlavaImageProcessor, SiglipImageProcessor

from mmit.data.fit import PictureFit, normalise
from mmit.data.images import MAX_BYTES, MAX_PIXELS, decode, ending_of, header, size_of
from mmit.data.sample import SampleError
from tests.data.pictures import encode, noise

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
Policy = Literal["crop", "pad", "squash"]
Interpolation = Literal["bicubic", "bilinear"]
POLICIES: tuple[Policy, ...] = ("crop", "pad", "squash")
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def fit(policy: Policy, side: int = 56, interpolation: Interpolation = "bicubic") -> PictureFit:
    return PictureFit(policy, side, MEAN, STD, interpolation)


# Fitting: transformers' processors are the other route ---------------------------------------------------------------


def processor(policy: Policy, side: int, interpolation: Interpolation) -> Any:
    resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    square = {"height": side, "width": side}
    shortest = {"shortest_edge": side}
    if policy == "crop":
        return CLIPImageProcessor(size=shortest, crop_size=square, image_mean=MEAN, image_std=STD, resample=resample)
    if policy == "pad":
        return LlavaImageProcessor(
            do_pad=True, size=shortest, crop_size=square, image_mean=MEAN, image_std=STD, resample=resample
        )
    return SiglipImageProcessor(size=square, image_mean=MEAN, image_std=STD, resample=resample)


def sizes(count: int) -> list[tuple[int, int]]:
    random = np.random.default_rng(7)
    drawn = [tuple(int(n) for n in np.exp(random.uniform(0, np.log(900), 2)).round()) for _ in range(count)]
    hard = [
        (1, 1),
        (1, 5000),
        (5000, 1),
        (2, 1),
        (1, 2),
        (56, 56),
        (57, 56),
        (56, 57),
        (55, 333),
        (640, 480),
        (479, 641),
    ]
    return hard + [(width, height) for width, height in drawn]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("side", [56, 37])
def test_fitted_pixels_are_those_of_the_transformers_processor_bit_for_bit(
    policy: Policy, interpolation: Interpolation, side: int
) -> None:
    theirs, ours = processor(policy, side, interpolation), fit(policy, side, interpolation)
    assert "torchvision" in theirs.backend
    for width, height in sizes(60):
        pixels = noise(width, height)
        expected = theirs(Image.fromarray(pixels), return_tensors="pt").pixel_values
        fitted = ours.apply(pixels)
        assert (fitted.dtype, tuple(fitted.shape)) == (torch.uint8, (3, side, side))
        assert torch.equal(normalise(fitted[None], MEAN, STD), expected), (width, height)


def test_fitting_at_the_sides_of_real_encoders_equals_transformers() -> None:
    for policy in POLICIES:
        for side in (224, 336, 384):
            pixels = noise(517, 390)
            expected = processor(policy, side, "bicubic")(Image.fromarray(pixels), return_tensors="pt").pixel_values
            assert torch.equal(normalise(fit(policy, side).apply(pixels)[None], MEAN, STD), expected)


def test_normalising_leaves_its_input_alone() -> None:
    pixels = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    before = pixels.clone()
    values = normalise(pixels, MEAN, STD)
    assert torch.equal(pixels, before)
    exact = (pixels.double() / 255 - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(
        3, 1, 1
    )
    torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("width", "height"), [(400, 300), (300, 400), (333, 217), (250, 250)])
def test_a_box_is_placed_where_its_pixels_end_up(policy: Policy, width: int, height: int) -> None:
    box = (width * 0.4, height * 0.45, width * 0.7, height * 0.6)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[round(box[1]) : round(box[3]), round(box[0]) : round(box[2])] = 255
    side = 224
    shown = fit(policy, side).apply(pixels).float().amin(0) > 170  # over the colour of the padding
    rows, columns = torch.nonzero(shown.any(1)).ravel(), torch.nonzero(shown.any(0)).ravel()
    found = [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]
    placed = [value * side for value in fit(policy, side).place(width, height, box)]
    assert np.abs(np.array(found) - placed).max() < 1.5


@pytest.mark.parametrize("policy", POLICIES)
@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    corners=st.tuples(*[st.floats(-10, 3010, allow_nan=False)] * 4),
)
@settings(max_examples=60, deadline=None)
def test_a_placed_box_stays_inside_and_keeps_its_order(
    policy: Policy, width: int, height: int, corners: tuple[float, float, float, float]
) -> None:
    left, right = sorted(corners[::2])
    top, bottom = sorted(corners[1::2])
    placed = fit(policy).place(width, height, (left, top, right, bottom))
    assert 0 <= placed[0] <= placed[2] <= 1
    assert 0 <= placed[1] <= placed[3] <= 1


def test_the_whole_picture_fills_a_squashed_one_and_is_cut_by_a_crop() -> None:
    assert fit("squash").place(400, 100, (0, 0, 400, 100)) == (0, 0, 1, 1)
    assert fit("crop").place(400, 100, (0, 0, 100, 100))[2] == 0
    assert fit("pad").place(400, 100, (0, 0, 400, 100)) == (0, 150 / 400, 1, 250 / 400)


def test_a_fit_survives_json_and_is_a_key() -> None:
    one = fit("pad", 336, "bilinear")
    assert PictureFit.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert {one: 1}[PictureFit.from_json(one.to_json())] == 1


@pytest.mark.parametrize("policy", ["crop", "pad"])
def test_a_picture_too_long_to_fit_is_refused_before_memory_is_taken(policy: Policy) -> None:
    with pytest.raises(SampleError, match="here: 1 x 60000 pixels is too long and thin"):
        fit(policy, 336).apply(np.zeros((60000, 1, 3), dtype=np.uint8), where="here")


# Decoding: modes ----------------------------------------------------------------------------------------------------


def gradient(width: int = 19, height: int = 13) -> np.ndarray:
    return (
        (np.arange(width * height, dtype=np.uint32) * 255 // (width * height - 1)).astype(np.uint8).reshape(height, -1)
    )


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha.astype(np.float64)[..., None] / 255
    return np.floor(colours * share + 255 * (1 - share) + 0.5).astype(np.uint8)


def grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, axis=-1)


def mode_cases() -> dict[str, tuple[bytes, np.ndarray]]:
    """Mode -> file and the array it must become, worked out without Pillow's conversions."""
    colours, shades = noise(19, 13), gradient()
    alpha = shades[::-1, ::-1].copy()
    palette = noise(16, 16, seed=5).reshape(256, 3)
    indexed = Image.frombytes("P", (19, 13), shades.tobytes())
    indexed.putpalette(palette.tobytes())
    clear = bytes(np.random.default_rng(2).integers(0, 256, 256, dtype=np.uint8))
    half_clear = io.BytesIO()
    indexed.save(half_clear, "PNG", transparency=clear)
    key_clear = io.BytesIO()
    Image.fromarray(shades, "L").save(key_clear, "PNG", transparency=int(shades[4, 4]))
    ink = np.concatenate([colours, shades[..., None]], axis=-1)
    printed = (255 - ink[..., :3].astype(np.float64)) * (255 - ink[..., 3:].astype(np.float64)) / 255
    bilevel = shades > 100
    deep = (np.arange(19 * 13, dtype=np.uint32) * 65535 // (19 * 13 - 1)).astype(np.uint16).reshape(13, 19)
    whole = np.linspace(-(2**31), 2**31 - 1, 19 * 13).astype(np.int32).reshape(13, 19)
    real = np.linspace(0, 1, 19 * 13, dtype=np.float32).reshape(13, 19)
    return {
        "RGB": (encode(colours), colours),
        "L": (encode(Image.fromarray(shades, "L")), grey(shades)),
        "1": (encode(Image.fromarray(bilevel)), grey(bilevel.astype(np.uint8) * 255)),
        "P": (encode(indexed), palette[shades]),
        "P with transparency": (half_clear.getvalue(), on_white(palette[shades], np.array(list(clear))[shades])),
        "L with transparency": (
            key_clear.getvalue(),
            on_white(grey(shades), np.where(shades == shades[4, 4], 0, 255)),
        ),
        "RGBA": (encode(np.concatenate([colours, alpha[..., None]], axis=-1)), on_white(colours, alpha)),
        "LA": (
            encode(Image.merge("LA", (Image.fromarray(shades, "L"), Image.fromarray(alpha, "L")))),
            on_white(grey(shades), alpha),
        ),
        "CMYK": (
            encode(Image.frombytes("CMYK", (19, 13), ink.tobytes()), "TIFF"),
            np.floor(printed + 0.5).astype(np.uint8),
        ),
        "I;16": (encode(Image.fromarray(deep)), grey(np.rint(deep / 257).astype(np.uint8))),
        "I": (
            encode(Image.fromarray(whole), "TIFF"),
            grey(np.rint((whole.astype(np.float64) + 2**31) * 255 / (2**32 - 1)).astype(np.uint8)),
        ),
        "F": (encode(Image.fromarray(real), "TIFF"), grey(np.rint(real.astype(np.float64) * 255).astype(np.uint8))),
    }


@pytest.mark.parametrize("mode", list(mode_cases()))
def test_every_mode_becomes_the_colours_it_shows(mode: str) -> None:
    data, expected = mode_cases()[mode]
    pixels = decode(data, "here")
    assert (pixels.dtype, pixels.shape) == (np.uint8, (13, 19, 3))
    assert pixels.flags.writeable
    np.testing.assert_array_equal(pixels, expected)


def test_a_cmyk_jpeg_is_near_the_colours_it_was_printed_from() -> None:
    ink = np.zeros((16, 16, 4), dtype=np.uint8)
    ink[:, :8, 0] = 255  # cyan, then yellow
    ink[:, 8:, 2] = 255
    pixels = decode(encode(Image.frombytes("CMYK", (16, 16), ink.tobytes()), "JPEG"), "here").astype(int)
    assert np.abs(pixels[8, 2] - [0, 255, 255]).max() <= 6
    assert np.abs(pixels[8, 13] - [255, 255, 0]).max() <= 6


# Decoding: orientation ----------------------------------------------------------------------------------------------


def turned(stored: np.ndarray, orientation: int) -> np.ndarray:
    """What EXIF 2.32 asks for, pixel by pixel: which stored pixel is shown at (y, x)."""
    height, width = stored.shape[:2]
    source = {
        1: lambda y, x: (y, x),
        2: lambda y, x: (y, width - 1 - x),
        3: lambda y, x: (height - 1 - y, width - 1 - x),
        4: lambda y, x: (height - 1 - y, x),
        5: lambda y, x: (x, y),
        6: lambda y, x: (height - 1 - x, y),
        7: lambda y, x: (height - 1 - x, width - 1 - y),
        8: lambda y, x: (x, width - 1 - y),
    }[orientation]
    rows, columns = (width, height) if orientation >= 5 else (height, width)
    return np.array([[stored[source(y, x)] for x in range(columns)] for y in range(rows)])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_exif_defines_it(kind: str, orientation: int) -> None:
    pixels = noise(24, 16)
    data = encode(pixels, kind, orientation=orientation)
    stored = decode(encode(pixels, kind), "upright")
    expected = turned(stored, orientation)
    np.testing.assert_array_equal(decode(data, "here"), expected)
    assert size_of(data, "here") == (expected.shape[1], expected.shape[0])
    pillow = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))  # what transformers' load_image does
    np.testing.assert_array_equal(np.array(pillow.convert("RGB")), expected)


def png_chunks(data: bytes) -> list[bytes]:
    chunks, position = [], 8
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        chunks.append(data[position : position + 12 + length])
        position += 12 + length
    return chunks


def test_a_png_that_tells_its_orientation_after_its_pixels_is_turned_too() -> None:
    pixels = noise(24, 16)
    data = encode(pixels, orientation=6)
    chunks = png_chunks(data)
    exif = [chunk for chunk in chunks if chunk[4:8] == b"eXIf"]
    rest = [chunk for chunk in chunks if chunk[4:8] != b"eXIf"]
    late = data[:8] + b"".join([*rest[:-1], *exif, rest[-1]])
    assert size_of(late, "here") == (16, 24)
    np.testing.assert_array_equal(decode(late, "here"), turned(pixels, 6))


def test_a_png_that_keeps_its_exif_in_a_text_is_turned_too() -> None:
    """As ImageMagick writes it for a photograph; transformers' load_image turns it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
    about = PngImagePlugin.PngInfo()
    about.add_text("Raw profile type exif", f"\nexif\n{len(raw):8}\n{raw.hex()}\n", zip=True)
    pixels, buffer = noise(24, 16), io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=about)
    assert size_of(buffer.getvalue(), "here") == (16, 24)
    np.testing.assert_array_equal(decode(buffer.getvalue(), "here"), turned(pixels, 6))


def test_an_orientation_that_means_nothing_leaves_the_picture_upright() -> None:
    pixels = noise(8, 4)
    for orientation in (0, 9, 255):
        np.testing.assert_array_equal(decode(encode(pixels, orientation=orientation), "here"), pixels)
    broken = encode(pixels, "WEBP", orientation=6).replace(b"II*\0", b"IX*\0").replace(b"MM\0*", b"MX\0*")
    np.testing.assert_array_equal(decode(broken, "here"), pixels)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "MPO", "TIFF"])
def test_of_several_frames_the_first_is_shown(kind: str) -> None:
    first = Image.new("RGB", (16, 16), (255, 0, 0))
    others = [Image.new("RGB", (16, 16), colour) for colour in [(0, 0, 255), (0, 255, 0)]]
    buffer = io.BytesIO()
    first.save(buffer, kind, save_all=True, append_images=others)
    assert Image.open(io.BytesIO(buffer.getvalue())).n_frames == 3  # type: ignore[attr-defined]
    pixels = decode(buffer.getvalue(), "here").astype(int)
    assert np.abs(pixels - [255, 0, 0]).max() <= 8
    assert ending_of(buffer.getvalue(), "here") == {"MPO": "jpg", "TIFF": "tiff"}.get(kind, kind.lower())


# Decoding: more than 8 bits ------------------------------------------------------------------------------------------


def ramp(low: int, high: int) -> np.ndarray:
    return np.linspace(low, high, 64 * 64).round().astype(np.uint16).reshape(64, 64)


def test_a_16_bit_ramp_is_off_by_at_most_one_shade() -> None:
    values = ramp(0, 65535)
    for kind in ("PNG", "TIFF"):
        pixels = decode(encode(Image.fromarray(values), kind), "here")
        assert np.abs(pixels[..., 0] / 255 - values / 65535).max() <= 0.5 / 255 + 1e-9


def test_a_16_bit_picture_in_under_a_quarter_of_its_range_needs_a_window() -> None:
    values = ramp(1000, 5000)
    data = encode(Image.fromarray(values))
    with pytest.raises(SampleError, match=r"here: .*from 1000 to 5000 .*window: \[1000, 5000\]"):
        decode(data, "here")
    pixels = decode(data, "here", window=(2000, 4000))
    expected = np.clip((values.astype(float) - 2000) / 2000, 0, 1)
    assert np.abs(pixels[..., 1] / 255 - expected).max() <= 0.5 / 255 + 1e-9
    decode(encode(Image.fromarray(ramp(1000, 1000 + 65536 // 4))), "just enough")


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(SampleError, match="black < white"):
        decode(encode(Image.fromarray(ramp(0, 65535))), "here", window=(5, 5))


def test_a_window_says_nothing_about_an_8_bit_picture() -> None:
    data = encode(noise(9, 9))
    np.testing.assert_array_equal(decode(data, "here", window=(0, 10)), decode(data, "here"))


def test_floats_outside_of_0_to_1_or_not_numbers_are_refused() -> None:
    values = np.linspace(0, 300, 64, dtype=np.float32).reshape(8, 8)
    with pytest.raises(SampleError, match=r"window: \[0, 300\]"):
        decode(encode(Image.fromarray(values), "TIFF"), "here")
    values[0, 0] = np.nan
    with pytest.raises(SampleError, match="not numbers"):
        decode(encode(Image.fromarray(values), "TIFF"), "here", window=(0, 300))


def test_a_16_bit_tiff_whose_zero_is_white_is_shown_that_way() -> None:
    buffer = io.BytesIO()
    Image.fromarray(ramp(0, 65535)).save(buffer, "TIFF", tiffinfo={262: 0})
    assert decode(buffer.getvalue(), "here")[0, 0, 0] == 255


def png_of(colour_type: int, depth: int, width: int, height: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def test_16_bit_colour_is_scaled_and_refused_when_nearly_flat() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (6, 5, 3)).astype(np.uint16)

    def packed(values: np.ndarray) -> bytes:
        return png_of(2, 16, 5, 6, b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))

    assert np.abs(decode(packed(values), "here") / 255 - values / 65535).max() <= 1 / 255
    with pytest.raises(SampleError, match="16-bit colour picture uses"):
        decode(packed(values // 16), "here")


# Refusals -----------------------------------------------------------------------------------------------------------


def refused(data: bytes) -> str:
    texts = []
    for function in (size_of, ending_of, decode):
        with pytest.raises(SampleError, match=r"^shard:key: ") as caught:
            function(data, "shard:key")
        texts.append(str(caught.value))
        assert "0x" not in texts[-1]
        assert "object at" not in texts[-1]
    return texts[0]


def attempt(data: bytes) -> np.ndarray | str:
    try:
        return decode(data, "shard:key")
    except SampleError as error:
        return str(error)


def test_what_is_no_picture_is_named_for_what_it_is() -> None:
    assert "empty file" in refused(b"")
    assert "web page" in refused(b"  <!DOCTYPE html><html>404</html>")
    assert "SVG" in refused(b"<svg xmlns='x'/>")
    assert "no readable picture" in refused(b"\x00\x01junk" * 50)
    assert "no readable picture" in refused(b"%PDF-1.7" + bytes(100))


@pytest.mark.parametrize("kind", ["PPM", "ICO", "PCX", "TGA", "SGI", "JPEG2000"])
def test_formats_not_on_the_list_are_refused(kind: str) -> None:
    refused(encode(Image.fromarray(noise(16, 16)), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_picture_is_refused_or_whole(kind: str) -> None:
    data = encode(noise(40, 30), kind)
    expected = decode(data, "whole")
    for length in np.linspace(0, len(data) - 1, 60).astype(int):
        found = attempt(data[:length])
        if isinstance(found, np.ndarray):
            np.testing.assert_array_equal(found, expected)
        else:
            assert found.startswith("shard:key: ")
            assert "0x" not in found


@pytest.mark.parametrize("kind", KINDS)
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=80, deadline=None)
def test_a_damaged_picture_is_an_array_of_its_size_or_a_sample_error(
    kind: str, changes: list[tuple[float, int]]
) -> None:
    data = bytearray(encode(noise(40, 30), kind, orientation=6))
    for place, value in changes:
        data[int(place * min(len(data), 400))] = value
    found = attempt(bytes(data))
    if isinstance(found, np.ndarray):
        assert size_of(bytes(data), "shard:key") == (found.shape[1], found.shape[0])
    else:
        assert found.startswith("shard:key: ")
        assert "0x" not in found


@pytest.mark.parametrize(("mode", "progressive"), [("RGB", False), ("RGB", True), ("L", False), ("CMYK", False)])
def test_the_header_of_a_damaged_jpeg_is_what_pillow_makes_of_it(mode: str, progressive: bool) -> None:
    random = np.random.default_rng(3)
    stream = io.BytesIO()
    Image.fromarray(noise(30, 40)).convert(mode).save(
        stream, "JPEG", progressive=progressive, comment=b"hi", icc_profile=b"a" * 99
    )
    whole = stream.getvalue()
    jobs = [whole[:end] for end in range(2, 900)]
    for _ in range(600):
        damaged = bytearray(whole)
        for place in random.integers(2, 800, random.choice([1, 3, 30])):
            damaged[place] = random.choice([0xFF, 0, 0xD9, random.integers(256)])
        jobs.append(bytes(damaged))
    understood = 0
    for data in jobs:
        try:
            theirs = Image.open(io.BytesIO(data), formats=["JPEG"]).size
        except Exception:
            theirs = None
        try:
            shown = header(data, "p")
        except SampleError:
            assert theirs is None or theirs[0] * theirs[1] > MAX_PIXELS or 0 in theirs
        else:
            understood += 1
            assert theirs == ((shown.width, shown.height) if shown.orientation < 5 else (shown.height, shown.width))
    assert 300 < understood < 1400


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_picture_is_judged_alike_whatever_the_warning_filters(kind: str) -> None:
    random = np.random.default_rng(11)
    whole = encode(noise(40, 30), kind, orientation=6)
    for _ in range(150):
        data = bytearray(whole)
        for place in random.integers(0, min(len(data), 300), 3):
            data[place] = random.integers(0, 256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quiet = attempt(bytes(data))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            strict = attempt(bytes(data))
        np.testing.assert_array_equal(quiet, strict)


def test_a_file_over_the_limit_is_refused_unread() -> None:
    assert "the limit is" in refused(encode(noise(8, 8)) + bytes(MAX_BYTES))


BOMBS = """
import time
from mmit.data.images import decode, ending_of, size_of
from mmit.data.sample import SampleError
from tests.data.pictures import peak_memory, reset_peak_memory
from tests.data.test_images import bombs
made = bombs()
decode(next(iter(made.values()))[1], "warm")
before = reset_peak_memory()
slowest = 0
for name, (bomb, _) in made.items():
    for function in (size_of, ending_of, decode):
        start = time.perf_counter()
        try:
            function(bomb, "bomb")
        except SampleError as error:
            assert "bomb: the picture has" in str(error), (name, str(error))
        else:
            raise AssertionError(name)
        slowest = max(slowest, time.perf_counter() - start)
print(peak_memory() - before, slowest)
"""


def bombs() -> dict[str, tuple[bytes, bytes]]:
    """Small files that would decode to hundreds of megabytes, with a harmless picture of the same kind."""
    harmless = encode(noise(8, 8))
    made = {
        f"PNG {side}": (png_of(2, 8, side, side, bytes(10_000)), harmless) for side in (7_100, 9_000, 13_000, 14_000)
    }
    gif = bytearray(encode(noise(8, 8), "GIF"))
    gif[6:10] = struct.pack("<HH", 60_000, 60_000)
    bmp = bytearray(encode(noise(8, 8), "BMP"))
    bmp[18:26] = struct.pack("<ii", 30_000, 30_000)
    jpeg = bytearray(encode(noise(8, 8), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    webp = bytearray(encode(noise(8, 8), "WEBP"))
    assert webp[12:16] == b"VP8L"
    webp[21:25] = struct.pack("<I", 16_382 | 16_382 << 14)
    tiff = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(tiff, "TIFF", compression="group4")
    return made | {
        "GIF": (bytes(gif), harmless),
        "BMP": (bytes(bmp), harmless),
        "JPEG": (bytes(jpeg), harmless),
        "WEBP": (bytes(webp), harmless),
        "TIFF": (tiff.getvalue(), harmless),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory through /proc")
def test_bombs_are_refused_from_the_header_without_growing() -> None:
    # In a process of its own: the peak of this one is past already.
    run = subprocess.run([sys.executable, "-c", BOMBS], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    grown_kib, slowest = run.stdout.split()
    assert int(grown_kib) < 30 * 1024
    assert float(slowest) < 0.1


def test_measuring_a_picture_decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [encode(noise(24, 16), kind, orientation=6) for kind in KINDS] + [encode(noise(24, 16))]

    def forbidden(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", forbidden)
    for data in files:
        assert sorted(size_of(data, "here")) == [16, 24]
        ending_of(data, "here")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_header_says_what_decoding_gives(kind: str, orientation: int) -> None:
    data = encode(noise(9, 5), kind, orientation=orientation)
    found = header(data, "p")
    assert (found.height, found.width) == decode(data, "p").shape[:2]
    assert found.ending == ending_of(data, "p")
    stored = kind in ("JPEG", "PNG", "WEBP")
    assert found.orientation == (orientation if stored else 1), "of a TIFF, Pillow gives the pixels turned"
