from __future__ import annotations

import fcntl
import io
import json
import multiprocessing
import os
import signal
import tarfile
from pathlib import Path

import pytest

from data_tools.convert import Settings, convert
from data_tools.index import index
from data_tools.merge import merge
from data_tools.quality import subset
from data_tools.quality.filter import Rules, filter_set, refusal
from mmit.config import ConfigError
from mmit.data.provenance import licenses
from mmit.data.sample import SampleError
from mmit.data.shards import ShardSet, verify
from tests.tools.conftest import picture_bytes, read_all
from tests.tools.quality import chat, chats, files, numbers, removed
from tests.tools.test_cli import Command, command

__all__ = ["command"]

ROWS = [
    (f"question {number}", "a" * number, [picture_bytes(number)] if number % 3 == 0 else []) for number in range(30)
]


def test_what_stays_is_the_same_and_what_goes_is_named(tmp_path: Path) -> None:
    shards = chats(tmp_path / "in", ROWS)
    derived = filter_set(tmp_path / "in", tmp_path / "out", Rules(least_answer=10))
    assert read_all(derived.shards) == read_all(shards)[10:]
    assert [(line["number"], line["key"], line["reason"], line["found"]) for line in removed(tmp_path / "out")] == [
        (number, f"s{number:06d}", "least_answer", number) for number in range(10)
    ]
    assert list(verify(tmp_path / "out")) == []


def test_the_record_tells_tool_options_input_and_counts(tmp_path: Path) -> None:
    shards = chats(tmp_path / "in", ROWS)
    filter_set(tmp_path / "in", tmp_path / "out", Rules(least_answer=10, most_answer=20))
    filter_set(tmp_path / "out", tmp_path / "again", Rules(most_answer=15))
    record = json.loads((tmp_path / "again" / "provenance.json").read_text())
    assert record["plan"]["tool"] == "mmit-data filter"
    assert record["plan"]["options"] == {"most_answer": 15}
    assert record["counts"] == {"samples": 11, "kept": 6, "removed": 5, "removed_by_reason": {"most_answer": 5}}
    before = record["made_from"]
    assert before["plan"]["input"] == {"folder": "in", "fingerprint": shards.fingerprint, "samples": 30}
    assert before["counts"]["removed_by_reason"] == {"least_answer": 10, "most_answer": 9}


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (Rules(least_characters=4), {1, 2, 3}),
        (Rules(most_characters=4), {0, 1}),
        (Rules(most_answer=3), {0, 1, 2}),
        (Rules(least_turns=2), set()),
        (Rules(user="^b"), {1}),
        (Rules(not_user="b|c"), {0, 3}),
        (Rules(assistant="[yz]$"), {1, 2}),
        (Rules(not_assistant="z"), {0, 1, 3}),
        (Rules(least_side=12), {0, 1, 3}),
        (Rules(most_side=39), {0, 1, 2}),
        (Rules(most_aspect=3.0), {0, 1, 2}),
        (Rules(most_characters=4, not_user="a"), {1}),
    ],
)
def test_each_rule_keeps_what_it_says(tmp_path: Path, rules: Rules, kept: set[int]) -> None:
    rows = [
        ("a", "x"),
        ("bb", "yy", [picture_bytes(1, size=(20, 12))]),
        ("cc", "zzz", [picture_bytes(2, size=(20, 12)), picture_bytes(3, size=(20, 10))]),
        ("d", "xxxx", [picture_bytes(4, size=(60, 12))]),
    ]
    chats(tmp_path / "in", rows)
    if not kept:
        with pytest.raises(SampleError, match="none of its 4 samples would be left"):
            filter_set(tmp_path / "in", tmp_path / "out", rules)
        return
    assert set(numbers(filter_set(tmp_path / "in", tmp_path / "out", rules).shards)) == kept


