import io
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from data_tools.formats.easy_vqa import samples
from data_tools.rows import Rejected
from mmit.config import ConfigError
from mmit.data.sample import ImagePart, Sample, TextPart

QUESTIONS = [
    ["what color is the shape?", "blue", 0],
    ["is there a circle?", "no", 0],
    ["what shape is present?", "rectangle", 0],
    ["is there a red shape?", "no", 1],
    ["is no circle present?", "yes", 0],
    ["what is the blue shape?", "rectangle", 0],
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        (tmp_path / split / "images").mkdir(parents=True)
        (tmp_path / split / "questions.json").write_text(json.dumps(QUESTIONS))
        for number in (0, 1):
            stream = io.BytesIO()
            Image.new("RGB", (64, 64), (0, 0, 255)).save(stream, format="PNG")
            (tmp_path / split / "images" / f"{number}.png").write_bytes(stream.getvalue())
    return tmp_path


def pairs(sample: Sample) -> list[tuple[str, str]]:
    texts = [item.text.removeprefix("\n") for item in sample.messages]
    return list(zip(texts[::2], texts[1::2], strict=True))


def read(path: Path, **options) -> list[Sample]:
    found = list(samples(path, **options))
    assert not [item for item in found if isinstance(item, Rejected)]
    return [item for item in found if isinstance(item, Sample)]


def test_every_question_is_asked_once_with_its_answer(folder):
    asked = [(*pair, sample.meta["picture"]) for sample in read(folder) for pair in pairs(sample)]
    assert Counter(asked) == Counter(map(tuple, QUESTIONS))


def test_only_the_first_turn_shows_the_picture(folder):
    first, *rest = read(folder)[0].messages
    assert [type(part) for part in first.parts] == [ImagePart, TextPart, TextPart]
    assert not [part for item in rest for part in item.parts if isinstance(part, ImagePart)]


def test_apart_every_question_is_its_own_sample_with_the_picture(folder):
    found = read(folder, joined=False)
    assert len(found) == len(QUESTIONS)
    assert all(isinstance(sample.messages[0].parts[0], ImagePart) for sample in found)


def test_each_kind_is_limited_and_a_picture_without_questions_is_left_out(folder):
    found = read(folder, open_questions=2, yes_no_questions=0)
    assert [sample.meta["picture"] for sample in found] == [0]
    assert len(pairs(found[0])) == 2
    assert not {answer for _, answer in pairs(found[0])} & {"yes", "no"}


def test_a_conversation_depends_on_its_picture_and_the_seed_alone(folder):
    before = {s.meta["picture"]: pairs(s) for s in read(folder, open_questions=1)}
    file = folder / "train" / "questions.json"
    file.write_text(json.dumps([row for row in QUESTIONS if row[2] == 0]))
    assert pairs(read(folder, open_questions=1)[0]) == before[0]
    orders = {tuple(pairs(read(folder, seed=seed)[0])) for seed in range(8)}
    assert len(orders) > 1


def test_folder_of_a_split_and_its_file_read_the_same(folder):
    whole = [pairs(sample) for sample in read(folder, split="test")]
    assert [pairs(sample) for sample in read(folder / "test")] == whole
    assert [pairs(sample) for sample in read(folder / "test" / "questions.json")] == whole


def test_a_row_of_another_shape_is_rejected_by_its_place(folder):
    (folder / "train" / "questions.json").write_text(json.dumps([*QUESTIONS, ["what?", "blue"]]))
    found = [item for item in samples(folder) if isinstance(item, Rejected)]
    assert [item.row for item in found] == [len(QUESTIONS)]
    assert "picture number" in found[0].reason


def test_a_folder_without_questions_names_the_file_it_needs(tmp_path):
    with pytest.raises(ConfigError, match=r"train/questions\.json"):
        list(samples(tmp_path))
