from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.formats import samples_of
from data_tools.turns import asked_about
from mmit.data.images import decode
from mmit.data.sample import SampleError, message
from mmit.inference.conversation import conversation, picture_of


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def noise(mode: str) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)).convert(mode)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise("RGB"), "JPEG", exif=exif)


def deep() -> bytes:
    values = np.random.default_rng(0).integers(0, 65536, (9, 14)).astype(np.uint16)
    return encoded(Image.fromarray(values), "PNG")


def clear() -> bytes:
    image = noise("RGBA")
    image.putalpha(noise("L"))
    return encoded(image, "PNG")


FILES = {
    "rgb": encoded(noise("RGB"), "PNG"),
    "grey": encoded(noise("L"), "PNG"),
    "palette": encoded(noise("P"), "GIF"),
    "clear palette": encoded(noise("P"), "PNG", transparency=3),
    "cmyk": encoded(noise("CMYK"), "JPEG"),
    "one bit": encoded(noise("1"), "TIFF"),
    "turned": turned(),
    "deep": deep(),
    "clear": clear(),
}


@pytest.mark.parametrize("name", FILES)
def test_a_picture_is_the_same_pixels_however_it_is_given(name: str, tmp_path: Path) -> None:
    data = FILES[name]
    (tmp_path / "picture").write_bytes(data)
    expected = decode(data, "test")
    given = [data, tmp_path / "picture", str(tmp_path / "picture"), Image.open(io.BytesIO(data)), expected]
    for image in given:
        shown = picture_of(image, "test")
        assert np.array_equal(shown.decoded("test"), expected)
        assert (shown.picture.height, shown.picture.width) == expected.shape[:2]


def test_paths_are_relative_to_the_folder(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(FILES["rgb"])
    asked = conversation("What?", ["picture.png"], folder=tmp_path)
    assert asked.pictures[0].picture.data == FILES["rgb"]


def test_one_picture_need_not_stand_in_a_list(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(FILES["rgb"])
    file, data = tmp_path / "picture.png", FILES["rgb"]
    for image in (file, str(file), data, Image.open(io.BytesIO(data)), decode(data, "test")):
        assert [shown.picture.width for shown in conversation("What?", image).pictures] == [14]


def test_a_system_text_opens_only_what_has_none() -> None:
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "Hi"}]
    assert [item.text for item in conversation("Hi", system="given").messages] == ["given", "Hi"]
    assert [item.text for item in conversation(own, system="given").messages] == ["own", "Hi"]


def test_a_window_reaches_the_decoder() -> None:
    values = np.arange(20_000, 20_126, dtype=np.uint16).reshape(9, 14)
    part = {"type": "image", "image": encoded(Image.fromarray(values), "PNG"), "window": [20_000, 20_125]}
    asked = conversation([{"role": "user", "content": [part]}])
    assert asked.pictures[0].decoded("test").max() == 255


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("asked", "images", "named"),
    [
        ([], [], "a text or a list of messages"),
        (None, [], "a text or a list of messages"),
        ({"role": "user", "content": "Hi"}, [], "a text or a list of messages"),
        ([USER, {"role": "assistant", "content": "Hello"}], [], "end it with a user message"),
        ([{"role": "usr", "content": "Hi"}], [], "role 'usr' is unknown"),
        ([USER, {"role": "system", "content": "late"}, USER], [], "must come first"),
        (["Hi"], [], "expected an object"),
        ([{"role": "user"}], [], "expected an object"),
        ([{"role": "user", "content": 3}], [], "write a string or a list"),
        ([{"role": "user", "content": [{"type": "audio"}]}], [], "part .* is unknown"),
        ([{"role": "user", "content": [{"type": "image", "image": 1}]}], [FILES["rgb"]], "names image 1"),
        ([USER], [FILES["rgb"]], "shown by no message"),
        ("Hi", ["nowhere.png"], r"nowhere\.png is not there"),
        ("Hi", [b"no picture"], "no readable picture"),
        ("Hi", [3.5], "given as float"),
        ("Hi", [np.zeros((4, 4))], r"float64 \(4, 4\)"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_place(asked: Any, images: list[Any], named: str) -> None:
    with pytest.raises(SampleError, match=rf"^in\.jsonl:7.*{named}"):
        conversation(asked, images, where="in.jsonl:7")


def test_a_bare_prompt_with_pictures_is_laid_out_as_converted_data_trains_it() -> None:
    """`<image>` and a line break before the question: LLaVA's rows, and all that `mmit-data` makes of VQA sets."""
    shown = [FILES["rgb"], FILES["grey"]]
    trained = asked_about([picture_of(file, "row").picture for file in shown], [("Same?", "no")], where="row")
    assert conversation("Same?", shown).messages == trained.messages[:1]
    assert conversation("Hi").messages == (message("user", "Hi"),)


def test_messages_are_laid_out_as_the_same_row_is_converted(tmp_path: Path) -> None:
    """A prompt that ended with a line break gave other ids than training had."""
    (tmp_path / "a.png").write_bytes(FILES["rgb"])
    shown = [{"type": "text", "text": "\n a "}, {"type": "image", "image": "a.png"}, {"type": "text", "text": "\n b\n"}]
    row = [
        {"role": "system", "content": " short\n"},
        {"role": "user", "content": "\n Hi  "},
        {"role": "assistant", "content": " yes \n"},
        {"role": "user", "content": shown},
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [*row, {"role": "assistant", "content": "no"}]}))
    (trained,) = samples_of("messages", tmp_path / "rows.jsonl", tmp_path, {})
    assert conversation(row, folder=tmp_path).messages == trained.messages[:-1]


@pytest.mark.parametrize("images", [[], [FILES["rgb"]]], ids=["text", "picture"])
def test_a_bare_prompt_has_no_whitespace_at_its_edges_as_converted_data(images: list[bytes]) -> None:
    plain = conversation("Two\nlines?", images, system="short")
    assert conversation(" \nTwo\nlines? \n", images, system="\nshort ").messages == plain.messages


def test_messages_of_our_own_stay_as_they_are() -> None:
    """Of a run whose data was converted with strip=false."""
    own = message("user", " Hi\n")
    assert conversation([own]).messages == (own,)
