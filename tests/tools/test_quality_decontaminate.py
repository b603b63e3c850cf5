from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data_tools.quality.decontaminate import apply, survey
from mmit.config import ConfigError
from mmit.data.sample import SampleError
from tests.tools.quality import chats, files, numbers, removed
from tests.tools.test_cli import Command, command
from tests.tools.test_quality_dedup import encoded, photo, sentence

__all__ = ["command"]


def matches(report: Path) -> list[dict]:
    return [json.loads(line) for line in report.read_text().splitlines()[1:]]


def test_planted_items_are_exactly_what_is_marked(tmp_path: Path) -> None:
    """300 training texts, 100 evaluation prompts, 30 of them hidden whole, in other case and punctuation, in a text."""
    draw = random.Random(0)
    items = [sentence(draw, draw.randint(8, 40)) for _ in range(100)]
    chats(tmp_path / "eval", [(" ".join(item), "An answer.") for item in items], prefix="e")
    texts = [sentence(draw, 60) for _ in range(300)]
    planted = dict(zip(draw.sample(range(300), 30), draw.sample(range(100), 30), strict=True))
    rows = []
    for number, text in enumerate(texts):
        if number in planted:
            leak = [word.upper() + ("," if place % 3 else "\n") for place, word in enumerate(items[planted[number]])]
            text = [*text[:20], *leak, *text[20:]]
        rows.append((" ".join(text), "Yes.") if number % 2 else ("Tell me.", " ".join(text)))
    chats(tmp_path / "train", rows)
    found = survey(tmp_path / "train", [tmp_path / "eval"], tmp_path / "r.jsonl")
    lines = matches(tmp_path / "r.jsonl")
    assert {line["number"]: int(line["item"].rpartition(":e")[2]) for line in lines} == planted
    assert all(line["covered"] == 1 and line["remove"] for line in lines)
    assert all(line["text"] == " ".join(items[planted[line["number"]]])[:400] for line in lines)
    assert (found.matched, found.marked, found.samples) == (30, 30, 300)
    assert (found.against[0].items, found.against[0].found_texts, found.against[0].too_short) == (100, 30, 0)


def test_a_shared_phrase_is_told_but_not_marked(tmp_path: Path) -> None:
    draw = random.Random(1)
    item = sentence(draw, 60)
    chats(tmp_path / "eval", [(" ".join(item), "x")], prefix="e")
    rows = [
        (" ".join([*sentence(draw, 5), *item[10 : 10 + size], *sentence(draw, 5)]), "y") for size in (12, 13, 29, 30)
    ]
    chats(tmp_path / "train", rows)
    survey(tmp_path / "train", [tmp_path / "eval"], tmp_path / "r.jsonl")
    told = [(line["number"], line["covered"], line["remove"]) for line in matches(tmp_path / "r.jsonl")]
    assert told == [(1, round(13 / 60, 4), False), (2, round(29 / 60, 4), False), (3, 0.5, True)]


def test_short_prompts_and_the_wording_of_a_set_are_counted_not_matched(tmp_path: Path) -> None:
    draw = random.Random(2)
    wording = "answer the question about the picture with the letter of the right option and nothing else please"
    rows = [(f"{wording} {' '.join(sentence(draw, 20))}", "A") for _ in range(40)] + [("What colour is it?", "Red")] * 5
    chats(tmp_path / "eval", rows, prefix="e")
    train = [(f"{wording} {' '.join(sentence(draw, 20))}", "B"), ("What colour is it?", "Blue")]
    chats(tmp_path / "train", train)
    found = survey(tmp_path / "train", [tmp_path / "eval"], tmp_path / "r.jsonl")
    assert (found.matched, found.against[0].too_short) == (0, 5)
    assert found.against[0].common == len(wording.split()) - 12


