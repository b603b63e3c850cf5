from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.convert import RejectedRows
from data_tools.formats import llava
from data_tools.rows import Rejected
from data_tools.turns import Said, place_pictures
from mmit.data.images import decode
from mmit.data.sample import ImagePart, SampleError, TextPart
from tests.tools.conftest import Converter, flat


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def row(*turns: dict[str, str], **more: object) -> dict[str, object]:
    return {"id": "7", "conversations": list(turns), **more}


def test_pictures_stand_where_the_markers_stood(run: Converter, photos: Path) -> None:
    rows = [
        row(human("<image>\nWhat?"), gpt("A cat."), image="0.png"),
        row(human("What?\n<image>"), gpt("A cat."), image=["1.png"]),
        row(human("Is <image> before <image>?"), gpt("No: <image>."), image=["1.png", "deep/5.jpg", "0.png"]),
        row(human("Hi"), gpt("Hello")),
    ]
    first, last, three, text = run("llava", rows, photos)
    assert flat(first) == [("user", [0, "\nWhat?"]), ("assistant", ["A cat."])]
    assert flat(last) == [("user", ["What?\n", 0]), ("assistant", ["A cat."])]
    assert flat(three) == [("user", ["Is ", 0, " before ", 1, "?"]), ("assistant", ["No: ", 2, "."])]
    assert [decode(p.data or b"", "").tobytes() for p in three.images] == [
        decode((photos / name).read_bytes(), "").tobytes() for name in ("1.png", "deep/5.jpg", "0.png")
    ]
    assert text.images == ()
    assert first.meta == {"id": "7"}


def test_a_leading_answer_is_kept_as_context_and_not_trained(run: Converter) -> None:
    (sample,) = run("llava", [row(gpt("Welcome."), human("Hi"), gpt("Hello"))])
    assert [(item.role, item.text, item.train) for item in sample.messages] == [
        ("assistant", "Welcome.", False),
        ("user", "Hi", False),
        ("assistant", "Hello", True),
    ]


def test_a_caption_alone_is_trained(run: Converter, photos: Path) -> None:
    (sample,) = run("llava", [row(gpt("<image>\nA cat."), image="0.png")], photos)
    assert sample.messages[0].train


def test_conversations_stored_as_strings_are_read(run: Converter) -> None:
    turns = [human('Say "it\'s"'), gpt("it's\nfine")]
    rows = [row() | {"conversations": repr(turns)}, row() | {"conversations": json.dumps(turns)}]
    for sample in run("llava", rows):
        assert flat(sample) == [("user", ['Say "it\'s"']), ("assistant", ["it's\nfine"])]


def test_edges_are_stripped_by_default_and_kept_on_demand(run: Converter) -> None:
    rows = [row(human("  Hi there \n"), gpt("\tHello  you "))]
    assert flat(run("llava", rows)[0]) == [("user", ["Hi there"]), ("assistant", ["Hello  you"])]
    assert flat(run("llava", rows, strip=False)[0]) == [
        ("user", ["  Hi there \n"]),
        ("assistant", ["\tHello  you "]),
    ]


def test_image_first_moves_pictures_as_llava_trained(run: Converter, photos: Path) -> None:
    rows = [row(human("What?\n<image>"), gpt("A cat."), image="0.png")]
    (sample,) = run("llava", rows, photos, image_first=True)
    assert flat(sample)[0] == ("user", [0, "\nWhat?"])


@pytest.mark.parametrize(
    ("turns", "image", "found"),
    [
        ([human("<image><image>"), gpt("x")], "0.png", "1 pictures but 2 <image> markers"),
        ([human("<image>"), gpt("x")], ["0.png", "1.png"], "2 pictures but 1 <image> markers"),
        ([human("What?"), gpt("x")], "0.png", "1 pictures but 0 <image> markers"),
        ([human("<image>"), gpt("x")], None, "0 pictures but 1 <image> markers"),
        ([human("Hi")], None, "no answer to learn from"),
        ([human("Hi"), gpt("")], None, "every answer is empty"),
        ([human("Hi"), gpt("Hello"), human("?"), gpt(" ")], None, "message 3: the answer is empty"),
        ([{"from": "cat", "value": "Hi"}, gpt("x")], None, "role 'cat' is unknown"),
        ([human("Hi"), {"from": "gpt", "value": 3}], None, "expected a text, found int '3'"),
        ([], None, "the conversation is empty"),
    ],
)
def test_a_wrong_row_is_rejected_with_its_place(
    run: Converter, photos: Path, turns: list[dict[str, str]], image: object, found: str
) -> None:
    good = row(human("Hi"), gpt("Hello"))
    bad = {"id": "bad-one", "conversations": turns} | ({"image": image} if image else {})
    with pytest.raises(RejectedRows) as caught:
        run("llava", [good, bad], photos, name="notes.jsonl")
    assert "notes.jsonl:2 (id bad-one)" in str(caught.value)
    assert found in str(caught.value)
    assert "1 of 2 rows rejected" in str(caught.value)


