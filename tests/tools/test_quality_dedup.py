from __future__ import annotations

import io
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.quality.dedup import dedup, first_alike
from data_tools.quality.near import NearTexts, rows_of_band
from data_tools.quality.pictures import PRINT, alike, groups
from data_tools.quality.words import jaccard, shingles
from mmit.config import ConfigError
from mmit.data.sample import SampleError
from mmit.data.shards import verify
from tests.tools.conftest import picture_bytes
from tests.tools.quality import chats, files, numbers, removed
from tests.tools.test_cli import Command, command

__all__ = ["command"]

VOCABULARY = [f"{a}{b}{c}" for a in "bdfgklmnpr" for b in "aeiou" for c in "mnrst"]


def sentence(draw: random.Random, words: int) -> list[str]:
    return [draw.choice(VOCABULARY) for _ in range(words)]


def photo(number: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """A picture with shapes as photos have them: smooth, another for each number."""
    coarse = np.random.default_rng(number).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **save: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, **save)
    return stream.getvalue()


# Exactly the same ---------------------------------------------------------------------------------------------------


def test_planted_copies_are_exactly_what_is_left_out(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [(" ".join(sentence(draw, 8)), " ".join(sentence(draw, 12))) for _ in range(200)]
    planted = {}
    for original in draw.sample(range(200), 40):
        user, answer = rows[original]
        planted[len(rows)] = original
        rows.append((f"  {user.upper()}\n", answer.replace(" ", "  ").replace("fi", "ﬁ")))
    chats(tmp_path / "in", rows)
    derived = dedup(tmp_path / "in", tmp_path / "out")
    assert derived.removed == {"same": 40}
    assert {line["number"]: int(line["of"][1:]) for line in removed(tmp_path / "out")} == planted
    assert numbers(derived.shards) == list(range(200))
    assert list(verify(tmp_path / "out")) == []


def test_the_same_words_about_another_picture_are_no_copy(tmp_path: Path) -> None:
    rows = [
        ("What?", "A cat.", [picture_bytes(1)]),
        ("What?", "A cat.", [picture_bytes(2)]),
        ("What?", "A cat.", [picture_bytes(1)]),
        ("What?", "A dog.", [picture_bytes(1)]),
        ("What?", "A cat."),
        ("What?", "A cat.", [picture_bytes(1), picture_bytes(2)]),
        ("What?", "A cat.", [picture_bytes(2), picture_bytes(1)]),
    ]
    chats(tmp_path / "in", rows)
    assert numbers(dedup(tmp_path / "in", tmp_path / "a").shards) == [0, 1, 3, 4, 5, 6]
    assert numbers(dedup(tmp_path / "in", tmp_path / "b", by="prompt").shards) == [0, 1, 4, 5, 6]
    assert numbers(dedup(tmp_path / "in", tmp_path / "c", by="pictures").shards) == [0, 1, 4, 5, 6]


def test_who_says_it_makes_a_difference(tmp_path: Path) -> None:
    chats(tmp_path / "in", [("ab", "c"), ("a", "bc"), ("abc", ""), ("ab", "c")])
    assert numbers(dedup(tmp_path / "in", tmp_path / "out").shards) == [0, 1, 2]


def test_of_equal_rows_the_first_stays_as_a_dictionary_would_have_it() -> None:
    rows = np.random.default_rng(0).integers(0, 4, (500, 2)).astype(np.uint64)
    first: dict[tuple[int, int], int] = {}
    expected = []
    for number, row in enumerate(map(tuple, rows.tolist())):
        seen = first.setdefault(row, number)
        expected.append(seen if seen != number else -1)
    assert first_alike(rows).tolist() == expected
    assert len(first_alike(rows[:0])) == 0


# Nearly the same ----------------------------------------------------------------------------------------------------


def near_pairs(texts: list[str], threshold: float, folder: Path) -> np.ndarray:
    of = np.full(len(texts), -1, dtype=np.int64)
    with NearTexts(folder / "bands.bin", len(texts), threshold) as near:
        for text in texts:
            near.add(text, 0)
        near.duplicates(texts.__getitem__, of, lambda done, total: None)
    return of


def test_planted_near_copies_are_found_and_nothing_else(tmp_path: Path) -> None:
    """Against all pairs compared by brute force: precision 1 by the check of every pair, recall at least 0.98."""
    pytest.importorskip("rensa")
    draw = random.Random(1)
    texts = [sentence(draw, draw.randint(20, 60)) for _ in range(400)]
    for original in draw.sample(range(400), 200):
        changed = list(texts[original])
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(changed))] = draw.choice(VOCABULARY)
        texts.append(changed)
    joined = [" ".join(text) for text in texts]
    split = [shingles(text, 3) for text in joined]
    true = {(b, a) for b in range(len(split)) for a in range(b) if jaccard(split[a], split[b]) >= 0.7}
    of = near_pairs(joined, 0.7, tmp_path)
    found = {(b, int(of[b])) for b in np.flatnonzero(of >= 0).tolist()}
    assert len(true) > 80
    assert found <= true
    assert len(found) >= 0.98 * len({b for b, _ in true})