def test_refusals_are_known_from_answers_that_only_speak_of_them() -> None:
    refused = [
        "I'm sorry, but I can't help with that.",
        "As an AI language model, I do not have feelings.",
        "Unfortunately, I am unable to view the image you sent.",
        "I cannot assist with this request.",
        "Sorry, I can’t see images.",
    ]
    answered = [
        "The man in the picture is sorry that he cannot come.",
        "She can't see the image because the light is off.",
        "An AI model is a program that was trained on data.",
        "I can help with that. First, open the window.",
        "The sign says: cannot turn left.",
    ]
    assert [text for text in refused if refusal(chat(0, "q", text)) is None] == []
    assert [text for text in answered if refusal(chat(0, "q", text)) is not None] == []


def test_languages_are_told_apart(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    rows = [
        ("What is the man in the picture doing?", "He is reading a newspaper on a bench in the park."),
        ("Que fait l'homme sur la photo ?", "Il lit un journal sur un banc dans le parc."),
        ("Was macht der Mann auf dem Bild?", "Er liest auf einer Bank im Park eine Zeitung."),
        ("图片里的男人在做什么？", "他坐在公园的长椅上看报纸。"),
    ]
    chats(tmp_path / "in", rows)
    assert numbers(filter_set(tmp_path / "in", tmp_path / "o", Rules(languages=("en", "de"))).shards) == [0, 2]
    with pytest.raises(ConfigError, match="klingon: not known"):
        filter_set(tmp_path / "in", tmp_path / "p", Rules(languages=("klingon",)))


# Writing a set without some of its samples --------------------------------------------------------------------------


def _killed_after(folder: Path, shards: int) -> None:
    """Filters and is killed once so many shards have been written."""
    whole, done = subset.write_shard, 0

    def write_shard(*arguments: object) -> object:
        nonlocal done
        if done == shards:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        return whole(*arguments)  # type: ignore[arg-type]

    subset.write_shard = write_shard  # type: ignore[assignment]
    filter_set(folder / "in", folder / "out", Rules(least_answer=4))


@pytest.mark.parametrize("shards", [0, 3])
def test_a_killed_run_is_finished_by_the_same_command_to_the_same_bytes(tmp_path: Path, shards: int) -> None:
    chats(tmp_path / "in", ROWS)
    filter_set(tmp_path / "in", tmp_path / "whole", Rules(least_answer=4))
    child = multiprocessing.get_context("spawn").Process(target=_killed_after, args=(tmp_path, shards))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    with pytest.raises(SampleError, match="not finished"):
        ShardSet(tmp_path / "out")
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert len(finished) == shards
    filter_set(tmp_path / "in", tmp_path / "out", Rules(least_answer=4))
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == finished


def test_a_finished_set_is_left_alone_and_told_again(tmp_path: Path) -> None:
    chats(tmp_path / "in", ROWS)
    first = filter_set(tmp_path / "in", tmp_path / "out", Rules(least_answer=10))
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    second = filter_set(tmp_path / "in", tmp_path / "out", Rules(least_answer=10))
    assert (second.samples, second.removed) == (first.samples, first.removed) == (30, {"least_answer": 10})
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


def test_no_other_folder_is_ever_written_into(tmp_path: Path) -> None:
    chats(tmp_path / "in", ROWS)
    filter_set(tmp_path / "in", tmp_path / "out", Rules(least_answer=10))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    rules = Rules(least_answer=11)
    for name, words in (("out", "made in another way"), ("in", "the folder that is read"), ("mine", "not empty")):
        before = files(tmp_path / name)
        with pytest.raises(ConfigError, match=words):
            filter_set(tmp_path / "in", tmp_path / name, rules)
        assert files(tmp_path / name) == before


def test_a_run_killed_at_its_very_end_is_tidied_up_by_the_next(tmp_path: Path) -> None:
    chats(tmp_path / "in", ROWS)
    filter_set(tmp_path / "in", tmp_path / "out", Rules(least_answer=10))
    whole = files(tmp_path / "out")
    (tmp_path / "out" / "UNFINISHED").touch()
    (tmp_path / "out" / ".unfinished").mkdir()
    filter_set(tmp_path / "in", tmp_path / "out", Rules(least_answer=10))
    assert files(tmp_path / "out") == whole


def test_two_do_not_write_one_set(tmp_path: Path) -> None:
    chats(tmp_path / "in", ROWS)
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "UNFINISHED").open("w") as note:
        fcntl.flock(note, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            filter_set(tmp_path / "in", tmp_path / "out", Rules(least_answer=10))
    assert len(filter_set(tmp_path / "in", tmp_path / "out", Rules(least_answer=10)).shards) == 20


def test_tars_indexed_where_they_lie_come_out_under_keys_of_ours(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "x.tar", "w") as tar:
        for number in range(4):
            for name, data in (
                (f"a b {number}.png", picture_bytes(number)),
                (f"a b {number}.txt", b"c" * number + b"."),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    index(tmp_path / "tars")
    derived = filter_set(tmp_path / "tars", tmp_path / "out", Rules(least_answer=2))
    assert derived.shards.keys() == [f"tars-00000000{number}" for number in (1, 2, 3)]
    assert [sample.images[0].data for sample in read_all(derived.shards)] == [picture_bytes(n) for n in (1, 2, 3)]
    assert removed(tmp_path / "out")[0]["key"] == "a b 0", "the name it has in the tar that was read"
    assert list(verify(tmp_path / "out")) == []


def test_a_shard_of_which_nothing_is_left_is_not_written(tmp_path: Path) -> None:
    chats(tmp_path / "in", ROWS, samples_per_shard=5)
    derived = filter_set(tmp_path / "in", tmp_path / "out", Rules(least_answer=12))
    assert derived.shards.shard_names == [f"shard-00000{number}.tar" for number in (2, 3, 4, 5)]
    assert derived.shards.shard_sizes == [3, 5, 5, 5]


def test_licences_go_along_through_filtering_and_merging(tmp_path: Path) -> None:
    for name, license in (("a", "CC-BY-4.0"), ("b", "MIT"), ("c", None)):
        rows = [{"instruction": f"{name} {number}?", "output": "x" * number} for number in range(1, 9)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        convert("alpaca", tmp_path / f"{name}.json", None, tmp_path / name, settings=Settings(license=license))
    filter_set(tmp_path / "a", tmp_path / "filtered", Rules(least_answer=2))
    filter_set(tmp_path / "filtered", tmp_path / "twice", Rules(least_answer=3))
    merge([tmp_path / "twice", tmp_path / "b", tmp_path / "c"], tmp_path / "all")
    filter_set(tmp_path / "all", tmp_path / "last", Rules(least_answer=4))
    found = {name: licenses(tmp_path / name) for name in ("a", "b", "c", "filtered", "twice", "all", "last")}
    one, both = ["CC-BY-4.0"], ["CC-BY-4.0", "MIT"]
    assert found == {"a": one, "b": ["MIT"], "c": [], "filtered": one, "twice": one, "all": both, "last": both}


def test_the_command_ends_with_the_code_of_whose_fault_it_is(command: Command, tmp_path: Path) -> None:
    chats(tmp_path / "in", ROWS)
    code, text, _ = command("filter", tmp_path / "in", "--out", tmp_path / "out", "--least-answer", 10)
    assert code == 0
    assert "20 of 30 samples stay, 10 left out (least_answer 10)" in text
    for arguments, words, expected in (
        ((tmp_path / "in", "--out", tmp_path / "x"), "no rule given", 2),
        ((tmp_path / "in", "--out", tmp_path / "x", "--user", "("), "no regular expression", 2),
        ((tmp_path / "gone", "--out", tmp_path / "x", "--user", "a"), "no such folder", 2),
        ((tmp_path / "in", "--out", tmp_path / "x", "--user", "absent"), "none of its 30 samples", 3),
        ((tmp_path, "--out", tmp_path / "x", "--user", "a"), "has no index.json", 3),
    ):
        code, _, error = command("filter", *arguments)
        assert (code, words in error) == (expected, True), error
