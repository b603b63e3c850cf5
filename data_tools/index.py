"""Somebody else's webdataset tars, indexed where they lie: `samples.parquet` and `index.json` beside them.

Each tar is looked at once: who its samples are, what they say, where each picture begins, sizes and hashes. From then
on the folder is a shard set like any other, read by offset in any order. What no sample can be made of is listed in
`rejected.jsonl`. Nothing is unpacked and the tars are not touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_tools.album import develop, unread
from data_tools.convert import RejectedRows
from data_tools.formats.webdataset import sample_of_members
from data_tools.rows import Rejected, Row
from data_tools.tars import PICTURES, Group, Member, groups, is_plain
from data_tools.workers import in_order
from mmit.config import ConfigError
from mmit.data.files import whole
from mmit.data.provenance import REJECTED
from mmit.data.sample import Sample, SampleError, check, to_json
from mmit.data.shard_index import INDEX, IndexWriter, InPlaceRow, ShardEntry, WrittenShard, file_sha256, read_index
from mmit.data.shard_writer import row_of
from mmit.data.shards import ShardSet


@dataclass(frozen=True)
class Reading:
    """How members become samples; see the format webdataset."""

    source: str
    prompt: str = "Describe the image."
    strip: bool = True
    decode: bool = True
    """Decode every picture once with the trainer's decoder."""


def index(
    folder: str | Path,
    *,
    prompt: str = "Describe the image.",
    strip: bool = True,
    decode: bool = True,
    source: str | None = None,
    on_bad: str = "error",
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> ShardSet:
    """Index the tars of a folder and open it; `RejectedRows` if samples were refused and `on_bad` is not `drop`.

    An index made before is replaced. `progress` hears of tars done and tars in all.
    """
    folder = Path(folder)
    tars = _tars_of(folder)
    if on_bad not in ("error", "drop"):
        raise ConfigError(f"on_bad: {on_bad!r} is unknown; write error or drop")
    reading = Reading(source or folder.resolve().name, prompt, strip, decode)
    samples, rejected, first = 0, 0, []
    with (
        whole(folder / REJECTED) as listed,
        IndexWriter(folder, in_place=True) as writer,
        listed.open("w", encoding="utf-8") as out,
    ):
        jobs = ((tar, reading) for tar in tars)
        for done, (shard, refused) in enumerate(in_order(scan, jobs, processes, preload="data_tools.index"), 1):
            writer.add(shard)
            samples, rejected = samples + shard.entry.samples, rejected + len(refused)
            first += [item.reason for item in refused][: 5 - len(first)]
            out.writelines(json.dumps(asdict(item), ensure_ascii=True) + "\n" for item in refused)
            if progress is not None:
                progress(done, len(tars))
        reasons = "".join(f"\n  {reason}" for reason in first)
        if samples == 0:
            raise RejectedRows(f"{folder}: none of the {rejected} samples in {len(tars)} tars can be read:{reasons}")
        writer.finish()
    if not rejected:
        (folder / REJECTED).unlink()
    elif on_bad == "error":
        raise RejectedRows(
            f"{folder}: {samples} samples indexed, {rejected} rejected, all listed in {folder / REJECTED}. The first:"
            f"{reasons}\nThe index is written without them; accept that with --on-bad drop, or mend the tars"
        )
    return ShardSet(folder)


def not_indexed(folder: Path) -> Iterator[str]:
    """What the index of somebody else's tars has left out of them, in a line."""
    listed = folder / REJECTED
    if listed.is_file() and (folder / INDEX).is_file() and read_index(folder).in_place:
        with listed.open("rb") as lines:
            yield f"{sum(1 for _ in lines)} samples of its tars are rejected and left out, listed in {listed}"


def _tars_of(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name the one that holds the tars")
    if (folder / INDEX).exists() and not read_index(folder).in_place:
        raise ConfigError(f"{folder}: is a shard set that mmit-data wrote, so it has an index already")
    if not os.access(folder, os.W_OK):
        raise ConfigError(
            f"{folder}: cannot be written to, and the index belongs beside the tars; link the tars into a folder of "
            f"your own, or convert them: mmit-data convert webdataset {folder} --out shards/"
        )
    tars = sorted(path for path in folder.glob("*.tar") if path.is_file())
    deeper = next((path for path in folder.rglob("*.tar") if path.parent != folder), None)
    if deeper is not None:
        raise ConfigError(
            f"{folder}: holds tars in folders of its own ({deeper}); index each of these folders by itself"
        )
    squeezed = [path.name for path in (*folder.glob("*.tar.*"), *folder.glob("*.tgz"))]
    squeezed += [path.name for path in tars if not is_plain(path)]
    if squeezed:
        raise ConfigError(
            f"{folder}: {sorted(squeezed)[0]} is compressed or no tar, so nothing in it can be read by offset; convert "
            f"instead: mmit-data convert webdataset {folder} --out shards/"
        )
    if not tars:
        raise ConfigError(f"{folder}: the folder holds no .tar file")
    return tars


Scanned = tuple[WrittenShard, list[Rejected]]


def scan(tar: Path, reading: Reading) -> Scanned:
    """The rows of one tar, and what no row could be made of."""
    rows: list[InPlaceRow] = []
    rejected: list[Rejected] = []
    with tar.open("rb") as file:
        for group in groups(tar):
            if isinstance(group, Rejected):
                rejected.append(group)
                continue
            try:
                rows.append(_row(file.fileno(), tar, group, reading))
            except SampleError as error:
                rejected.append(Rejected(tar.name, group.number, group.key, str(error)))
    entry = ShardEntry(tar.name, tar.stat().st_size, file_sha256(tar), len(rows))
    return WrittenShard(entry, tuple(rows)), rejected


def _row(descriptor: int, tar: Path, group: Group, reading: Reading) -> InPlaceRow:
    where = f"{tar.name}:{group.key}"
    if not group.key.isprintable():
        raise SampleError(f"{where!r}: its name is no readable text; name its members anew")
    read = [(member, os.pread(descriptor, min(member.size, member.limit), member.offset)) for member in group.members]
    contents = [
        (member.ending, unread(data, f"{where}: {member.ending}") if member.kind in PICTURES else data)
        for member, data in read
    ]
    place: dict[int, Member] = {id(content): member for (member, _), (_, content) in zip(read, contents, strict=True)}
    made = sample_of_members(
        Row(tar.name, group.number, where, {"key": group.key, "members": contents}),
        prompt=reading.prompt,
        strip=reading.strip,
    )
    if not all(id(picture) in place for picture in made.images):
        raise SampleError(
            f"{where}: a picture stands inside its JSON, not in a member of its own; convert instead: "
            f"mmit-data convert webdataset {tar} --out shards/"
        )
    members = [place[id(picture)] for picture in made.images]
    pictures = [
        replace(develop(picture, where, decode_pixels=reading.decode, keep_metadata=True), data=None)
        for picture in made.images
    ]
    sample = check(Sample(group.key, reading.source, made.messages, tuple(pictures), made.meta), where)
    try:
        text = to_json(sample)
        text.encode()
    except (TypeError, ValueError) as error:
        raise SampleError(f"{where}: cannot be stored as JSON ({error}); use plain texts, numbers and lists") from None
    start = min(member.offset for member in group.members)
    stop = max(member.offset + member.size for member in group.members)
    return InPlaceRow(
        **vars(row_of(sample, start, stop - start, len(text.encode()))),
        json=text,
        picture_offsets=tuple(member.offset for member in members),
        picture_bytes=tuple(member.size for member in members),
    )