def test_the_bands_find_pairs_at_the_threshold() -> None:
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 1.0):
        rows = rows_of_band(threshold)
        assert 1 - (1 - threshold**rows) ** (128 // rows) >= 0.98


def test_near_copies_in_shards_are_named_with_their_likeness(tmp_path: Path) -> None:
    pytest.importorskip("rensa")
    draw = random.Random(2)
    base = sentence(draw, 40)
    other = [*base[:39], "elephant"]
    answer = "It is so."
    rows = [
        (" ".join(base), answer),
        (" ".join(sentence(draw, 40)), answer),
        (" ".join(other), answer),
        (" ".join(other), answer, [picture_bytes(1)]),
        (" ".join(base), answer),
    ]
    chats(tmp_path / "in", rows)
    derived = dedup(tmp_path / "in", tmp_path / "out", near=0.7)
    assert numbers(derived.shards) == [0, 1, 3], "with a picture it is another sample"
    lines = removed(tmp_path / "out")
    assert [(line["number"], line["reason"], line["of"]) for line in lines] == [
        (2, "near", "s000000"),
        (4, "same", "s000000"),
    ]
    texts = ["\n".join(rows[number][:2]) for number in (0, 2)]
    assert lines[0]["similarity"] == round(jaccard(*(shingles(text, 3) for text in texts)), 4)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("rensa")
    draw = random.Random(3)
    rows = [(" ".join(sentence(draw, 6)), " ".join(VOCABULARY[:20])) for _ in range(60)]
    chats(tmp_path / "in", rows)
    for name in ("a", "b"):
        dedup(tmp_path / "in", tmp_path / name, near=0.5)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert not (tmp_path / "a" / ".unfinished").exists()


def test_texts_without_spaces_have_words_too(tmp_path: Path) -> None:
    pytest.importorskip("rensa")
    one = "图片里的男人坐在公园的长椅上看报纸旁边有一只很大的黑色的狗和一棵树"
    texts = [one, one.replace("黑", "白"), "今天天气很好我们去海边散步然后回家吃饭看电视睡觉明天再去上班"]
    assert near_pairs(texts, 0.7, tmp_path).tolist() == [-1, 0, -1]


def test_memory_does_not_grow_with_the_length_of_texts(tmp_path: Path) -> None:
    pytest.importorskip("rensa")

    def peak(words: int) -> int:
        draw = random.Random(4)
        tracemalloc.start()
        of = np.full(6000, -1, dtype=np.int64)
        with NearTexts(tmp_path / "bands.bin", 6000, 0.7) as near:
            for _ in range(6000):
                near.add(" ".join(sentence(draw, words)), 0)
            tracemalloc.reset_peak()
            near.duplicates(lambda number: "", of, lambda done, total: None)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    peak(10)
    assert peak(60) < 1.2 * peak(20) + 100_000


# Pictures -----------------------------------------------------------------------------------------------------------


def test_pictures_encoded_again_are_alike_and_others_are_not(tmp_path: Path) -> None:
    """30 pictures, each again as JPEG, smaller, and a little brighter: all 90 copies found, no two originals joined."""
    pytest.importorskip("imagehash")
    rows = [("What?", "So.", [encoded(photo(number))]) for number in range(30)]
    for number in range(30):
        image = photo(number)
        rows.append(("What?", "So.", [encoded(image, "JPEG", quality=60)]))
        rows.append(("What?", "So.", [encoded(image.resize((64, 48)))]))
        brighter = np.minimum(np.asarray(image).astype(np.int16) + 5, 255).astype(np.uint8)
        rows.append(("What?", "So.", [encoded(Image.fromarray(brighter))]))
    chats(tmp_path / "in", rows)
    derived = dedup(tmp_path / "in", tmp_path / "out", alike=4)
    assert numbers(derived.shards) == list(range(30))
    named = {line["number"]: int(line["of"][1:]) for line in removed(tmp_path / "out")}
    assert named == {30 + 3 * number + copy: number for number in range(30) for copy in range(3)}


def test_pictures_of_one_shape_in_two_colours_are_not_alike(tmp_path: Path) -> None:
    pytest.importorskip("imagehash")
    rows = [("Colour?", "?", [encoded(Image.new("RGB", (32, 32), name))]) for name in ("red", "blue", "white", "black")]
    chats(tmp_path / "in", rows)
    with_copy = [*rows, ("Colour?", "?", [encoded(Image.new("RGB", (40, 40), "blue"))])]
    chats(tmp_path / "more", with_copy)
    assert numbers(dedup(tmp_path / "in", tmp_path / "a", by="pictures", alike=4).shards) == [0, 1, 2, 3]
    assert numbers(dedup(tmp_path / "more", tmp_path / "b", by="pictures", alike=4).shards) == [0, 1, 2, 3]


@pytest.mark.parametrize("most", [0, 1, 4, 9, 16])
def test_comparing_by_blocks_finds_what_comparing_all_finds(most: int) -> None:
    draw = np.random.default_rng(most)
    prints = np.zeros(300, dtype=PRINT)
    prints["hash"][:100] = draw.integers(0, 2**64, 100, dtype=np.uint64)
    for number in range(100, 300):
        flips = np.bitwise_or.reduce(np.uint64(1) << draw.integers(0, 64, draw.integers(0, 20)).astype(np.uint64))
        prints["hash"][number] = prints["hash"][number - 100] ^ flips
    prints["colours"][::7] = 100
    found = {(number, other) for number, near in alike(prints, prints, most) for other in near.tolist()}
    bits = np.bitwise_count(prints["hash"][:, None] ^ prints["hash"][None, :])
    colours = prints["colours"][:, 0]
    close = (bits <= most) & (colours[:, None] == colours[None, :])
    assert found == set(zip(*(part.tolist() for part in np.nonzero(close)), strict=True))
    parent = groups(prints, most)
    assert all(parent[a] == parent[b] for a, b in found)
    assert (parent[parent] == parent).all()


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    pytest.importorskip("imagehash")
    data = encoded(photo(1), "JPEG")
    chats(tmp_path / "in", [("What?", "So.", [data]), ("What?", "So.", [data[: len(data) // 2]])])
    with pytest.raises(SampleError, match="s000001: picture 0"):
        dedup(tmp_path / "in", tmp_path / "out", alike=4)


# The command --------------------------------------------------------------------------------------------------------


def test_options_that_cannot_be_are_refused(command: Command, tmp_path: Path) -> None:
    chats(tmp_path / "in", [("a", "b"), ("a", "b"), ("c", "d")])
    code, text, _ = command("dedup", tmp_path / "in", "--out", tmp_path / "out")
    assert code == 0
    assert "2 of 3 samples stay, 1 left out (same 1)" in text
    for arguments, words in (
        (("--by", "colour"), "conversation, prompt, pictures"),
        (("--near", "7"), "0.3 to 1"),
        (("--near", "0.7", "--by", "pictures"), "leave one of them out"),
        (("--alike", "40"), "0 to 16"),
    ):
        code, _, error = command("dedup", tmp_path / "in", "--out", tmp_path / "x", *arguments)
        assert (code, words in error) == (2, True), error
    with pytest.raises(ConfigError, match="no such folder"):
        dedup(tmp_path / "gone", tmp_path / "x")


@pytest.mark.shared
def test_real_photos_are_found_again_and_kept_apart(tmp_path: Path, shared: Path) -> None:
    pytest.importorskip("imagehash")
    paths = sorted(path for path in shared.rglob("*.jpg"))
    photos = [Image.open(path).convert("RGB") for path in paths]
    rows = [("What?", "So.", [encoded(image, "JPEG", quality=90)]) for image in photos]
    rows += [("What?", "So.", [encoded(image, "JPEG", quality=40)]) for image in photos]
    rows += [
        ("What?", "So.", [encoded(image.resize((image.width * 3 // 5, image.height * 3 // 5)))]) for image in photos
    ]
    chats(tmp_path / "in", rows)
    derived = dedup(tmp_path / "in", tmp_path / "out", alike=4)
    assert len(paths) >= 6
    assert numbers(derived.shards) == list(range(len(paths)))
    named = [int(line["of"][1:]) for line in removed(tmp_path / "out")]
    assert named == 2 * list(range(len(paths)))
