"""Which format an input has, told from its names and its first rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.formats import FORMATS, samples_of
from data_tools.rows import Rejected, Row, files_below, json_shape, member_rows, records
from mmit.config import ConfigError
from mmit.data.sample import ImagePart, Sample, SampleError, TextPart

Rows = list[Mapping[str, Any]]


def detect(path: Path) -> str:
    """The name of the format; `ConfigError` with what was seen when no format or several would do."""
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder; check the path (relative ones start in {Path.cwd()})")
    found = _folder(path) if path.is_dir() else "webdataset" if path.suffix == ".tar" else None
    if found is not None:
        return found
    if path.is_file() and ".json" in path.suffixes and json_shape(path) == "object":
        return _object(path)
    rows = [row.record for row in islice(records(path), 20) if isinstance(row, Row)]
    if rows and all(isinstance(row, list) and row and isinstance(row[0], dict) and "role" in row[0] for row in rows):
        return "messages"
    if rows and all(isinstance(row, list) for row in rows) and all(isinstance(row[0], dict) for row in rows if row):
        return "qwen-vl"
    named: Rows = [row for row in rows if isinstance(row, dict)]
    if not named:
        raise ConfigError(f"{path}: no row with named fields to tell the format by; name it (mmit-data formats)")
    for name, fits in RULES.items():
        if fits(named):
            return name
    raise ConfigError(
        f"{path}: no known format has rows with {', '.join(map(str, named[0]))}; name one (mmit-data formats), use "
        f"table with --set question=, answer=, image=, or write your own: package.module:function"
    )


def first_rows(format: str, path: Path, images: Path | None, options: Mapping[str, Any]) -> Iterator[str]:
    """The first three rows as they are read, one line a message, so that a wrong guess is seen at once."""
    for item in islice(samples_of(format, path, images, options), 3):
        if isinstance(item, Rejected):
            yield f"  rejected: {item.reason}"
            continue
        yield from _lines(item)
        yield ""


def _lines(sample: Sample) -> Iterator[str]:
    for item in sample.messages:
        parts = [
            part.text if isinstance(part, TextPart) else "[picture]" if isinstance(part, ImagePart) else "[part]"
            for part in item.parts
        ]
        text = "".join(letter if letter.isprintable() else " " for letter in "".join(parts))
        yield f"  {item.role}{'' if item.train or item.role != 'assistant' else ' (not trained)'}: {text[:160]}"


def _folder(path: Path) -> str | None:
    marks = {"dataset_info.json": "llamafactory", "problems.json": "scienceqa", "questions.json": "easy-vqa"}
    for name, format in marks.items():
        if (path / name).is_file() or (format == "easy-vqa" and (path / "train" / name).is_file()):
            return format
    names = [file.suffix.lower() for file in files_below(path) if file.is_file()]
    if ".tar" in names:
        return "webdataset"
    if ".dcm" in names:
        return "dicom"
    if ".txt" in names and not {".json", ".jsonl", ".parquet", ".csv", ".tsv"} & set(names):
        return "folder"
    return None


def _object(path: Path) -> str:
    """Whole-file formats, told from the names at the top and the first member."""
    try:
        members = [row.record for row in islice(member_rows(path), 3)]
    except SampleError as error:
        raise ConfigError(str(error)) from None
    first = members[0] if members and isinstance(members[0], dict) else {}
    if "imageId" in first:
        return "gqa"
    if "imageURL" in first or {"questions", "answers"} <= first.keys():
        return "ocr-vqa"
    if "file_name" in first or "hf_hub_url" in first:
        return "llamafactory"
    names = {row.where.rsplit("[", 1)[1] for row in member_rows(path)}
    known = {
        "'annotations']": "coco-captions",
        "'questions']": "vqav2",
        "'Instances']": "superni",
        "'data']": "textvqa",
    }
    for name, format in known.items():
        if name in names:
            return format
    raise ConfigError(f"{path}: one JSON object of no known format; name the format (mmit-data formats)")


def _all(*keys: str) -> Callable[[Rows], bool]:
    return lambda rows: all(set(keys) <= row.keys() for row in rows)


def _turn_has(key: str, *inner: str) -> Callable[[Rows], bool]:
    """All rows have a list under `key`, the first item of which has these fields."""

    def fits(rows: Rows) -> bool:
        firsts = [row.get(key) for row in rows]
        return all(isinstance(f, list) and f and isinstance(f[0], dict) and set(inner) <= f[0].keys() for f in firsts)

    return fits


def _conversations(*inner: str) -> Callable[[Rows], bool]:
    """All rows have a list of turns with these fields, under one of the names that there are for it."""
    return lambda rows: any(_turn_has(key, *inner)(rows) for key in ("messages", "conversations", "conversation"))


def _is_prompted(rows: Rows) -> bool:
    return _turn_has("prompt", "role")(rows) and _all("completion")(rows)


def _has_marker(rows: Rows) -> bool:
    marks = ("<IMG_CONTEXT>", "<VIDEO_CONTEXT>")
    return _turn_has("messages", "content")(rows) and any(
        mark in str(row["messages"]) for row in rows for mark in marks
    )


def _shows_pictures(rows: Rows) -> bool:
    return _is_turns(rows) and any(row.get("image") or "<image>" in str(row["conversations"]) for row in rows)


def _is_turns(rows: Rows) -> bool:
    """LLaVA's turns, also with the names of OpenAI, also stored as a string."""
    kinds = (_turn_has("conversations", "from", "value"), _turn_has("conversations", "role", "content"))
    return any(fits(rows) for fits in kinds) or all(isinstance(row.get("conversations"), str) for row in rows)


