"""LLaMA-Factory: a folder with dataset_info.json, which names for each data set its file, formatting, columns and tags.

INPUT is the folder (or the dataset_info.json itself), `dataset` the name in it. Picture names are relative to the
folder unless --images says otherwise. Markers in texts must be as many as the row's images and videos, as LLaMA-Factory
demands; videos become frames (see the format video for `frames`, `fps`, `times`).
Of a ranking the chosen answer is learned and the rejected one kept in the sample's meta; rows whose `kto_tag` is false
are rejected. All rows are read: `num_samples` is a matter of the run (`repeat`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_tools.album import Album
from data_tools.clips import Filming, clip_of
from data_tools.rows import Rejected, Row, each, fields, json_document, records
from data_tools.turns import (
    Said,
    conversation_of,
    names_of,
    pictures_named,
    place_parts,
    place_pictures,
    refuse_media,
    refuse_unwanted,
    sample_of,
    text_of,
    told_first,
    valued_turns,
)
from mmit.config import ConfigError
from mmit.data.sample import Role, Sample, SampleError, VideoPart

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


DEFAULTS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}


def samples(
    path: Path,
    images: Path | None = None,
    *,
    dataset: str = "",
    strip: bool = True,
    image_prefix: str = "",
    frames: int = 8,
    fps: float | None = None,
    times: bool = False,
) -> Iterator[Sample | Rejected]:
    file = path / "dataset_info.json" if path.is_dir() else path
    folder, described = file.parent, json_document(file)
    info = _entry(described, dataset, file)
    data = folder / text_of(info["file_name"], f"{file}: file_name of {dataset}")
    if not data.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{file}: {dataset} names {info['file_name']}, which lies outside of {folder}")
    album = Album(images if images is not None else folder, prefix=image_prefix)
    filming = Filming(frames, fps, times)
    columns: dict[str, str] = {"messages": DEFAULTS["messages"], **info["columns"]} if "columns" in info else DEFAULTS
    tags = TAGS | dict(info.get("tags") or {})
    read = _messages if info.get("formatting", "alpaca") in ("sharegpt", "openai") else _alpaca

    def sample(row: Row) -> Sample:
        record = fields(row)
        found = {name: record.get(column) for name, column in columns.items()}
        refuse_media(record, row.where, "audio")
        refuse_media(found, row.where, "audio")
        refuse_unwanted(found, row.where, "kto_tag")
        turns = read(found, tags, row.where)
        names, clips = (
            names_of(found[f"{kind}s"], row.where)
            if f"{kind}s" in columns
            else pictures_named(record, row.where, kind=kind)
            for kind in ("image", "video")
        )
        # A set without pictures may speak of <image>; in one with them, a lone marker is a picture that got lost.
        parts = place_pictures(turns, len(names), row.where, markers="error" if "images" in columns else "text")
        parts = place_parts(
            parts,
            [VideoPart((number,), (0.0,)) for number in range(len(names), len(names) + len(clips))],
            row.where,
            marker="<video>",
            what="videos",
            markers="error" if "videos" in columns else "text",
        )
        shown = [album.picture(name, row.where) for name in names]
        return sample_of(
            told_first(parts, row.where, system=found.get("system"), tools=found.get("tools")),
            images=[*shown, *(clip_of(album, name, row.where, filming) for name in clips)],
            meta={"rejected": found["rejected"]} if found.get("rejected") else {},
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
    info = described[dataset]
    for key in ("columns", "tags"):
        named = info.get(key, {})
        if not isinstance(named, dict) or not all(isinstance(value, str) for value in named.values()):
            raise ConfigError(f"{file}: {key} of {dataset} is {str(named)[:60]!r}; it maps names to names of the rows")
    return info


def _messages(found: Mapping[str, Any], tags: Mapping[str, str], where: str) -> list[Said]:
    listed = conversation_of(found["messages"], where)
    chosen = found.get("chosen")
    return valued_turns(
        [*listed, chosen] if chosen else listed,
        where,
        role=(tags["role_tag"],),
        text=(tags["content_tag"],),
        roles={str(tags[tag]): role for tag, role in ROLE_OF_TAG.items()},
    )


def _alpaca(found: Mapping[str, Any], tags: Mapping[str, str], where: str) -> list[Said]:
    del tags  # of conversations
    turns: list[Said] = []
    for question, reply in found.get("history") or []:
        turns += [Said("user", text_of(question, where)), Said("assistant", text_of(reply, where))]
    asked = [text_of(found[name], where) for name in ("prompt", "query") if found.get(name)]
    answer = found.get("chosen") if found.get("chosen") is not None else found.get("response")
    if answer is None:
        raise SampleError(f"{where}: no answer in the columns that dataset_info.json names for it")
    return [*turns, Said("user", "\n".join(asked)), Said("assistant", text_of(answer, where))]
