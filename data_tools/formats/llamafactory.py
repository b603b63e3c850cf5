"""LLaMA-Factory: a folder with dataset_info.json, which names for each data set its file, formatting, columns and tags.

INPUT is the folder (or the dataset_info.json itself), `dataset` the name in it. Picture names are relative to the
folder unless --images says otherwise. Markers in texts must be as many as the row's images, as LLaMA-Factory demands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_tools.album import Album
from data_tools.rows import Rejected, Row, each, fields, json_document, records
from data_tools.turns import ROLES, Turn, names_of, place_pictures, sample_of, text_of, with_tools
from mmit.config import ConfigError
from mmit.data.sample import Role, Sample, SampleError

TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
ROLE_OF_TAG: dict[str, Role] = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "function_tag": "assistant",
    "observation_tag": "tool",
    "system_tag": "system",
}


def samples(
    path: Path, images: Path | None = None, *, dataset: str = "", strip: bool = True, image_prefix: str = ""
) -> Iterator[Sample | Rejected]:
    file = path / "dataset_info.json" if path.is_dir() else path
    folder, described = file.parent, json_document(file)
    info = _entry(described, dataset, file)
    data = folder / str(info["file_name"])
    if not data.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{file}: {dataset} names {info['file_name']}, which lies outside of {folder}")
    album = Album(images if images is not None else folder, prefix=image_prefix)
    columns: dict[str, str] = dict(info.get("columns") or {})
    tags = TAGS | dict(info.get("tags") or {})
    sharegpt = info.get("formatting", "alpaca") in ("sharegpt", "openai")

    def sample(row: Row) -> Sample:
        record = fields(row)
        for column in ("videos", "audios"):
            if names_of(record.get(columns.get(column, "")), row.where):
                raise SampleError(f"{row.where}: the row has {column}; only texts and images are read here")
        turns = _messages(row, columns, tags) if sharegpt else _alpaca(row, columns)
        turns = with_tools(turns, record.get(columns.get("tools", "")))
        names = names_of(record.get(columns.get("images", "images" if sharegpt else "")), row.where)
        placed = place_pictures(turns, len(names), row.where, markers="text")
        return sample_of(
            [Turn(role, parts) for (role, _), parts in zip(turns, placed, strict=True)],
            images=[album.picture(name, row.where) for name in names],
            where=row.where,
            strip=strip,
        )

    return each(records(data), sample)


def _entry(described: Any, dataset: str, file: Path) -> Mapping[str, Any]:
    if not isinstance(described, dict):
        raise ConfigError(f"{file}: expected an object of data sets, found a {type(described).__name__}")
    local = [name for name, info in described.items() if isinstance(info, dict) and info.get("file_name")]
    if dataset not in local:
        here = [name for name in local if (file.parent / str(described[name]["file_name"])).exists()]
        found = "names no data set of a local file" if dataset in described else "has no such data set"
        raise ConfigError(f"{file}: {found} {dataset!r}; write --set dataset=NAME, one of {', '.join(here or local)}")
    return described[dataset]


def _messages(row: Row, columns: Mapping[str, str], tags: Mapping[str, str]) -> list[tuple[Role, str]]:
    record = fields(row)
    listed = record.get(columns.get("messages", "conversations"))
    if not isinstance(listed, list) or not listed:
        raise SampleError(f"{row.where}: {columns.get('messages', 'conversations')} is no list of turns")
    roles: dict[str, Role] = {tags[tag]: role for tag, role in ROLE_OF_TAG.items()}
    turns: list[tuple[Role, str]] = []
    system = record.get(columns.get("system", ""))
    if system:
        turns.append(("system", text_of(system, row.where)))
    chosen = record.get(columns.get("chosen", ""))
    for number, turn in enumerate([*listed, chosen] if isinstance(chosen, dict) else listed):
        here = f"{row.where}: turn {number}"
        if not isinstance(turn, dict):
            raise SampleError(f"{here}: expected an object, found {str(turn)[:60]!r}")
        name = turn.get(tags["role_tag"])
        role = roles.get(str(name)) or ROLES.get(str(name))
        if role is None:
            raise SampleError(f"{here}: {tags['role_tag']} is {name!r}; dataset_info.json tags {', '.join(roles)}")
        if not (role == "system" and turns and turns[0][0] == "system"):
            turns.append((role, text_of(turn.get(tags["content_tag"]), here)))
    return turns


def _alpaca(row: Row, columns: Mapping[str, str]) -> list[tuple[Role, str]]:
    record = fields(row)

    def column(name: str, default: str) -> Any:
        return record.get(columns.get(name, default))

    turns: list[tuple[Role, str]] = []
    if record.get(columns.get("system", "")):
        turns.append(("system", text_of(record[columns["system"]], row.where)))
    for question, reply in record.get(columns.get("history", "")) or []:
        turns.append(("user", text_of(question, row.where)))
        turns.append(("assistant", text_of(reply, row.where)))
    asked = [column("prompt", "instruction"), column("query", "input")]
    answer = column("chosen", "chosen") if "chosen" in columns else column("response", "output")
    turns.append(("user", "\n".join(text_of(text, row.where) for text in asked if text)))
    turns.append(("assistant", text_of(answer, row.where)))
    return turns
