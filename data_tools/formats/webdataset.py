"""Plain webdataset and Energon tars, a file or a folder of them: members KEY.jpg, KEY.txt, KEY.json, KEY.0.jpg, ...

What is read of a sample: its pictures in the order of the tar; its JSON if that is a conversation (`messages`,
`conversations`) or has one of the usual names for question and answer; else its text as a caption, learned alone where
there is no picture. Samples with a video or a sound are rejected. Members of a sample that stand apart are joined; in a
compressed tar, which cannot be read twice, a key that comes back is rejected by name.
Nothing is unpacked to disk, and no member is ever run or unpickled.
"""

from __future__ import annotations

import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_tools.album import Album, unread
from data_tools.cells import Stretch, stretch_of
from data_tools.formats.messages import parts_of_row
from data_tools.rows import Rejected, Row, each, files_below
from data_tools.tars import (
    CUT,
    PICTURES,
    TEXTS,
    Member,
    StrictHeader,
    check_end,
    fault_of,
    groups,
    is_hidden,
    is_plain,
    key_and_ending,
    unpacked,
)
from data_tools.turns import (
    Turn,
    asked_about,
    most_common,
    place_pictures,
    sample_of,
    text_of,
    told_first,
    valued_turns,
)
from mmit.config import ConfigError
from mmit.data.sample import ImagePart, Picture, Sample, SampleError, TextPart

MEDIA = {"mp4", "mkv", "webm", "avi", "mov", "mp3", "wav", "flac", "ogg", "m4a"}
QUESTIONS = ("question", "context", "prompt", "instruction", "text_input")
ANSWERS = ("answer", "answers", "caption", "text", "response", "completion", "text_output")


def samples(
    path: Path, images: Path | None = None, *, prompt: str = "Describe the image.", strip: bool = True
) -> Iterator[Sample | Rejected]:
    """`prompt`: what is asked about a picture that has only a caption; empty: the caption alone."""
    del images
    tars = [file for file in files_below(path) if file.suffix == ".tar"] if path.is_dir() else [path]
    if not tars:
        raise ConfigError(f"{path}: the folder holds no .tar file")

    def sample(row: Row) -> Sample:
        return sample_of_members(row, prompt=prompt, strip=strip)

    return each((row for tar in tars for row in (rows(tar) if is_plain(tar) else _streamed_rows(tar))), sample)


def sample_of_members(row: Row, *, prompt: str, strip: bool) -> Sample:
    """The sample in the `members` of a row, (ending, content) each; its pictures are those given, unread."""
    pictures: list[Picture] = []
    texts: dict[str, str] = {}
    for ending, data in row.record["members"]:
        last = ending.rpartition(".")[2].lower()
        if last in MEDIA:
            raise SampleError(f"{row.where}: it shows .{ending}, and only pictures and texts are read from tars")
        if last in PICTURES:
            pictures.append(data if isinstance(data, Picture) else unread(data, f"{row.where}: {ending}"))
        elif last in TEXTS:
            try:
                texts[last] = data.decode("utf-8")
            except UnicodeDecodeError:
                raise SampleError(f"{row.where}: {ending} is not UTF-8; save it again as UTF-8") from None
    return _sample(row, pictures, texts, prompt, strip)


def rows(tar: Path) -> Iterator[Row | Rejected]:
    """One row a sample of a tar that is not compressed; its pictures stay where they lie."""
    with tar.open("rb") as file:

        def content(member: Member, where: str) -> bytes | Stretch:
            size = min(member.size, member.limit)
            if member.kind not in PICTURES:
                return os.pread(file.fileno(), size, member.offset)
            return stretch_of(tar, member.offset, size, f"{where}: {member.ending}")

        for group in groups(tar):
            if isinstance(group, Rejected):
                yield group
                continue
            where = f"{tar.name}:{group.key}"
            members = [(member.ending, content(member, where)) for member in group.members]
            yield Row(tar.name, group.number, where, {"key": group.key, "members": members})


