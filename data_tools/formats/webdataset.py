"""Plain webdataset and Energon tars, a file or a folder of them: members KEY.jpg, KEY.txt, KEY.json, KEY.0.jpg, ...

What is read of a sample: its pictures in the order of the tar; its JSON if that is a conversation (`messages`,
`conversations`) or has one of the usual names for question and answer; else its text as a caption. Members of a sample
must stand together, as every reader of webdataset requires; a key that comes back later is rejected by name. Nothing is
unpacked to disk, and no member is ever run or unpickled.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_tools.album import Album, unread
from data_tools.formats.messages import parts_of_row
from data_tools.rows import Rejected, Row, each
from data_tools.turns import Turn, asked_about, place_pictures, sample_of, text_of, valued_turns
from mmit.config import ConfigError
from mmit.data.images import MAX_BYTES
from mmit.data.sample import ImagePart, Picture, Sample, SampleError, TextPart

PICTURES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm"}
QUESTIONS = ("question", "context", "prompt", "instruction", "text_input")
ANSWERS = ("answer", "answers", "caption", "text", "response", "completion", "text_output")
MOST_TEXT = 64 * 2**20


def samples(
    path: Path, images: Path | None = None, *, prompt: str = "Describe the image.", strip: bool = True
) -> Iterator[Sample | Rejected]:
    """`prompt`: what is asked about a picture that has only a caption; empty: the caption alone."""
    del images
    tars = sorted(path.rglob("*.tar")) if path.is_dir() else [path]
    if not tars:
        raise ConfigError(f"{path}: the folder holds no .tar file")

    def sample(row: Row) -> Sample:
        members: list[tuple[str, bytes]] = row.record["members"]
        pictures: list[Picture] = []
        texts: dict[str, str] = {}
        for ending, data in members:
            last = ending.rsplit(".", 1)[-1].lower()
            if last in PICTURES:
                pictures.append(unread(data, f"{row.where}: {ending}"))
            elif last in ("txt", "caption", "text", "json", "question", "answer"):
                try:
                    texts[last] = data.decode("utf-8")
                except UnicodeDecodeError:
                    raise SampleError(f"{row.where}: {ending} is not UTF-8; save it again as UTF-8") from None
        return _sample(row, pictures, texts, prompt, strip)

    return each((row for tar in tars for row in _rows(tar)), sample)


def _rows(tar: Path) -> Iterator[Row | Rejected]:
    """One row a sample: neighbouring members with the same name up to its first dot."""
    done: set[str] = set()
    number, key, members = 0, "", []

    def finished() -> Row | Rejected:
        where = f"{tar.name}:{key}"
        if key in done:
            reason = f"{where}: members of this key also stand elsewhere in the tar; sort the tar, or name them apart"
            return Rejected(tar.name, number, key, reason)
        done.add(key)
        return Row(tar.name, number, where, {"key": key, "members": members})

    try:
        with tarfile.open(tar, "r|*") as stream:
            for member in stream:
                name = Path(member.name).name
                if not member.isfile() or name.startswith(".") or ".nv-meta" in member.name:
                    continue
                stem, dot, ending = name.partition(".")
                place = str(Path(member.name).parent / stem) if "/" in member.name else stem
                if key and place != key:
                    yield finished()
                    number, members = number + 1, []
                key = place
                limit = MAX_BYTES + 1 if ending.rsplit(".", 1)[-1].lower() in PICTURES else MOST_TEXT
                content = stream.extractfile(member) if dot else None
                members.append((ending, content.read(limit) if content is not None else b""))
    except (tarfile.TarError, EOFError, OSError) as error:
        yield Rejected(tar.name, number, key, f"{tar.name}:{key}: the tar ends or breaks here ({error}); copy it again")
        return
    if key:
        yield finished()
    with tar.open("rb") as file:  # tarfile takes a tar that was cut between two members for a whole one
        file.seek(max(0, file.seek(0, io.SEEK_END) - 1024))
        if tar.suffix == ".tar" and file.read().strip(b"\0"):
            reason = f"{tar.name}: the tar has no end mark, so it was cut after {key}; copy it again"
            yield Rejected(tar.name, number + 1, "", reason)


def _sample(row: Row, pictures: list[Picture], texts: Mapping[str, str], prompt: str, strip: bool) -> Sample:
    where, meta = row.where, {"key": row.record["key"]}
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
        turns = valued_turns(record["conversations"], where)
        placed = place_pictures(turns, len(pictures), where)
        messages = [Turn(role, parts) for (role, _), parts in zip(turns, placed, strict=True)]
        return sample_of(messages, images=pictures, where=where, strip=strip, meta=meta)
    if isinstance(record, list) or (isinstance(record, dict) and "messages" in record):
        listed = {"messages": record} if isinstance(record, list) else dict(record)
        turns, shown = parts_of_row(listed | {"images": pictures}, where, Album(None))
        return sample_of(turns, images=shown, where=where, strip=strip, meta=meta)
    question = next((record[name] for name in QUESTIONS if record.get(name)), texts.get("question"))
    answer = next((record[name] for name in ANSWERS if record.get(name)), None)
    if answer is None:
        answer = next(
            (texts[name] for name in ("answer", "txt", "text", "caption") if texts.get(name, "").strip()), None
        )
    if isinstance(answer, list) and answer:
        answer = answer[0]
    if answer is None:
        found = ", ".join(ending for ending, _ in row.record["members"])
        raise SampleError(f"{where}: no conversation, answer or caption among its members {found}")
    if question is None and not prompt:
        parts = [*(ImagePart(number) for number in range(len(pictures))), TextPart(text_of(answer, where))]
        return sample_of([Turn("assistant", parts)], images=pictures, where=where, strip=strip, meta=meta)
    asked = text_of(question, where) if question is not None else prompt
    return asked_about(pictures, [(asked, text_of(answer, where))], where=where, strip=strip, meta=meta)
