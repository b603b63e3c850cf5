"""What makes two conversions the same: the content of the input, the options, the settings."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from data_tools.formats import FORMATS
from data_tools.rows import files_below
from mmit.config import ConfigError
from mmit.data.shard_index import UNFINISHED

VERSION = 3
"""Raised when the same input and options give other samples than before, so that caches are made anew."""

OnMissing = Literal["error", "drop", "text-only"]
OnBad = Literal["error", "drop"]


@dataclass(frozen=True)
class Settings:
    """How rows become shards, apart from the format's own options."""

    source: str | None = None
    """Name of the samples' origin, in every sample and in metrics; default: the input's name."""
    on_missing: OnMissing = "error"
    """A picture file that is not there: `error` before anything is written, `drop` the row, or keep its text."""
    on_bad: OnBad = "error"
    """Rows that cannot be read or are wrong: the others are written, and it ends with an error, or (`drop`) well."""
    decode: bool = True
    """Decode every picture once with the trainer's decoder."""
    keep_metadata: bool = False
    """Copy the bytes of the pictures as they are, EXIF and all."""
    window: tuple[float, float] | None = None
    """Values of 16-bit pictures shown as black and white."""
    prints: bool = False
    """Keep in each picture's record what it looks like, so that `dedup --alike` need not decode it again."""
    license: str | None = None
    """Licence of the input, carried to the model card."""
    rows_per_shard: int = 1000


def plan_of(
    format: str,
    path: Path,
    options: Mapping[str, Any],
    settings: Settings,
    part: tuple[int, int] | None,
    images: Path | None,
) -> dict[str, Any]:
    made = format in FORMATS and FORMATS[format].from_nothing
    choices = {key: value for key, value in asdict(settings).items() if key != "on_bad"}
    if not settings.prints:  # what was converted before there was the choice stays known
        del choices["prints"]
    return {
        "version": VERSION,
        "format": format,
        **({"code": _code_digest(format)} if ":" in format else {}),
        # Its name alone: another machine may hold the same pictures at another place.
        **({"images": images.resolve().name} if images is not None else {}),
        "input": path.name,
        "content": None if made else content_digest(path),
        "options": {key: _option_digest(value) for key, value in options.items()},
        "settings": choices | {"window": list(settings.window) if settings.window else None},
        "part": list(part) if part else None,
    }


def _code_digest(format: str) -> str | None:
    """sha256 of the file in which a format of one's own is written: after an edit its samples are others."""
    spec = importlib.util.find_spec(format.partition(":")[0])
    return content_digest(Path(spec.origin)) if spec is not None and spec.origin else None


def _option_digest(value: Any) -> Any:
    """The value as JSON; a value that names a file counts with the content of that file."""
    # Not Path.is_file, to which a long text is an error: no file can have such a name.
    if isinstance(value, str | Path) and value and os.path.isfile(value):
        return {"file": Path(value).name, "sha256": content_digest(Path(value))}
    return json.loads(json.dumps(value, default=str))


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Nobody else writes into `out` while this lasts. The note that is locked stays: it marks a set as unfinished."""
    with (out / UNFINISHED).open("a") as note:
        try:
            fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{out}: another process is writing here; wait for it, or name another --out") from None
        yield


def content_digest(path: Path) -> str:
    """sha256 of a file; of a folder, of what it holds, as any machine with a copy of it would find it: the names and
    sizes of all files, the content of those that are no pictures or films, the two ends of large ones (the footer of a
    parquet file, with the sizes of all its columns, is one)."""
    if not path.is_dir():
        return _digest(path, None)
    digest = hashlib.sha256()
    for file in files_below(path):
        size = file.stat().st_size if file.exists() else -1
        plain = size < 0 or file.suffix.lower() in MEDIA
        whole = size <= LARGE or ANNOTATIONS.search(file.name)
        content = "" if plain else _digest(file, None if whole else ENDS)
        digest.update(f"{os.fsencode(file.relative_to(path)).hex()} {size} {content}\n".encode())
    return digest.hexdigest()


def _digest(file: Path, ends: int | None) -> str:
    """sha256 of a file, or of so many bytes at either end of it."""
    try:
        with file.open("rb") as stream:
            if ends is None:
                return hashlib.file_digest(stream, "sha256").hexdigest()
            digest = hashlib.sha256(stream.read(ends))
            stream.seek(-ends, os.SEEK_END)
            digest.update(stream.read())
            return digest.hexdigest()
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror}); check the path (relative ones start in {Path.cwd()})"
        ) from None


MEDIA = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".dcm"} | {
    *(".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".flv", ".wmv", ".ogv")
}
ANNOTATIONS = re.compile(r"\.(jsonl?|ndjson|csv|tsv|txt)(\.gz)?$", re.IGNORECASE)
LARGE = 1 << 26
ENDS = 1 << 20


def folder_digest(folder: Path) -> str:
    """Over the names, sizes and times of all files, for this machine alone. A picture replaced by another of the same
    size within the same nanosecond goes unseen; all else is seen."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; `images` names the folder below which the pictures lie")
    digest = hashlib.sha256()
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = os.path.join(place, name)
            status = os.stat(path, follow_symlinks=os.path.exists(path))
            record = (os.path.relpath(path, folder), status.st_size, status.st_mtime_ns)
            digest.update(repr(record).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def digest_of(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()


def plain_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:60]
