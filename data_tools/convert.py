"""Rows of any format -> a shard set, by any number of processes, to the same bytes.

One process reads the rows and deals them out, a fixed number to a shard; it and its workers read, check and clean the
pictures and write each shard under its final name with a record beside it. Whoever starts the same command again
finds the finished shards by their records. The index is written last, so a folder without one is unfinished.
"""

from __future__ import annotations

import fcntl
import gc
import json
import multiprocessing
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from data_tools.album import MissingPicture, develop, missing
from data_tools.formats import FORMATS, options_for, samples_function, samples_of
from data_tools.looks import need_imagehash, printed
from data_tools.plan import VERSION, Settings, digest_of, folder_digest, only_writer, plain_name, plan_of
from data_tools.rows import Placed, Rejected
from data_tools.turns import stripped
from mmit.config import ConfigError, Source
from mmit.data.images import reuse_memory
from mmit.data.provenance import CONVERSION, REJECTED, beside
from mmit.data.sample import BoxPart, ImagePart, Picture, Sample, SampleError, VideoPart
from mmit.data.shard_index import INDEX, UNFINISHED, SampleRow, ShardEntry, WrittenShard
from mmit.data.shard_writer import TAR, TEMPORARY, Stored, shard_name, stored, write_index, write_shard
from mmit.data.shards import ShardSet

WORK = ".unfinished"
PLAN = "plan.json"
RECORD = re.compile(r"\d{6}\.json")
MOST_SHARDS = 10**6


COUNTS = ("rows", "samples", "rejected", "missing", "without_pictures")
"""What is counted of a conversion; `missing` are rejected rows too."""


class RejectedRows(SampleError):
    """Some rows became no sample. The shard set of the others is complete."""


@dataclass(frozen=True)
class Outcome:
    """What became of the rows of one shard."""

    number: int
    rows: int
    shard: WrittenShard | None
    rejected: tuple[Rejected, ...]
    missing: int
    """Of the rejected rows, those whose picture is missing."""
    without_pictures: int
    """Samples that lost a missing picture under `on_missing: text-only`."""


