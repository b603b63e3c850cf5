from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_tools.cli import _options, main
from data_tools.convert import Settings, convert
from mmit.data.shards import verify
from tests.tools.test_convert import rows_with

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `mmit-data` in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmit-data", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def test_help_comes_at_once() -> None:
    code = "import sys, data_tools.cli; sys.argv = ['mmit-data', '--help']; data_tools.cli.main()"
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    seconds = time.monotonic() - begun
    heavy = [name for name in ("torch", "pyarrow", "transformers", "numpy", "PIL") if f" {name}\n" in done.stderr]
    assert heavy == []
    assert "convert" in done.stdout
    assert seconds < 3, "under 0.5 s on an idle machine; here others may be running"


def test_convert_then_show(command: Command, photos: Path, tmp_path: Path) -> None:
    path = rows_with(photos, 3)
    out = tmp_path / "shards"
    code, text, _ = command("convert", "llava", path, "--images", photos, "--out", out, "--processes", 1)
    assert code == 0
    assert "3 samples in 1 shards from 3 rows" in text
    code, text, _ = command("show", out, "--index", 2)
    assert code == 0
    assert "assistant: 2!" in text


def test_every_format_is_listed(command: Command) -> None:
    from data_tools.formats import FORMATS

    code, text, _ = command("formats")
    assert code == 0
    assert [line.split()[0] for line in text.splitlines()] == list(FORMATS)


@pytest.mark.parametrize(
    ("change", "code", "found"),
    [
        ({"format": "lava"}, 2, "did you mean 'llava'"),
        ({"input": "/nowhere/x.json"}, 2, "/nowhere/x.json"),
        ({"images": "/nowhere"}, 2, "no such folder"),
        ({"more": ["--set", "stripe=1"]}, 2, "did you mean strip"),
        ({"more": ["--part", "5/4"]}, 2, "i from 1 to n"),
        ({"more": ["--on-missing", "shrug"]}, 2, "on_missing"),
        ({"rows": "[]"}, 3, "no rows"),
        ({"rows": "[{"}, 3, "may be cut"),
        ({"rows": '{"a": 1}'}, 3, "no field conversations"),
        ({"rows": "hello"}, 2, "this is not JSON"),
        ({"rows": ""}, 2, "the file is empty"),
        ({"bad": (1,)}, 3, "1 of 3 rows rejected"),
        ({"gone": (1,)}, 2, "1 file named by 1 row is missing"),
    ],
)
def test_a_fault_is_one_message_with_place_and_remedy(
    command: Command, photos: Path, tmp_path: Path, change: dict[str, object], code: int, found: str
) -> None:
    path = rows_with(photos, 3, bad=change.get("bad", ()), gone=change.get("gone", ()))  # type: ignore[arg-type]
    if "rows" in change:
        path.write_text(str(change["rows"]))
    more = change.get("more", [])
    assert isinstance(more, list)
    exit_code, _, error = command(
        "convert",
        change.get("format", "llava"),
        change.get("input", path),
        "--images",
        change.get("images", photos),
        "--out",
        tmp_path / "out",
        "--processes",
        1,
        *more,
    )
    assert exit_code == code
    assert error.startswith("mmit-data: ")
    assert found in error
    assert "Traceback" not in error


@pytest.mark.parametrize("words", [("data_tools.cli", "detect", "rows.jsonl"), ("mmit", "train", "run.yaml")])
def test_letters_that_the_terminal_lacks_end_no_command(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "größe", "completion": "groß"}), encoding="utf-8")
    tree = {
        "output": "run",
        "cache": "cache",
        "model": {"language": {"random": {}}},
        "stages": [
            {
                "name": "sft",
                "data": [{"trl": "rows.jsonl", "name": "größe"}],
                "train": {"language": {"lr": 1}},
                "batch_size": 1,
            }
        ],
    }
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    narrow = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ended = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env=narrow, cwd=tmp_path)
    assert "gr\\xf6" in ended.stdout
    assert "Traceback" not in ended.stderr


def test_json_of_another_kind_is_named(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps([{"instruction": "a", "output": "b"}] * 3))
    code, _, error = command("convert", "llava", path, "--out", tmp_path / "out")
    assert code == 3
    assert "alpaca.json[0]: no field conversations or conversation; the row has instruction, output" in error