def _shows_videos(rows: Rows) -> bool:
    return any(row.get("video") or row.get("videos") for row in rows)


def _holds(key: str, *inner: str) -> Callable[[Rows], bool]:
    """All rows have an object under `key` with these fields."""

    def fits(rows: Rows) -> bool:
        found = [row.get(key) for row in rows]
        return all(isinstance(item, dict) and set(inner) <= item.keys() for item in found)

    return fits


def _texts(key: str) -> Callable[[Rows], bool]:
    return lambda rows: all(
        isinstance(row.get(key), list) and all(isinstance(t, str) for t in row[key]) for row in rows
    )


def _marked_chat(rows: Rows) -> bool:
    marks = ("[|Human|]", "<human>:", "### Human:")
    return all(any(mark in str(row.get("input", row.get("text"))) for mark in marks) for row in rows)


# In this order: what is more particular stands first.
RULES: dict[str, Callable[[Rows], bool]] = {
    "video": _shows_videos,
    "xtuner": _has_marker,
    "ms-swift": lambda rows: any("objects" in row for row in rows) or _all("query", "response")(rows),
    "qwen-vl": lambda rows: _shows_pictures(rows) and any("data_path" in row for row in rows),
    "llava": _shows_pictures,
    "sharegpt": lambda rows: (
        _turn_has("conversation", "human", "assistant")(rows)
        or _conversations("from", "value")(rows)
        or (_is_turns(rows) and not _conversations("role")(rows))
    ),
    "lima": _texts("conversations"),
    "ultrachat": _texts("data"),
    "cauldron": _turn_has("texts", "user", "assistant"),
    "trl": lambda rows: (
        any("images" in row or "image" in row for row in rows)
        and (_turn_has("messages", "role")(rows) or _is_prompted(rows))
        and "<image>" not in str(rows)
    ),
    "messages": lambda rows: _conversations("role")(rows) or _is_prompted(rows),
    "mmc4": _all("text_list", "image_info"),
    "obelics": _all("images", "texts"),
    "oasst": lambda rows: _all("message_id", "parent_id")(rows) or _holds("prompt", "replies")(rows),
    "delimited": _marked_chat,
    "visual-genome": lambda rows: _all("regions")(rows) or _all("qas")(rows),
    "a-okvqa": _all("choices", "direct_answers"),
    "scienceqa": _all("question", "choices", "answer"),
    "refcoco": lambda rows: _all("sentences", "ref_id")(rows) or _all("bbox", "answer", "image")(rows),
    "coco-captions": lambda rows: _all("image", "captions")(rows),
    "self-instruct": lambda rows: _all("instruction")(rows) and _turn_has("instances", "input", "output")(rows),
    "orca": _all("system_prompt", "question", "response"),
    "dolly": _all("instruction", "context", "response"),
    "magicoder": _all("problem", "solution"),
    "alpaca": lambda rows: _all("instruction", "output")(rows),
    "evol": _all("instruction", "response"),
    "p3": _all("inputs_pretokenized", "targets_pretokenized"),
    "flan": _all("inputs", "targets"),
    "prompt-target": _all("prompt", "completion"),
    "table": lambda rows: any(_all(key)(rows) for key in ("caption", "answer", "text", "response", "label")),
}
assert set(RULES) <= set(FORMATS)