def test_pictures_are_found_by_their_bytes_and_by_their_looks(tmp_path: Path) -> None:
    pytest.importorskip("imagehash")
    rows = [("What?", "x", [encoded(photo(number))]) for number in range(8)]
    chats(tmp_path / "eval", rows, prefix="e")
    train = [
        ("Hm?", "y", [encoded(photo(20)), encoded(photo(3))]),
        ("Hm?", "y", [encoded(photo(5), "JPEG", quality=60)]),
        ("Hm?", "y", [encoded(photo(21))]),
    ]
    chats(tmp_path / "train", train)
    survey(tmp_path / "train", [tmp_path / "eval"], tmp_path / "a.jsonl")
    survey(tmp_path / "train", [tmp_path / "eval"], tmp_path / "b.jsonl", alike=4)
    same = (0, "picture", "eval/shard-000000.tar:e000003")
    assert [(line["number"], line["kind"], line["item"]) for line in matches(tmp_path / "a.jsonl")] == [same]
    assert [(line["number"], line["kind"], line["item"]) for line in matches(tmp_path / "b.jsonl")] == [
        same,
        (1, "alike", "eval/shard-000000.tar:e000005"),
    ]


def test_nothing_is_removed_before_it_is_asked_for_and_reviewed_lines_count(tmp_path: Path) -> None:
    draw = random.Random(3)
    items = [" ".join(sentence(draw, 20)) for _ in range(3)]
    chats(tmp_path / "eval", [(item, "x") for item in items], prefix="e")
    chats(tmp_path / "train", [*((item, "y") for item in items), ("Something else.", "z")])
    before = files(tmp_path / "train")
    report = tmp_path / "r.jsonl"
    survey(tmp_path / "train", [tmp_path / "eval"], report)
    assert files(tmp_path / "train") == before
    assert numbers(apply(tmp_path / "train", report, tmp_path / "all").shards) == [3]
    header, first, second, third = report.read_text().splitlines()
    report.write_text("\n".join([header, first, second.replace('"remove": true', '"remove": false')]) + "\n")
    assert numbers(apply(tmp_path / "train", report, tmp_path / "some").shards) == [1, 2, 3]
    assert [(line["number"], line["reason"]) for line in removed(tmp_path / "some")] == [(0, "text")]
    report.write_text("\n".join([header, third.replace("s000002", "s000001")]) + "\n")
    with pytest.raises(SampleError, match=r"r\.jsonl:2: sample 2 is not 's000001'"):
        apply(tmp_path / "train", report, tmp_path / "wrong")
    with pytest.raises(ConfigError, match="about another set"):
        apply(tmp_path / "eval", report, tmp_path / "other")
    report.write_text("nonsense\n")
    with pytest.raises(ConfigError, match="first line"):
        apply(tmp_path / "train", report, tmp_path / "nonsense")


def test_the_command_reports_and_removes_only_with_apply(command: Command, tmp_path: Path) -> None:
    item = "how many of the small green boats in the harbour have a flag at the mast today"
    chats(tmp_path / "eval", [(item, "2")], prefix="e")
    chats(tmp_path / "train", [("Hello.", "Hi."), (item, "2")])
    report, out = tmp_path / "r.jsonl", tmp_path / "out"
    words = (tmp_path / "train", "--against", tmp_path / "eval", "--report", report)
    code, text, _ = command("decontaminate", *words)
    assert code == 0
    assert "1 of 2 samples match, 1 are marked" in text
    assert "nothing was removed" in text
    assert not out.exists()
    code, text, _ = command("decontaminate", *words, "--apply", "--out", out)
    assert code == 0
    assert "1 of 2 samples stay, 1 left out (text 1)" in text
    code, text, _ = command(
        "decontaminate", tmp_path / "train", "--report", report, "--reviewed", "--apply", "--out", out
    )
    assert code == 0
    for arguments, expected in (
        ((*words, "--apply"), "belong together"),
        ((*words, "--out", out), "belong together"),
        ((tmp_path / "train",), "--against"),
        ((*words, "--words", 3), "shared by chance"),
        ((tmp_path / "train", "--against", tmp_path / "train"), "checked itself"),
    ):
        code, _, error = command("decontaminate", *arguments)
        assert (code, expected in error) == (2, True), error
