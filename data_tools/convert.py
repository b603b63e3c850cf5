"""Rows of any format -> a shard set, by any number of processes, to the same bytes.

One process reads the rows and deals them out, a fixed number to a shard; it and its workers read, check and clean the
pictures and write each shard under its final name with a record beside it. Whoever starts the same command again
finds the finished shards by their records. The index is written last, so a folder without one is unfinished.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, get_type_hints

from data_tools.ahead import Batch, Missed, bytes_of, looked_at
from data_tools.finished import PLAN, WORK, read_record, refuse_other_files, write_whole
from data_tools.formats import FORMATS, checked, options_for, samples_function, samples_of
from data_tools.looks import need_imagehash
from data_tools.one_shard import Outcome, one_shard, recorded
from data_tools.plan import VERSION, Settings, digest_of, folder_digest, only_writer, plain_name, plan_of
from data_tools.rows import Rejected
from data_tools.workers import Team, server
from mmit.config import ConfigError, Source
from mmit.data.files import whole
from mmit.data.provenance import CONVERSION, PROVENANCE, REJECTED, beside
from mmit.data.sample import Sample, SampleError
from mmit.data.shard_index import INDEX, UNFINISHED, IndexWriter
from mmit.data.shard_writer import TAR, TEMPORARY
from mmit.data.shards import ShardSet

RECORD = re.compile(r"\d{6}\.json")
MOST_SHARDS = 10**6
MODULE = "data_tools.convert"


COUNTS = ("rows", "samples", "rejected", "missing", "without_pictures")
"""What is counted of a conversion; `missing` are rejected rows too."""


class RejectedRows(SampleError):
    """Some rows became no sample. The shard set of the others is complete."""


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
    progress: Callable[[int, int, int], None] | None = None,
) -> ShardSet:
    """Convert an input and open the result; `RejectedRows` if rows were refused and `on_bad` is not `drop`.

    `part` (i, n) makes the i-th of n shares, to be joined by `merge`; `progress` hears of rows read, converted and
    rejected.
    """
    options = options_for(format, options or {})
    settings = _named(settings or Settings(), options)
    path, root, out = Path(input), Path(images) if images is not None else None, Path(out)
    samples_function(format)
    _check(settings, processes, part)
    if settings.prints:
        need_imagehash("--prints")
    if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
        raise ConfigError(
            f"{out}: lies inside the input {path}, which would then change; name another --out (in a config: cache)"
        )
    plan = plan_of(format, path, options, settings, part, root)
    if not (out / INDEX).exists():
        refuse_other_files(out)
        if processes > 1:
            server(MODULE)  # comes up while the first rows are read
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
    progress: Callable[[int, int, int], None] | None,
) -> None:
    source = (
        settings.source or plain_name(path.name if path.suffix == "" else path.name.split(".")[0]) or plain_name(format)
    )
    done = _Tally(progress)

    def batches() -> Iterator[Batch]:
        return _batches(samples_of(format, path, root, options), settings.rows_per_shard, part, done)

    with Team[tuple[int, int]](processes, MODULE) as team:
        dealt = batches()
        beside = format in FORMATS and FORMATS[format].beside
        if settings.on_missing == "error" and (root is not None or beside):
            missed = Missed(path, root or path, options.get("image_prefix"))
            dealt = looked_at(batches, missed, settings.rows_per_shard, team)
        first = list(islice(dealt, 1))  # what is refused before it leaves no folder
        with _claimed(out, plan, path, root), team:
            for number, rows in chain(first, dealt):
                team.give(one_shard, number, rows, path.name, source, settings, out, size=bytes_of(rows))
                done.add(team.ready())
            done.add(team.rest())
            _finish(out, plan, path, done.rows)


class _Tally:
    """How far a conversion is."""

    def __init__(self, progress: Callable[[int, int, int], None] | None) -> None:
        self.read = self.rows = self.rejected = 0
        self._progress = progress

    def seen(self, read: int) -> None:
        self.read = max(self.read, read)
        self._tell()

    def add(self, results: Iterable[tuple[int, int]]) -> None:
        for rows, rejected in results:
            self.rows, self.rejected = self.rows + rows, self.rejected + rejected
            self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self.read, self.rows, self.rejected)


def _batches(
    items: Iterable[Sample | Rejected], size: int, part: tuple[int, int] | None, done: _Tally
) -> Iterator[Batch]:
    """The rows of each shard of the part that is ours."""
    rows = iter(items)
    for number in count():
        batch = list(islice(rows, size))
        if not batch:
            return
        if number == MOST_SHARDS:
            raise ConfigError(f"more than {MOST_SHARDS:,} shards of {size:,} rows; raise --rows-per-shard")
        done.seen(number * size + len(batch))
        if part is None or number % part[1] == part[0] - 1:
            yield number, batch


def converted(
    source: Source | Mapping[str, Any],
    cache: str | Path,
    *,
    processes: int = 1,
    progress: Callable[[int, int, int], None] | None = None,
) -> Path:
    """The shards of a config's source such as `{llava: notes.json, images: photos/}`, converted once into `cache`.

    The folder is named by the content: the input's bytes, the options, and names, sizes and times of the pictures.
    Whoever comes second waits for the first and finds the work done.
    """
    record = source if isinstance(source, Source) else Source.model_validate(source)
    if record.format is None or record.path is None:
        raise ConfigError("a source to convert names a format and a path, such as {llava: notes.json, images: photos/}")
    settings, options = choices_of(record)
    path = Path(record.path)
    key = digest_of(
        {
            "version": VERSION,
            "plan": plan_of(record.format, path, options, settings, None, None),
            "images": folder_digest(Path(record.images)) if record.images is not None else None,
            **({"times": folder_digest(path)} if path.is_dir() else {}),
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


def choices_of(source: Source) -> tuple[Settings, dict[str, Any]]:
    """The `options` of a config's source: how rows become shards, and the format's own. ConfigError for others."""
    format, kinds = str(source.format), get_type_hints(Settings)
    chosen = {key: value for key, value in source.options.items() if key in kinds}
    others = {key: value for key, value in source.options.items() if key not in kinds}
    settings = Settings(**{key: checked(format, key, value, kinds[key]) for key, value in chosen.items()})
    _check(settings, 1, None)
    options = options_for(format, others, beside=kinds)
    return _named(settings, options), options


def _named(settings: Settings, options: Mapping[str, Any]) -> Settings:
    """One of several data sets in a folder gives its samples its own name, not that of the folder."""
    chosen = plain_name(str(options.get("dataset", "")))
    return replace(settings, source=chosen) if chosen and settings.source is None else settings


def _check(settings: Settings, processes: int, part: tuple[int, int] | None) -> None:
    if settings.rows_per_shard < 1 or processes < 1:
        raise ConfigError("rows_per_shard and processes must be at least 1")
    if part is not None and not 1 <= part[0] <= part[1]:
        raise ConfigError(f"part {part[0]}/{part[1]}: write i/n with i from 1 to n")
    choices = {"on_missing": ("error", "drop", "text-only"), "on_bad": ("error", "drop")}
    for name, allowed in choices.items():
        if asdict(settings)[name] not in allowed:
            raise ConfigError(f"{name}: {asdict(settings)[name]!r} is unknown; write one of {', '.join(allowed)}")


# Before: what an earlier run left -------------------------------------------------------------------------------------


@contextmanager
def _claimed(out: Path, plan: dict[str, Any], path: Path, root: Path | None) -> Iterator[None]:
    """The folder is there and this plan's, and nobody else writes into it while this lasts."""
    out.mkdir(parents=True, exist_ok=True)
    with only_writer(out):
        if (out / INDEX).exists():
            raise ConfigError(f"{out}: another process has just finished a set here; give the same command again")
        _start(out, plan, path, root)
        yield


