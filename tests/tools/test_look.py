from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.cli import main
from data_tools.convert import Settings, convert
from data_tools.grid import grid
from data_tools.lettering import lettering, wrapped
from data_tools.mix import mix, table
from data_tools.show import page
from data_tools.stats import epoch, measure, packed_rows, report, summary
from mmit.config import ConfigError
from tests.tools.test_convert import rows_with


@pytest.fixture
def shards(photos: Path, tmp_path: Path) -> Path:
    convert("llava", rows_with(photos, 12), photos, tmp_path / "shards", settings=Settings(source="a"))
    return tmp_path / "shards"


def test_figures_are_counted_and_tokens_are_the_trainers(shards: Path) -> None:
    (stats,) = measure([shards], language="bytes", chat="chatml", image_tokens=5, max_tokens=25)
    assert stats.samples == 12
    assert stats.images == {1: 12}
    assert stats.sizes == [(20, 12)] * 12
    assert stats.trained == stats.kept == [0] * 12
    told = dict(summary(stats, max_tokens=25))
    assert told["longer than 25"] == "12 of 12: 0 lose trailing turns, 12 are left out"
    (stats,) = measure([shards], language="bytes", chat="chatml", image_tokens=5)
    # 10 of the 12 answers are `0!`, the others `10!`; each ends with the stop token.
    assert sorted(stats.trained) == [3] * 10 + [4] * 2
    assert stats.kept == stats.tokens
    assert told["samples"] == "12"


def test_the_page_holds_data_as_text_and_fetches_nothing(tmp_path: Path) -> None:
    evil = '<script>alert(1)</script><img src="http://x/y">'
    row = {"instruction": evil, "output": "x"}
    (tmp_path / "in.json").write_text(json.dumps([row, row]))
    folder = tmp_path / "<b>set"
    convert("alpaca", tmp_path / "in.json", None, folder, settings=Settings(source="s"))
    page = report(measure([folder] * 2, language="bytes", chat="chatml", image_tokens=5), max_tokens=2048)
    assert "<script" not in page
    assert "<b>set" not in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert page.count("<img ") >= 8


def test_the_epoch_that_stats_tells_is_the_sum_of_its_weighted_sets(shards: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "bb"}] * 10
    (tmp_path / "in.json").write_text(json.dumps(rows))
    text = tmp_path / "text=only"
    convert("alpaca", tmp_path / "in.json", None, text)
    found = measure([f"{shards}=0.5", f"{text}=3"], language="bytes", chat="chatml", image_tokens=5)
    heads, first, second, sums = epoch(found)
    assert heads[2:6] == ["samples", "pictures", "tokens", "trained tokens"]
    assert first[1:4] == ["0.5", "6", "6"]
    assert second[:4] == ["text=only", "3", "30", "0"]
    assert second[5] == "90"  # each `bb` and the stop token
    assert first[5] == str(round((10 * 3 + 2 * 4) / 2))
    assert sums[2:6] == ["36", "6", f"{int(first[4]) + int(second[4])}", f"{int(first[5]) + 90}"]
    assert measure([text], language=None, chat="auto", image_tokens=5)[0].repeat == 1


def test_a_page_of_pictures_is_the_same_each_time(shards: Path, tmp_path: Path) -> None:
    assert grid(shards, tmp_path / "a.png", count=6, columns=3) == (6, "")
    grid(shards, tmp_path / "b.png", count=6, columns=3)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500, "the pictures are on it"


def test_letters_of_no_font_here_are_no_fault(photos: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>这是什么? \U000f0000"}, {"from": "gpt", "value": "🙂 $x$ แมว"}]
    (tmp_path / "in.json").write_text(json.dumps([{"image": "0.png", "conversations": turns}]))
    convert("llava", tmp_path / "in.json", photos, tmp_path / "set")
    assert grid(tmp_path / "set", tmp_path / "a.png")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["grid", "--columns", "0"], "columns"),
        (["grid", "--count", "0"], "count"),
        (["verify", "--most", "0"], "most"),
        (["stats", "--max-tokens", "0"], "max-tokens"),
    ],
)
def test_numbers_that_ask_for_nothing_are_refused(
    shards: Path, arguments: list[str], found: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["mmit-data", arguments[0], str(shards), *arguments[1:]])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert found in capsys.readouterr().err