def test_verify_ends_with_3_and_a_list(command: Command, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    command("convert", "llava", rows_with(photos, 3), "--images", photos, "--out", out, "--processes", 1)
    code, text, _ = command("verify", out)
    assert (code, text) == (0, f"{out}: 3 samples, no fault\n")
    tar = out / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    code, text, error = command("verify", out)
    assert code == 3
    assert "shard-000000.tar" in text
    assert "faults in" in error


def test_auto_shows_what_it_read(command: Command, photos: Path, tmp_path: Path) -> None:
    path = rows_with(photos, 5)
    arguments = ("auto", path, "--images", photos, "--out", tmp_path / "shards", "--processes", 1)
    code, text, _ = command("convert", *arguments)
    assert code == 0
    assert "reads as llava" in text
    assert "  user: [picture] 2?\n  assistant: 2!\n" in text
    assert "3!" not in text
    code, text, _ = command("detect", path, "--images", photos)
    assert code == 0
    assert "reads as llava" in text


def test_the_readme_names_every_format_and_every_command() -> None:
    from data_tools.cli import app
    from data_tools.formats import FORMATS

    readme = (Path(__file__).parents[2] / "data_tools" / "README.md").read_text(encoding="utf-8")
    assert [name for name in FORMATS if f"convert {name} " not in readme and f"`{name}" not in readme] == []
    commands = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert [name for name in commands if f"{name} " not in readme and f"mmit-data {name}`" not in readme] == []


def test_control_c_says_what_goes_on_and_no_worker_says_a_word(photos: Path, tmp_path: Path) -> None:
    """The terminal sends the signal to all processes of the command."""
    path = rows_with(photos, 4000)
    arguments = ["convert", "llava", path, "--images", photos, "--out", tmp_path / "out", "--rows-per-shard", 20]
    running = subprocess.Popen(
        [sys.executable, "-m", "data_tools.cli", *map(str, arguments), "--processes", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    while not list((tmp_path / "out").glob("*.tar")):
        assert running.poll() is None
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)
    said, _ = running.communicate(timeout=60)
    assert (running.returncode, said) == (130, "mmit-data: interrupted; the same command goes on where it stopped\n")


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """As where no more than `room` bytes of a file can be written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("arguments", "file", "room"),
    [
        (["stats", "SET", "--html", "OUT/a.html"], "a.html", 1000),
        (["show", "SET", "--html", "OUT/a.html"], "a.html", 1000),
        (["grid", "SET", "--out", "OUT/a.png"], "a.png", 1000),
        (["scan", "SET", "--report", "OUT/a.jsonl"], "a.jsonl", 100),
        (["decontaminate", "SET", "--against", "OTHER", "--report", "OUT/a.jsonl"], "a.jsonl", 100),
        (["dedup", "SET", "--near", "0.7", "--out", "OUT/kept"], "kept/.unfinished/bands.bin", 500),
        (["merge", "SET", "OTHER", "--out", "OUT/joined"], "joined/shard-000000.tar", 5000),
    ],
)
def test_a_full_disk_is_told_with_the_file_of_which_nothing_is_left(
    command: Command,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    file: str,
    room: int,
) -> None:
    for name, count in (("SET", 12), ("OTHER", 3)):
        rows = rows_with(photos, count)
        rows.write_text(rows.read_text().replace("!", "! mail me at me@example.com"))
        convert("llava", rows, photos, tmp_path / name, settings=Settings(source=name))
    (tmp_path / "OUT").mkdir()

    def other_disk(source: object, target: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    monkeypatch.chdir(tmp_path)
    with full_disk(room):
        code, _, err = command(*arguments)
    assert code == 2
    assert err.startswith(f"mmit-data: OUT/{file}: ")
    assert err.endswith("make room and give the same command again\n")
    assert not list((tmp_path / "OUT").rglob("*.tmp"))
    assert not (tmp_path / "OUT" / file).exists()
    assert command(*arguments)[0] == 0
    if arguments[0] in ("merge", "dedup"):
        assert list(verify(tmp_path / "OUT" / file.partition("/")[0])) == []


def test_a_report_goes_to_a_pipe_or_a_device_as_to_a_file(command: Command, photos: Path, tmp_path: Path) -> None:
    convert("llava", rows_with(photos, 3), photos, tmp_path / "set")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert command("stats", tmp_path / "set", "--html", tmp_path / "pipe")[0] == 0
        assert os.read(reader, 100).startswith(b"<!doctype html>")
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_a_page_of_pictures_is_a_png_or_refused(command: Command, photos: Path, tmp_path: Path) -> None:
    convert("llava", rows_with(photos, 3), photos, tmp_path / "set")
    code, _, err = command("grid", tmp_path / "set", "--out", tmp_path / "a.txt")
    assert code == 2
    assert "write a name that ends in .png" in err


def test_options_are_read_as_yaml_1_2_has_it() -> None:
    """As the values of a run's command line are: `off` is a word, and `#` begins no comment."""
    pairs = ["answer=off", "fps=1e-1", "prompt=2026-01-02", "image-prefix=a #2/", "strip=false", "x="]
    assert _options(pairs) == {
        "answer": "off",
        "fps": 0.1,
        "prompt": "2026-01-02",
        "image_prefix": "a #2/",
        "strip": False,
        "x": "",
    }
