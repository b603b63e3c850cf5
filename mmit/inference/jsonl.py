"""A file of conversations to a file of answers, line by line, going on where an interrupted run stopped.

In: one object a line, `{"messages": [...]}` or `{"prompt": ...}`, with `image` or `images` where pictures are shown
and whatever else the user keeps there. Out: the same objects in the same order, each with its `answer`. Beside the
output stands `NAME.settings.json`: the run and the settings that all its answers come from.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from mmit.config import ConfigError
from mmit.data.sample import SampleError
from mmit.inference.conversation import Conversation, conversation
from mmit.inference.generate import Model, Sampling


@dataclass(frozen=True)
class Line:
    """A line of the input, by its number in the file."""

    number: int
    record: dict[str, Any]


def answer_file(
    model: Model,
    source: Path,
    out: Path,
    *,
    sampling: Sampling,
    batch_size: int = 8,
    system: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[int, int]:
    """Writes the answers to `source` into `out` and returns how many were there before and how many there are now.

    Every line is read, and every picture found, before the first is answered: ConfigError or SampleError names the
    file and line. `progress` is told answered and all lines after each batch.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size: {batch_size}; write at least 1")
    if source.resolve() == out.resolve():
        raise ConfigError(f"{out}: is the input too; name another file for the answers")
    lines = read_lines(source)
    settings = {"run": model.fingerprint(), "sampling": asdict(sampling), "system": system}
    done = _answered(lines, source, out, settings)
    for line in lines[done:]:
        model.check(_conversation(line, source, system), sampling)
    before = done
    with out.open("ab") as opened:
        _hold(opened, out)
        progress(done, len(lines))
        while done < len(lines):
            batch = lines[done : done + batch_size]
            ids = model.generate([_conversation(line, source, system) for line in batch], sampling, first=done)
            answers = [line.record | {"answer": model.chat.decode(new)} for line, new in zip(batch, ids, strict=True)]
            written = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
            opened.write(written.encode(errors="backslashreplace"))  # half a character: as JSON escapes it
            opened.flush()
            os.fsync(opened.fileno())
            done += len(batch)
            progress(done, len(lines))
    return before, done


def read_lines(source: Path) -> list[Line]:
    """The objects of a JSONL file; blank lines are skipped. Raises ConfigError for the file, SampleError for a line."""
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: cannot be read ({error}); name a JSONL file in UTF-8") from None
    lines = []
    for number, written in enumerate(text.split("\n"), 1):
        if not written.strip():
            continue
        where = f"{source}:{number}"
        try:
            record = json.loads(written)
        except json.JSONDecodeError as error:
            raise SampleError(f"{where}: not JSON ({error}); write one object a line") from None
        if not isinstance(record, dict) or _has(record, "messages") == _has(record, "prompt"):
            raise SampleError(
                f'{where}: found {written[:60]!r}; write an object with either "messages" or "prompt" in it'
            )
        if _has(record, "answer"):
            raise SampleError(f'{where}: has an "answer" already, which ours would replace; rename it (to "expected")')
        lines.append(Line(number, record))
    if not lines:
        raise ConfigError(f"{source}: holds no line; write one object a line")
    return lines


def _conversation(line: Line, source: Path, system: str | None) -> Conversation:
    where, record = f"{source}:{line.number}", line.record
    images: Any = record["images"] if _has(record, "images") else []
    if _has(record, "image"):
        if _has(record, "images"):
            raise SampleError(f'{where}: has both "image" and "images"; keep one of them')
        images = [record["image"]]
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise SampleError(f"{where}: images are {str(images)[:60]!r}; write the path of a file, or a list of paths")
    asked: Any = record["prompt" if _has(record, "prompt") else "messages"]
    if not isinstance(asked, str if _has(record, "prompt") else list):
        raise SampleError(f'{where}: found {str(asked)[:60]!r}; "prompt" is a text, "messages" a list of messages')
    return conversation(asked, images, system=system, folder=source.parent, where=where)


def _hold(opened: IO[bytes], out: Path) -> None:
    """Until it is closed; two processes that write the same answers would cut off each other's."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{out}: another process is writing it; wait for it, or name another output") from None


def _has(record: dict[str, Any], key: str) -> bool:
    """A null is nothing: tables written as lines have every column in each."""
    return record.get(key) is not None


def _answered(lines: Sequence[Line], source: Path, out: Path, settings: dict[str, Any]) -> int:
    """How many lines `out` answers already; what a kill left unfinished is cut off. ConfigError for a foreign file."""
    beside = out.with_name(out.name + ".settings.json")
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = beside.with_name(beside.name + ".tmp")
        temporary.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        temporary.rename(beside)
        return 0
    remedy = "move it away, or name another output"
    if not beside.exists():
        raise ConfigError(f"{out}: exists, and no {beside.name} says what wrote it; {remedy}")
    try:
        if (then := json.loads(beside.read_text(encoding="utf-8"))) != settings:
            different = [key for key in settings if then.get(key) != settings[key]]
            raise ConfigError(f"{out}: holds answers made with another {', '.join(different)}; {remedy}")
        with out.open("rb+") as opened:
            _hold(opened, out)
            whole = opened.read()
            opened.truncate(whole.rfind(b"\n") + 1)
        answers = [json.loads(written) for written in whole.splitlines(keepends=True) if written.endswith(b"\n")]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{out}: is not what mmit wrote ({error}); {remedy}") from None
    for line, answer in zip(lines, answers, strict=False):
        if {key: value for key, value in answer.items() if key != "answer"} != line.record:
            raise ConfigError(f"{out}: answers another question than {source}:{line.number} asks now; {remedy}")
    if len(answers) > len(lines):
        raise ConfigError(f"{out}: holds {len(answers)} answers, but {source} {len(lines)} lines; {remedy}")
    return len(answers)