def _start(out: Path, plan: dict[str, Any], path: Path, root: Path | None) -> None:
    """Claims the folder for this plan; the shards that an interrupted run of the same plan finished stay.

    The plan is replaced last, so whoever is killed in here is taken up here.
    """
    note = out / WORK / PLAN
    begun: dict[str, Any] = {"plan": plan, "images": str(root.resolve()) if root is not None else None}
    if path.is_dir():
        begun["times"] = folder_digest(path)
    same = read_record(note) == begun
    for path in [*out.iterdir(), *(out / WORK).glob("*")]:
        if TEMPORARY.fullmatch(path.name) or (not same and (TAR.fullmatch(path.name) or RECORD.fullmatch(path.name))):
            path.unlink()
    if not same:
        note.parent.mkdir(exist_ok=True)
        write_whole(note, json.dumps(begun, indent=1))


# The end: every row accounted for -------------------------------------------------------------------------------------


def _all_recorded(out: Path) -> Iterator[Outcome]:
    for path in sorted((out / WORK).glob("[0-9]*.json")):
        outcome = recorded(out, int(path.stem))
        if outcome is not None:
            yield outcome


def _finish(out: Path, plan: dict[str, Any], path: Path, rows: int) -> None:
    """Writes the list of rejected rows, the summary and, last, the index."""
    summary: dict[str, Any] = {"plan": plan, **dict.fromkeys(COUNTS, 0), "first": []}
    by_shard: dict[int, int] = {}
    with IndexWriter(out) as index:
        with (
            whole(out / REJECTED) as temporary,
            temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream,
        ):
            for outcome in _all_recorded(out):
                summary["rows"] += outcome.rows
                summary["rejected"] += len(outcome.rejected)
                summary["missing"] += outcome.missing
                summary["without_pictures"] += outcome.without_pictures
                summary["first"] += [item.reason for item in outcome.rejected][: 5 - len(summary["first"])]
                if outcome.rejected:
                    by_shard[outcome.number] = len(outcome.rejected)
                for item in outcome.rejected:
                    stream.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")
                if outcome.shard is not None:
                    summary["samples"] += outcome.shard.entry.samples
                    index.add(outcome.shard)
        if summary["rows"] != rows:
            raise SampleError(
                f"{out}: of {rows} rows only {summary['rows']} are in finished shards: somebody removed or cut a file "
                f"meanwhile; give the same command again"
            )
        if plan["part"] is not None:
            summary["rejected_by_shard"] = by_shard  # so that `merge` lists them in the order of one run
        elif summary["samples"] == 0:
            raise _nothing(path, out, summary)
        write_whole(out / CONVERSION, json.dumps(summary, indent=1) + "\n")
        index.finish()
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


def losses(folder: Path) -> Iterator[str]:
    """What the conversion that made a shard set, or the set it was made from, has left out of it, a line each."""
    summary, listed = conversion(folder), f", listed in {folder / REJECTED}"
    if summary is None:
        summary, listed = beside(folder, PROVENANCE) or {}, ""
        while isinstance(before := summary.get("made_from"), dict):
            summary = before
    if rejected := summary.get("rejected"):
        yield f"{rejected} of {summary['rows']} rows are rejected and left out{listed}"
    if without := summary.get("without_pictures"):
        yield f"{without} samples lost a missing picture and kept their text"


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
