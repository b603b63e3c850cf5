from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.quality.scan import finds, masked, scan, without
from tests.tools.quality import chats, numbers
from tests.tools.test_cli import Command, command

__all__ = ["command"]

PRIVATE = {
    "e-mail": ["jane.doe+list@mail.example.org", "x@y.co", "UPPER_case-99@sub.domain.museum"],
    "phone": ["+49 30 1234567", "+1 (415) 555-2671", "(020) 7946-0958", "415-555-2671", "+442079460958"],
    "key": [
        "AKIA" + "ABCDEFGHIJKLMNOP",
        "ghp_" + "a1B2" * 9,
        "sk-" + "proj-" + "q7W8" * 8,
        "hf_" + "AbCd" * 9,
        "xoxb-" + "1234567890-abcdef",
        "-----BEGIN RSA " + "PRIVATE KEY-----",
    ],
    "card": ["4111 1111 1111 1111", "5500-0000-0000-0004", "340000000000009", "6011000000000004"],
}
HARMLESS = [
    "The years 1990-2000 and 2001-2010, pages 100-120.",
    "4111 1111 1111 1112 has a wrong check digit.",
    "pi is 3.14159265358979323846264338",
    "Version 192.168.100.200 of 2024-05-17 12:30:00",
    "at@ nothing, @name, a@b",
    "sk-learn and hf_hub are libraries; ask-me-anything-about-this-and-that",
    "(sk-learn-compatible-estimators-and-pipelines)",
    "ISBN 978-3-16-148410-0",
    "The answer is 1,234,567,890,123,456.",
    "0000 0000 0000 0000",
]


@pytest.mark.parametrize(("type", "value"), [(type, value) for type, values in PRIVATE.items() for value in values])
def test_planted_values_are_found_whole_and_once(type: str, value: str) -> None:
    for text in (value, f"Write to {value}, please.", f"({value})", f"“{value}”\n"):
        assert list(finds(text)) == [(type, value)], text


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_it_is_left_alone(text: str) -> None:
    assert list(finds(text)) == []


@given(st.from_regex(r"[3-6][0-9]{14,15}", fullmatch=True))
def test_card_numbers_follow_the_check_digit_of_the_standard(number: str) -> None:
    """Against the sum written out: every second digit from the right doubled, its digits added."""
    total = 0
    for place, digit in enumerate(reversed(number)):
        value = int(digit) * (1 + place % 2)
        total += value // 10 + value % 10
    assert bool(list(finds(number))) == (total % 10 == 0 and len(set(number)) > 1)


def test_no_output_shows_a_value(command: Command, tmp_path: Path) -> None:
    draw = random.Random(0)
    values = [value for values in PRIVATE.values() for value in values if not value.startswith("--")]
    rows = [(f"Take {draw.choice(values)}", f"and {value}") for value in values]
    chats(tmp_path / "in", rows)
    code, text, error = command("scan", tmp_path / "in", "--report", tmp_path / "r.jsonl")
    assert code == 0
    shown = text + error + (tmp_path / "r.jsonl").read_text()
    assert [value for value in values if value in shown] == []
    for line in map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines()):
        kept = [character for character in line["masked"] if character.isalnum()]
        assert len(kept) <= (3 if line["type"] != "e-mail" else 8), line


@pytest.mark.parametrize("type", PRIVATE)
def test_a_mask_tells_too_little_to_use(type: str) -> None:
    for value in PRIVATE[type]:
        if not value.startswith("--"):
            hidden = masked(type, value)
            assert value not in hidden
            assert value.rpartition(".")[0][1:] not in hidden if type == "e-mail" else value[4:] not in hidden


def test_counts_are_those_of_what_was_planted_and_the_rest_stays(tmp_path: Path) -> None:
    rows = [
        ("Hello.", "Hi."),
        ("Mail a@example.com or b@example.com", "or c@example.org"),
        ("Call +49 30 1234567", "Pay with 4111 1111 1111 1111"),
        ("Nothing", "here"),
    ]
    chats(tmp_path / "in", rows)
    found = scan(tmp_path / "in", tmp_path / "r.jsonl")
    assert found.values == {"e-mail": 3, "card": 1, "key": 0, "phone": 1}
    assert found.affected == {"e-mail": 1, "card": 1, "key": 0, "phone": 1}
    assert (found.any, found.samples) == (2, 4)
    wheres = [json.loads(line)["where"] for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert wheres == [
        f"in/shard-000000.tar:s00000{number}: message {message}"
        for number, message in ((1, 0), (1, 0), (1, 1), (2, 0), (2, 1))
    ]
    assert numbers(without(tmp_path / "in", tmp_path / "out").shards) == [0, 3]