@pytest.mark.parametrize("command", ["show", "stats", "grid", "mix", "merge", "filter"])
def test_a_folder_that_is_not_there_is_the_users_fault(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--out", str(tmp_path / "o")] if command in ("merge", "filter") else []
    more += ["--least-answer", "1"] if command == "filter" else []
    monkeypatch.setattr("sys.argv", ["mmit-data", command, str(tmp_path / "nowhere"), *more])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_a_set_that_lies_elsewhere_looks_the_same(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MMIT_CACHE", str(tmp_path / "cache"))
    told = []
    for place in (str(shards), shards.as_uri()):
        monkeypatch.setattr("sys.argv", ["mmit-data", "show", place, "--index", "3", "--count", "2"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] != ""
    for name, place in (("here", shards), ("there", shards.as_uri())):
        grid(place, tmp_path / f"{name}.png", count=6)
        page(place, tmp_path / f"{name}.html", count=3)
    assert (tmp_path / "here.png").read_bytes() == (tmp_path / "there.png").read_bytes()
    assert (tmp_path / "here.html").read_bytes() == (tmp_path / "there.html").read_bytes()


def test_a_set_without_pictures_has_no_page(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    convert("alpaca", tmp_path / "in.json", None, tmp_path / "s")
    with pytest.raises(ConfigError, match="no sample has a picture"):
        grid(tmp_path / "s", tmp_path / "a.png")


def test_a_mixture_adds_up(shards: Path) -> None:
    half, twice = mix([f"{shards}=0.5", f"{shards}=2"])
    assert (half.taken, twice.taken) == (6, 24)
    assert (half.pictures, twice.pictures) == (6, 24)
    lines = table([half, twice])
    assert "20.0%" in lines[1]
    assert "80.0%" in lines[2]
    assert lines[3].endswith("30")
    with pytest.raises(ConfigError, match="FOLDER=REPEAT"):
        mix([f"{shards}=lots"])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=60))
def test_packing_needs_no_more_than_the_bound_and_no_less_than_the_sum(lengths: list[int]) -> None:
    capacity = 50
    cut = [min(length, capacity) for length in lengths]
    packed = packed_rows(cut, capacity)
    assert sum(packed) == sum(cut)
    assert max(packed) <= capacity
    rows = len(packed)
    # First-fit decreasing: at most 11/9 of the best packing and 6/9 (Dosa 2007); the best is at least the sum.
    assert -(-sum(cut) // capacity) <= rows <= len(lengths)
    assert rows <= 11 / 9 * max(len([c for c in cut if c > capacity / 2]), 2 * sum(cut) / capacity + 1) + 6 / 9


def test_letters_are_drawn_by_whichever_font_has_them_and_the_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.font_manager import FontEntry, fontManager
    from matplotlib.ft2font import FT2Font

    entries = {entry.name: entry for entry in fontManager.ttflist if entry.style == "normal"}
    usual, other = (set(FT2Font(entries[name].fname).get_charmap()) for name in ("DejaVu Sans", "STIXGeneral"))
    only = next(chr(letter) for letter in sorted(other - usual) if chr(letter).isprintable())
    listed = [entries["DejaVu Sans"], FontEntry(fname=entries["STIXGeneral"].fname, name="Somebody's")]
    monkeypatch.setattr(fontManager, "ttflist", listed)
    assert lettering("plain").families == ["DejaVu Sans"]
    font = lettering(f"a{only}\U0001f9ff\n")
    assert font.families == ["DejaVu Sans", "Somebody's"]
    assert font.drawn(f"a{only}\U0001f9ff") == f"a{only}?"
    assert "has 1 letters" in font.notice


def test_lines_break_between_words_and_between_chinese_letters() -> None:
    assert wrapped("the cat sat on the mat", 8, most=9) == ["the cat", "sat on", "the mat"]
    assert wrapped("the cat sat on the mat", 8, most=2) == ["the cat", "sat on ..."]
    assert wrapped("Q: " + "\u732b" * 6, 8, most=9) == ["Q: \u732b\u732b", "\u732b" * 4]
    assert wrapped("a" * 20, 8, most=9) == ["a" * 8, "a" * 8, "a" * 4]


def test_letters_that_no_font_has_are_told_once() -> None:
    font = lettering("\U0001f9ff\U0001f9ff")
    assert font.drawn("a\U0001f9ff") == "a?", "no box of a font of last resort"
    assert "has 1 letters" in font.notice