def _streamed_rows(tar: Path) -> Iterator[Row | Rejected]:
    """One row a sample: neighbouring members with the same name up to its first dot."""
    done: set[str] = set()
    number, key, members = 0, "", []
    fault: str | None = None

    def finished() -> Row | Rejected:
        where = f"{tar.name}:{key}"
        if key in done:
            reason = f"{where}: members of this key also stand elsewhere in the tar; sort the tar, or name them apart"
            return Rejected(tar.name, number, key, reason)
        done.add(key)
        if fault is not None:
            return Rejected(tar.name, number, key, f"{where}: {fault}")
        return Row(tar.name, number, where, {"key": key, "members": members})

    try:
        with unpacked(tar) as file, tarfile.open(fileobj=file, mode="r|", tarinfo=StrictHeader) as stream:
            for member in stream:
                if member.isdir() or is_hidden(member.name):
                    continue
                place, ending = key_and_ending(member.name)
                if key and place != key:
                    yield finished()
                    number, members, fault = number + 1, [], None
                key = place
                fault = fault or fault_of(member, ending, [other for other, _ in members])
                content = stream.extractfile(member) if member.isreg() else None
                limit = Member(ending, 0, member.size).limit
                members.append((ending, content.read(limit) if content is not None else b""))
            check_end(stream.fileobj.read)  # type: ignore[attr-defined]
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        yield Rejected(tar.name, number, key, f"{tar.name}:{key}: the tar ends or breaks here ({error}); {CUT}")
        return
    if key:
        yield finished()


def _sample(row: Row, pictures: list[Picture], texts: Mapping[str, str], prompt: str, strip: bool) -> Sample:
    where, meta = row.where, {"key": row.record["key"]}
    endings = [ending for ending, _ in row.record["members"]]
    record: Any = {}
    if "json" in texts:
        try:
            record = json.loads(texts["json"])
        except ValueError as error:
            raise SampleError(f"{where}: its JSON is not valid ({error})") from None
    if isinstance(record, list) and len(record) == 2 and all(isinstance(x, dict) and "value" in x for x in record):
        # LLaVA-OneVision-1.5 writes the question and the answer as two values.
        pairs = [
            (text_of(record[0]["value"], where).replace("<image>", "").strip(), text_of(record[1]["value"], where))
        ]
        return asked_about(pictures, pairs, where=where, strip=strip, meta=meta)
    if isinstance(record, dict) and "conversations" in record:
        turns = place_pictures(valued_turns(record["conversations"], where), len(pictures), where)
        turns = told_first(turns, where, system=record.get("system"), tools=record.get("tools"))
        return sample_of(turns, images=pictures, where=where, strip=strip, meta=meta)
    if isinstance(record, list) or (isinstance(record, dict) and "messages" in record):
        listed = {"messages": record} if isinstance(record, list) else dict(record)
        turns, shown = parts_of_row(listed | {"images": pictures}, where, Album(None))
        return sample_of(turns, images=shown, where=where, strip=strip, meta=meta)
    if not isinstance(record, dict):
        raise SampleError(f"{where}: its JSON is a {type(record).__name__}; write an object with named fields")
    question = next((record[name] for name in QUESTIONS if record.get(name)), texts.get("question"))
    answer = next((record[name] for name in ANSWERS if record.get(name)), None)
    if answer is None:
        answer = next(
            (texts[name] for name in ("answer", "txt", "text", "caption") if texts.get(name, "").strip()), None
        )
    if isinstance(answer, list):
        answer = _answer_of(answer, record.get("answer_weights"), where)
    if answer is None:
        raise SampleError(f"{where}: no conversation, answer or caption among its members {', '.join(endings)}")
    if question is None and not pictures and any(m.rpartition(".")[2].lower() not in TEXTS for m in endings):
        raise SampleError(f"{where}: a caption but no picture among its members {', '.join(endings)}")
    if question is None and (not prompt or not pictures):
        parts = [*(ImagePart(number) for number in range(len(pictures))), TextPart(text_of(answer, where))]
        return sample_of([Turn("assistant", parts)], images=pictures, where=where, strip=strip, meta=meta)
    asked = text_of(question, where) if question is not None else prompt
    return asked_about(pictures, [(asked, text_of(answer, where))], where=where, strip=strip, meta=meta)


def _answer_of(answers: list[Any], weights: Any, where: str) -> str:
    """The answer of most weight (Energon's `answer_weights`), or the one given most often."""
    if isinstance(weights, list) and len(weights) == len(answers) > 0:
        return text_of(answers[max(range(len(answers)), key=lambda number: weights[number])], where)
    return most_common(answers, where)
