"""A shard set without some of its samples: what is left, written once, with a record of what was taken out and why.

First every decision is written down, then the shards are copied sample by sample. A shard of the result holds what is
left of the shard of the same number, so whoever is interrupted and starts the same command again finds the finished
ones. The same input and options give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.finished import read_record, record_of, shard_in, write_whole
from data_tools.plan import only_writer, plain_name
from mmit.config import ConfigError
from mmit.data.files import whole
from mmit.data.provenance import CONVERSION, PROVENANCE, beside, licenses
from mmit.data.sample import Sample, SampleError
from mmit.data.shard_index import INDEX, UNFINISHED, WrittenShard
from mmit.data.shard_writer import KEY, TEMPORARY, shard_name, write_index, write_shard
from mmit.data.shards import ShardSet

FORMAT = 1
VERSION = 1
"""Raised when a tool decides otherwise on the same input and options, so that it finishes no set begun before."""
WORK = ".unfinished"
REMOVED = "removed.jsonl"

Progress = Callable[[str, int, int], None]
"""Hears what is being done, how many samples of how many are done."""


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Removal:
    """One sample to leave out."""

    number: int
    reason: str
    """A short name that is counted, such as `short` or `near`."""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Derived:
    """A finished set and what its making counted."""

    shards: ShardSet
    samples: int
    """In the set it was made from."""
    removed: dict[str, int]
    """Samples left out, by reason."""


Decide = Callable[[Path], Iterable[Removal]]
"""Gives the samples to leave out, in their order; may keep files in the folder it is given."""


def open_set(folder: Path) -> ShardSet:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name a folder of shards that `mmit-data convert` wrote")
    return ShardSet(folder)


def texts_of(shards: ShardSet, progress: Progress, what: str) -> Iterator[tuple[int, Sample]]:
    """Every sample with its number, without the bytes of its pictures."""
    total = len(shards)
    for number in range(total):
        if number % 500 == 0:
            progress(what, number, total)
        yield number, shards.read(number, images=False)
    progress(what, total, total)


def derive(
    shards: ShardSet,
    out: Path,
    *,
    tool: str,
    options: Mapping[str, Any],
    decide: Decide,
    libraries: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> Derived:
    """Write `shards` without what `decide` takes out into `out`, or go on where the same command was interrupted.

    `options` is what distinguishes one call from another, as JSON; `libraries` the versions that the decisions rest on.
    """
    plan = {
        "format": FORMAT,
        "tool": f"mmit-data {tool}",
        "version": VERSION,
        "options": json.loads(json.dumps(options)),
        "libraries": dict(libraries or {}),
        "input": {"folder": shards.folder.name, "fingerprint": shards.fingerprint, "samples": len(shards)},
    }
    if shards.folder.resolve() == out.resolve():
        raise ConfigError(f"--out {out}: is the folder that is read; name another one, the input stays as it is")
    out.mkdir(parents=True, exist_ok=True)
    with _claimed(out, plan) as finished:
        if not finished:
            work = out / WORK
            if not (work / REMOVED).exists():
                _write_down(work / REMOVED, shards, decide(work))
            counts, leave = _read_back(work / REMOVED, len(shards))
            if leave.all():
                shutil.rmtree(work)
                (out / UNFINISHED).unlink()
                listed = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items()))
                raise SampleError(
                    f"{shards.folder}: none of its {len(shards):,} samples would be left ({listed}); loosen the options"
                )
            written = [_copied(shards, number, leave, out, progress) for number in range(len(shards.shard_names))]
            with whole(out / REMOVED) as temporary:
                shutil.copyfile(work / REMOVED, temporary)
            _write(out / PROVENANCE, _provenance(plan, shards, counts, int(leave.sum()), out))
            write_index(out, (shard for path in written if path is not None and (shard := _shard(path)) is not None))
        shutil.rmtree(out / WORK, ignore_errors=True)
    (out / UNFINISHED).unlink(missing_ok=True)
    record = json.loads((out / PROVENANCE).read_text(encoding="utf-8"))
    return Derived(ShardSet(out), len(shards), record["counts"]["removed_by_reason"])


@contextmanager
def _claimed(out: Path, plan: dict[str, Any]) -> Iterator[bool]:
    """`out` is ours alone while this lasts; gives whether the very same set already lies there finished."""
    ours = (out / UNFINISHED).exists() or (out / INDEX).exists()
    if not ours and any(out.iterdir()):
        raise ConfigError(f"{out}: the folder is not empty and holds no shard set; --out names a new one")
    found = _plan_in(out)
    if found is not None and found != plan:
        differing = [key for key in plan if found.get(key) != plan[key]]
        raise ConfigError(
            f"{out}: holds a set made in another way ({', '.join(differing)} differ); name another --out, or remove it"
        )
    if found is None and (out / INDEX).exists():
        raise ConfigError(f"{out}: holds a finished set of shards made otherwise; name another --out")
    if found is None and (out / UNFINISHED).exists() and any(path.name != UNFINISHED for path in out.iterdir()):
        raise ConfigError(f"{out}: holds an unfinished set of another command; finish it with that, or remove it")
    with only_writer(out):
        finished = (out / INDEX).exists()
        if not finished:
            (out / WORK).mkdir(exist_ok=True)
            _write(out / WORK / "plan.json", plan)
            for path in out.glob("*.tmp"):
                if TEMPORARY.fullmatch(path.name) or path.name.startswith((REMOVED, PROVENANCE)):
                    path.unlink()
        yield finished


def _plan_in(out: Path) -> dict[str, Any] | None:
    if (out / INDEX).exists() and (out / PROVENANCE).exists():
        return json.loads((out / PROVENANCE).read_text(encoding="utf-8"))["plan"]
    path = out / WORK / "plan.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write_down(path: Path, shards: ShardSet, removals: Iterable[Removal]) -> None:
    """One line a sample that is left out, complete or not there."""
    with whole(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        for item in removals:
            shard, _ = shards.shard_of(item.number)
            record = {
                "number": item.number,
                "shard": shards.shard_names[shard],
                "key": shards.key(item.number),
                "reason": item.reason,
                **item.details,
            }
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _read_back(path: Path, samples: int) -> tuple[dict[str, int], np.ndarray]:
    """How many are left out by reason, and bool (samples,): which."""
    counts: Counter[str] = Counter()
    leave = np.zeros(samples, dtype=bool)
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            record = json.loads(line)
            counts[record["reason"]] += 1
            leave[record["number"]] = True
    return dict(sorted(counts.items())), leave


def _copied(shards: ShardSet, number: int, leave: np.ndarray, out: Path, progress: Progress) -> Path | None:
    """Writes what is left of one shard, unless an earlier run did; the record of it, None if nothing is left."""
    start = sum(shards.shard_sizes[:number])
    kept = [i for i in range(start, start + shards.shard_sizes[number]) if not leave[i]]
    progress("write", start, len(shards))
    if not kept:
        return None
    record = out / WORK / f"{number:06d}.json"
    if _shard(record) is None:
        shard = write_shard(out / shard_name(number), (_named(shards.read(i), i) for i in kept))
        write_whole(record, json.dumps(record_of(shard), ensure_ascii=False))
    progress("write", start + shards.shard_sizes[number], len(shards))
    return record


def _named(sample: Sample, number: int) -> Sample:
    """The sample under a key that a tar of ours can hold; tars indexed where they lie may have others."""
    if KEY.fullmatch(sample.key):
        return sample
    return replace(sample, key=f"{plain_name(sample.source) or 'sample'}-{number:09d}")


def _shard(record: Path) -> WrittenShard | None:
    """The finished shard that a record tells of, if its tar has the size it was written with."""
    content = read_record(record)
    return shard_in(record.parents[1], content) if content is not None else None


def _provenance(
    plan: dict[str, Any], shards: ShardSet, counts: dict[str, int], removed: int, out: Path
) -> dict[str, Any]:
    """What was done to which input with what outcome, and the same of the input itself, back to its conversion."""
    digest = hashlib.sha256((out / REMOVED).read_bytes()).hexdigest()
    return {
        "plan": plan,
        "counts": {
            "samples": len(shards),
            "kept": len(shards) - removed,
            "removed": removed,
            "removed_by_reason": counts,
        },
        "removed": {"file": REMOVED, "sha256": digest},
        "licenses": licenses(shards.folder),
        "made_from": beside(shards.folder, PROVENANCE) or beside(shards.folder, CONVERSION),
    }


def _write(path: Path, record: Any) -> None:
    write_whole(path, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