def test_an_answer_may_speak_of_the_marker(run: Converter, photos: Path) -> None:
    rows = [row(human("<image> Which tag?"), gpt("Write <image>."), image="0.png"), row(human("Tag?"), gpt("<image>"))]
    shown, text = run("llava", rows, photos)
    assert flat(shown) == [("user", [0, " Which tag?"]), ("assistant", ["Write <image>."])]
    assert flat(text) == [("user", ["Tag?"]), ("assistant", ["<image>"])]


def test_options_say_what_a_mismatch_means(run: Converter, photos: Path) -> None:
    unmarked = [row(human("What?"), gpt("x"), image=["0.png", "1.png"])]
    assert flat(run("llava", unmarked, photos, unmarked="first")[0])[0] == ("user", [0, 1, "What?"])
    word = [row(human("Is <image> HTML?"), gpt("No"))]
    assert flat(run("llava", word, markers="text")[0])[0] == ("user", ["Is <image> HTML?"])


@pytest.mark.parametrize("name", ["../secret.png", "deep/../../secret.png", "ABSOLUTE", "out.png", "out/secret.png"])
def test_no_picture_outside_the_folder_is_opened(run: Converter, photos: Path, name: str, tmp_path: Path) -> None:
    secret = tmp_path / "elsewhere" / "secret.png"
    secret.parent.mkdir()
    secret.write_bytes((photos / "0.png").read_bytes())
    (tmp_path / "secret.png").write_bytes((photos / "0.png").read_bytes())
    (photos / "out.png").symlink_to(secret)
    (photos / "out").symlink_to(secret.parent)
    name = str(secret) if name == "ABSOLUTE" else name
    with pytest.raises(RejectedRows, match=r"outside the images folder|leads out of the images folder"):
        run("llava", [row(human("<image>"), gpt("x"), image=name)], photos)


def test_a_link_inside_the_folder_is_followed(run: Converter, photos: Path) -> None:
    (photos / "link.png").symlink_to(photos / "0.png")
    assert len(run("llava", [row(human("<image>"), gpt("x"), image="link.png")], photos)) == 1


def test_a_list_is_read_the_same_however_it_is_cut_into_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(human(f"Ünï {n} ]}},{{"), gpt("x" * n)) for n in range(1, 40)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    whole = [flat(item) for item in llava.samples(path) if not isinstance(item, Rejected)]
    for size in (1, 2, 7, 64):
        monkeypatch.setattr("data_tools.rows.CHUNK", size)
        pieces = [flat(item) for item in llava.samples(path) if not isinstance(item, Rejected)]
        assert pieces == whole
    assert len(whole) == 39


@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_a_cut_list_is_named(run: Converter, tmp_path: Path, cut: float) -> None:
    text = json.dumps([row(human("Hi"), gpt("Hello"))] * 50)
    path = tmp_path / "cut.json"
    path.write_text(text[: int(len(text) * cut)])
    with pytest.raises(SampleError, match=r"cut\.json\[\d+\].*the file may be cut"):
        run("llava", path)


TEXTS = st.lists(st.sampled_from(["<image>", "a", "<", "image>", " <image> ", "\n"]), max_size=5).map("".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), TEXTS), min_size=1, max_size=4))
def test_placing_keeps_every_character_and_the_order_of_pictures(turns: list[tuple[str, str]]) -> None:
    count = sum(text.count("<image>") for _, text in turns)
    said = [Said(role, text) for role, text in turns]  # type: ignore[arg-type]
    placed = [parts for _, parts, _ in place_pictures(said, count, "here")]
    again = [
        "".join("<image>" if isinstance(p, ImagePart) else p.text for p in parts if isinstance(p, ImagePart | TextPart))
        for parts in placed
    ]
    assert again == [text for _, text in turns]
    assert [p.image for parts in placed for p in parts if isinstance(p, ImagePart)] == list(range(count))
