"""A sample that somebody's own code or file gives is right, or refused by what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mmit.data.sample import Sample, SampleError, check, from_json, message, to_json

RECORD: dict[str, Any] = json.loads(
    to_json(Sample("k", "s", (message("user", "q"), message("assistant", "a")), meta={"n": 1}))
)
PICTURE = {"name": "0.png", "width": 8, "height": 8, "sha256": "00"}


def with_part(part: Any, *, images: Any = ()) -> dict[str, Any]:
    user = {"role": "user", "content": [part]}
    return RECORD | {"messages": [user, *RECORD["messages"][1:]], "images": list(images)}


def with_train(train: Any) -> dict[str, Any]:
    return RECORD | {"messages": [RECORD["messages"][0], RECORD["messages"][1] | {"train": train}]}


WRONG = {
    "a number for a text": (with_part({"type": "text", "text": 5}), r"message 0: .* text 5 .* string"),
    "no text": (with_part({"type": "text", "text": None}), r"message 0: .* text None"),
    "a string for an index": (
        with_part({"type": "image", "image": "0"}, images=[PICTURE]),
        r"message 0: names image '0'",
    ),
    "a fraction for an index": (
        with_part({"type": "image", "image": 0.0}, images=[PICTURE]),
        r"message 0: names image 0\.0",
    ),
    "a string in a video": (
        with_part({"type": "video", "frames": ["0"], "seconds": [0.0]}, images=[PICTURE]),
        r"message 0: names image '0'",
    ),
    "a string in a box": (
        with_part({"type": "box", "image": 0, "box": ["a", 1, 2, 3]}, images=[PICTURE]),
        r"message 0: a box .*'a'.* numbers",
    ),
    "train as a string": (with_train("false"), r"message 1: train is 'false'; write true or false"),
    "train as null": (with_train(None), r"message 1: train is None"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_another_kind_is_refused_with_its_place(name: str) -> None:
    """`train: "false"` would be true, and a text that is none would stop a run from inside a worker."""
    record, reason = WRONG[name]
    with pytest.raises(SampleError, match=f"^there: {reason}"):
        from_json(json.dumps(record), "there")


def test_what_is_right_passes() -> None:
    assert from_json(json.dumps(RECORD), "there").messages[1].train
    assert not from_json(json.dumps(with_train(False)), "there").messages[1].train
    sample = Sample("k", "s", (message("user", "q"), message("assistant", "a")))
    assert check(sample, "there") is sample