def convert(
    format: str,
    input: str | Path,
    images: str | Path | None,
    out: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
    processes: int = 1,
    part: tuple[int, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ShardSet:
    """Convert an input and open the result; `RejectedRows` if rows were refused and `on_bad` is not `drop`.

    `part` (i, n) makes the i-th of n shares, to be joined by `merge`; `progress` hears of rows and rejected rows done.
    """
    settings = settings or Settings()
    path, root, out = Path(input), Path(images) if images is not None else None, Path(out)
    options = options_for(format, options or {})
    samples_function(format)
    _check(settings, processes, part)
    if settings.prints:
        need_imagehash("--prints")
    plan = plan_of(format, path, options, settings, part, root)
    if not (out / INDEX).exists():
        _refuse_other_files(out)
        _refuse_missing(format, path, root, options, settings, part)
        out.mkdir(parents=True, exist_ok=True)
        with only_writer(out):
            if not (out / INDEX).exists():
                _write_set(format, path, root, out, options, settings, plan, processes, part, progress)
    return _judged(out, plan, settings)


def _write_set(
    format: str,
    path: Path,
    root: Path | None,
    out: Path,
    options: Mapping[str, Any],
    settings: Settings,
    plan: dict[str, Any],
    processes: int,
    part: tuple[int, int] | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    _start(out, plan, root)
    source = (
        settings.source or plain_name(path.name if path.suffix == "" else path.name.split(".")[0]) or plain_name(format)
    )
    items = samples_of(format, path, root, options)
    total = rejected = 0
    for outcome in _outcomes(items, path.name, source, settings, out, processes, part):
        total, rejected = total + outcome.rows, rejected + len(outcome.rejected)
        if progress is not None:
            progress(total, rejected)
    _finish(out, plan, path, total)


def converted(
    source: Source | Mapping[str, Any],
    cache: str | Path,
    *,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The shards of a config's source such as `{llava: notes.json, images: photos/}`, converted once into `cache`.

    The folder is named by the content: the input's bytes, the options, and names, sizes and times of the pictures.
    Whoever comes second waits for the first and finds the work done.
    """
    record = source if isinstance(source, Source) else Source.model_validate(source)
    if record.format is None or record.path is None:
        raise ConfigError("a source to convert names a format and a path, such as {llava: notes.json, images: photos/}")
    known = Settings.__dataclass_fields__
    settings = Settings(**{key: _setting(key, value) for key, value in record.options.items() if key in known})
    options = options_for(record.format, {key: value for key, value in record.options.items() if key not in known})
    path = Path(record.path)
    key = digest_of(
        {
            "version": VERSION,
            "plan": plan_of(record.format, path, options, settings, None, None),
            "images": folder_digest(Path(record.images)) if record.images is not None else None,
        }
    )
    folder = Path(cache) / "converted" / f"{plain_name(record.format.rpartition(':')[2])}-{key[:24]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        convert(
            record.format,
            path,
            record.images,
            folder,
            options=options,
            settings=settings,
            processes=processes,
            progress=progress,
        )
    return folder


def _setting(key: str, value: Any) -> Any:
    return tuple(value) if key == "window" and isinstance(value, list) else value


def _check(settings: Settings, processes: int, part: tuple[int, int] | None) -> None:
    if settings.rows_per_shard < 1 or processes < 1:
        raise ConfigError("rows_per_shard and processes must be at least 1")
    if part is not None and not 1 <= part[0] <= part[1]:
        raise ConfigError(f"part {part[0]}/{part[1]}: write i/n with i from 1 to n")
    choices = {"on_missing": ("error", "drop", "text-only"), "on_bad": ("error", "drop")}
    for name, allowed in choices.items():
        if asdict(settings)[name] not in allowed:
            raise ConfigError(f"{name}: {asdict(settings)[name]!r} is unknown; write one of {', '.join(allowed)}")


# Before: what an earlier run left, and pictures that are not there ----------------------------------------------------


def _refuse_other_files(out: Path) -> None:
    """Nothing is written into a folder that holds what no conversion has begun."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out}: this is a file; --out names a folder")
    plan = out / WORK / PLAN
    if plan.exists():
        if "tool" in json.loads(plan.read_text(encoding="utf-8")):
            raise ConfigError(f"{out}: holds an unfinished set of another command; finish it with that, or remove it")
    elif any(path.name not in (UNFINISHED, WORK) for path in out.iterdir()):
        raise ConfigError(f"{out}: the folder holds other files; --out names a new or empty folder")


def _start(out: Path, plan: dict[str, Any], root: Path | None) -> None:
    """Claims the folder for this plan; the shards that an interrupted run of the same plan finished stay.

    The plan is replaced last, so whoever is killed in here is taken up here.
    """
    note = out / WORK / PLAN
    begun = {"plan": plan, "images": str(root.resolve()) if root is not None else None}
    same = note.exists() and json.loads(note.read_text(encoding="utf-8")) == begun
    for path in [*out.iterdir(), *(out / WORK).glob("*")]:
        if TEMPORARY.fullmatch(path.name) or (not same and (TAR.fullmatch(path.name) or RECORD.fullmatch(path.name))):
            path.unlink()
    if not same:
        note.parent.mkdir(exist_ok=True)
        _write(note, json.dumps(begun, indent=1))


def _refuse_missing(
    format: str,
    path: Path,
    root: Path | None,
    options: Mapping[str, Any],
    settings: Settings,
    part: tuple[int, int] | None,
) -> None:
    """One look at every row before the first picture is opened, so that a wrong --images costs seconds."""
    beside = format in FORMATS and FORMATS[format].beside
    if not (root is not None or beside) or settings.on_missing != "error":
        return
    rows, names = 0, {}
    below = root or path
    for number, item in enumerate(samples_of(format, path, root, options)):
        if isinstance(item, Rejected) or not _ours(number // settings.rows_per_shard, part):
            continue
        absent = missing(item)
        rows += bool(absent)
        for picture in absent:
            names.setdefault(picture, _place_of(item, path.name, number))
    if names:
        shown = "".join(f"\n  {name}   ({where})" for name, where in islice(names.items(), 20))
        more = f"\n  and {len(names) - 20} more" if len(names) > 20 else ""
        raise ConfigError(
            f"{path}: {len(names)} pictures named by {rows} rows are missing below {below}:{shown}{more}\n"
            f"Check --images and --set image_prefix=..., or say --on-missing drop (leave those rows out) or text-only "
            f"(in a config: images, and options: {{on_missing: drop}})"
        )


# Rows -> shards -------------------------------------------------------------------------------------------------------


def _ours(shard: int, part: tuple[int, int] | None) -> bool:
    return part is None or shard % part[1] == part[0] - 1


def _place_of(item: Sample | Rejected, file: str, number: int) -> str:
    return item.where if isinstance(item, Placed) else f"{file} row {number}"


def _outcomes(
    items: Iterable[Sample | Rejected],
    file: str,
    source: str,
    settings: Settings,
    out: Path,
    processes: int,
    part: tuple[int, int] | None,
) -> Iterator[Outcome]:
    """The outcome of each shard in order; no more rows in memory than the processes are working on."""
    size = settings.rows_per_shard

    def jobs() -> Iterator[tuple[int, list[Sample | Rejected]]]:
        rows = iter(items)
        for number in count():
            batch = list(islice(rows, size))
            if not batch:
                return
            if number == MOST_SHARDS:
                raise ConfigError(f"more than {MOST_SHARDS:,} shards of {size:,} rows; raise --rows-per-shard")
            if _ours(number, part):
                yield number, batch

    waiting: deque[Future[Outcome] | Outcome] = deque()
    queue = jobs()
    head = list(islice(queue, 2))
    workers = _Workers(processes - 1) if processes > 1 and len(head) > 1 else None
    reuse_memory()
    try:
        for number, batch in chain(head, queue):
            arguments = (number, batch, file, source, settings, out)
            done = _recorded(out, number)
            if done is None and workers is not None and workers.free(waiting):
                waiting.append(workers.pool.submit(_shard, *arguments))
            else:
                waiting.append(done or _shard(*arguments))
            while waiting and (isinstance(waiting[0], Outcome) or waiting[0].done()):
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    finally:
        if workers is not None:
            workers.close()


class _Workers:
    """Processes beside this one, which works too: until they are up, and whenever each of them has a shard to spare."""

    def __init__(self, number: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["data_tools.convert"])
        self.number = number
        self.pool = ProcessPoolExecutor(number, mp_context=context, initializer=leave_with, initargs=(os.getpid(),))
        self._starting = ThreadPoolExecutor(1)
        self._up = self._starting.submit(lambda: self.pool.submit(os.getpid).result())

    def free(self, waiting: Iterable[Future[Outcome] | Outcome]) -> bool:
        """Whether one more shard would find a worker, now or when it is done with the one at hand."""
        if not self._up.done():
            return False
        _result(self._up)  # a worker that was killed at its start must not go unnoticed
        return sum(isinstance(item, Future) and not item.done() for item in waiting) < 2 * self.number

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self._starting.shutdown(wait=True)


def leave_with(conversion: int) -> None:
    """Ends this worker when the process that converts is gone: a killed conversion leaves nothing running."""
    gc.freeze()  # the libraries' objects stay; looking through them again and again took a fifth of the time
    reuse_memory()

    def watch() -> None:
        with suppress(ProcessLookupError):
            while True:
                os.kill(conversion, 0)
                time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _result(item: Future[Any] | Outcome) -> Any:
    if isinstance(item, Outcome):
        return item
    try:
        return item.result()
    except BrokenProcessPool:
        raise SampleError(
            "a worker process was killed, most likely for want of memory; the same command with fewer --processes or "
            "rows_per_shard goes on where this one stopped"
        ) from None


def _shard(
    number: int, items: list[Sample | Rejected], file: str, source: str, settings: Settings, out: Path
) -> Outcome:
    """Writes one shard and, after it, the record that it is done."""
    rejected: list[Rejected] = []
    lost = absent = 0
    name = plain_name(source) or "row"

    def good() -> Iterator[Stored]:
        nonlocal lost, absent
        for offset, item in enumerate(items):
            row = number * settings.rows_per_shard + offset
            if isinstance(item, Rejected):
                rejected.append(item)
                continue
            where = _place_of(item, file, row)
            try:
                sample, fewer = _ready(item, f"{name}-{row:09d}", source, where, settings)
            except SampleError as error:
                placed = item if isinstance(item, Placed) else Placed("", "", (), file=file, row=row, name=item.key)
                rejected.append(Rejected(placed.file, placed.row, placed.name, str(error)))
                absent += isinstance(error, MissingPicture)
                continue
            lost += fewer
            yield sample

    shard = write_shard(out / shard_name(number), good())
    if not shard.rows:
        (out / shard_name(number)).unlink()
        shard = None
    outcome = Outcome(number, len(items), shard, tuple(rejected), absent, lost)
    _write(out / WORK / f"{number:06d}.json", json.dumps(_record(outcome)))
    return outcome


def _ready(item: Sample, key: str, source: str, where: str, settings: Settings) -> tuple[Stored, bool]:
    """The sample with its pictures, as it will be stored; and whether it lost one that is missing."""
    pictures: list[Picture | None] = []
    for picture in item.images:
        try:
            pictures.append(
                develop(
                    picture,
                    where,
                    decode_pixels=settings.decode,
                    keep_metadata=settings.keep_metadata,
                    window=settings.window,
                    look=printed if settings.prints else None,
                )
            )
        except MissingPicture:
            if settings.on_missing != "text-only":
                raise
            pictures.append(None)
    meta = dict(item.meta) | ({"key": item.key} if item.key else {})
    sample = Sample(key, item.source or source, item.messages, item.images, meta)
    kept = [picture for picture in pictures if picture is not None]
    fewer = len(kept) < len(pictures)
    if fewer:
        sample = _without(sample, {n for n, picture in enumerate(pictures) if picture is None}, where)
    ready = stored(replace(sample, images=tuple(kept)), where)
    _check_boxes(ready.sample, where)
    return ready, fewer


def _check_boxes(sample: Sample, where: str) -> None:
    """Corners read as width and height, or boxes of another size of the picture, would else be clipped silently.

    Real boxes reach a little over the edge; a tenth of the side is no accident.
    """
    for part in (part for item in sample.messages for part in item.parts if isinstance(part, BoxPart)):
        shown = sample.images[part.image]
        across = max(-part.left, part.right - shown.width) / shown.width
        down = max(-part.top, part.bottom - shown.height) / shown.height
        if max(across, down) > 0.1:
            raise SampleError(
                f"{where}: the box [{part.left:g}, {part.top:g}, {part.right:g}, {part.bottom:g}] reaches out of its "
                f"picture of {shown.width} x {shown.height}; are its numbers corners, or of another size of it?"
            )


def _without(sample: Sample, gone: set[int], where: str) -> Sample:
    """The sample without these pictures and the parts that show them."""
    number = {old: new for new, old in enumerate(n for n in range(len(sample.images)) if n not in gone)}
    messages = []
    for item in sample.messages:
        parts = []
        for part in item.parts:
            match part:
                case ImagePart(image):
                    parts += [ImagePart(number[image])] if image in number else []
                case BoxPart(image) | VideoPart((image, *_)) if not {image} <= number.keys():
                    raise SampleError(f"{where}: speaks of a place in a missing picture; leave the row out")
                case BoxPart():
                    parts.append(replace(part, image=number[part.image]))
                case VideoPart():
                    parts.append(replace(part, frames=tuple(number[frame] for frame in part.frames)))
                case _:
                    parts.append(part)
        messages.append(replace(item, parts=stripped(parts)))
    if not any(item.train and item.parts for item in messages):
        raise SampleError(f"{where}: without its missing pictures no answer is left")
    return replace(sample, messages=tuple(messages))


# Records of finished shards, and the end ------------------------------------------------------------------------------


def _record(outcome: Outcome) -> dict[str, Any]:
    shard = outcome.shard
    return {
        "number": outcome.number,
        "rows": outcome.rows,
        "shard": None
        if shard is None
        else {
            "entry": asdict(shard.entry),
            # asdict would copy each row deeply, a sixth of the time of converting it.
            "rows": [vars(row) | {"sha256": [value.hex() for value in row.sha256]} for row in shard.rows],
        },
        "rejected": [asdict(item) for item in outcome.rejected],
        "missing": outcome.missing,
        "without_pictures": outcome.without_pictures,
    }


def _recorded(out: Path, number: int) -> Outcome | None:
    """The outcome of a shard that an earlier run finished and that still has its size."""
    path = out / WORK / f"{number:06d}.json"
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # a power cut may leave an empty file
        return None
    shard = None
    if record["shard"] is not None:
        entry = ShardEntry(**record["shard"]["entry"])
        tar = out / entry.name
        if not tar.exists() or tar.stat().st_size != entry.bytes:
            return None
        shard = WrittenShard(entry, tuple(_row(row) for row in record["shard"]["rows"]))
    rejected = tuple(Rejected(**item) for item in record["rejected"])
    return Outcome(record["number"], record["rows"], shard, rejected, record["missing"], record["without_pictures"])


def _row(record: dict[str, Any]) -> SampleRow:
    lists: dict[str, Any] = {name: tuple(record[name]) for name in ("widths", "heights")}
    lists["sha256"] = tuple(bytes.fromhex(value) for value in record["sha256"])
    return SampleRow(**record | lists)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _all_recorded(out: Path) -> Iterator[Outcome]:
    for path in sorted((out / WORK).glob("[0-9]*.json")):
        outcome = _recorded(out, int(path.stem))
        if outcome is not None:
            yield outcome


def _finish(out: Path, plan: dict[str, Any], path: Path, rows: int) -> None:
    """Writes the list of rejected rows, the summary and, last, the index."""
    summary: dict[str, Any] = {"plan": plan, **dict.fromkeys(COUNTS, 0), "first": []}
    by_shard: dict[int, int] = {}
    temporary = out / f"{REJECTED}.{os.getpid()}.tmp"
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        for outcome in _all_recorded(out):
            summary["rows"] += outcome.rows
            summary["samples"] += outcome.shard.entry.samples if outcome.shard else 0
            summary["rejected"] += len(outcome.rejected)
            summary["missing"] += outcome.missing
            summary["without_pictures"] += outcome.without_pictures
            summary["first"] += [item.reason for item in outcome.rejected][: 5 - len(summary["first"])]
            if outcome.rejected:
                by_shard[outcome.number] = len(outcome.rejected)
            for item in outcome.rejected:
                stream.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")
    os.replace(temporary, out / REJECTED)
    if summary["rows"] != rows:
        raise SampleError(
            f"{out}: of {rows} rows only {summary['rows']} are in finished shards: somebody removed or cut a file "
            f"meanwhile; give the same command again"
        )
    if plan["part"] is not None:
        summary["rejected_by_shard"] = by_shard  # so that `merge` lists them in the order of one run
    elif summary["samples"] == 0:
        raise _nothing(path, out, summary)
    _write(out / CONVERSION, json.dumps(summary, indent=1) + "\n")
    write_index(out, (outcome.shard for outcome in _all_recorded(out) if outcome.shard is not None))
    _tidy(out, summary)


def _tidy(out: Path, summary: dict[str, Any]) -> None:
    """Takes away what a finished set needs no more."""
    if not summary["rejected"]:
        (out / REJECTED).unlink(missing_ok=True)
    shutil.rmtree(out / WORK, ignore_errors=True)
    (out / UNFINISHED).unlink(missing_ok=True)


def _nothing(path: Path, out: Path, summary: dict[str, Any]) -> SampleError:
    if summary["rows"] == 0:
        return SampleError(f"{path}: no rows; name an input that holds at least one")
    listed = "".join(f"\n  {reason}" for reason in summary["first"])
    return RejectedRows(
        f"{path}: none of the {summary['rows']} rows became a sample (all in {out / REJECTED}). The first:{listed}"
    )


def conversion(folder: Path) -> dict[str, Any] | None:
    """The summary that a conversion left in its shard set: plan, COUNTS and the first reasons of rejection."""
    return beside(folder, CONVERSION)


def _judged(out: Path, plan: dict[str, Any], settings: Settings) -> ShardSet:
    """The finished set, if it is one of this plan and if all rows became samples or may be lost."""
    summary = conversion(out)
    if summary is None or summary["plan"] != plan:
        raise ConfigError(
            f"{out}: already holds a finished shard set of another input or other options; name another --out, or "
            f"remove the folder first"
        )
    if (out / UNFINISHED).exists():
        with only_writer(out):
            _tidy(out, summary)
    bad = summary["rejected"] - (summary.get("missing", 0) if settings.on_missing == "drop" else 0)
    if bad and settings.on_bad == "error":
        listed = "".join(f"\n  {reason}" for reason in summary["first"])
        raise RejectedRows(
            f"{out}: {summary['samples']} samples written, {summary['rejected']} of {summary['rows']} rows rejected, "
            f"all listed in {out / REJECTED}. The first:{listed}\n"
            f"Mend the rows and convert them into a new folder, or accept the loss with --on-bad drop (in a config: "
            f"options: {{on_bad: drop}})"
        )
    return ShardSet(out)
