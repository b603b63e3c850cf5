"""Shards that lie elsewhere: their index fetched at once, each tar when it is first read, into a bounded cache.

A tar is kept under its sha256, so it is the right one whatever the server says of it, and sets share equal tars. Of a
tar from which little is read, only that is fetched and kept, checked by whoever knows what must stand there. Every
process of a machine may use the cache at once: who reads a file or fetches it holds a lock on it, and only files that
nobody holds are removed, those first that were read longest ago.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from mmit.config import ConfigError
from mmit.data.files import FULL
from mmit.data.sample import SampleError
from mmit.data.shard_index import INDEX, REMEDY, SAMPLES, ShardEntry, file_sha256, index_of, read_index

T = TypeVar("T")
LIMIT = 100 * 10**9
"""Bytes of tars kept, if nobody says otherwise."""
STRETCHES_STAY = 86400.0
"""Seconds that stretches of tars stay longer than tars: little room gone for what every evaluation reads again, while
the training between them may read more tars than there is room for."""
ATTEMPTS = 4
FIRST_PAUSE = 0.5
"""Seconds before the second attempt; doubled before each further one."""


class Stopped(BaseException):
    """A signal has asked for the end while something was waited for.

    No Exception, as KeyboardInterrupt is none: it arrives in the middle of loaders and servers' libraries, which take
    any for a fault of their files or of the network.
    """


class RemoteError(SampleError):
    """A shard that could not be fetched as it should be: a fault of the set, never a bad sample to be skipped."""


def is_remote(address: str | Path) -> bool:
    """Whether this is an address such as `s3://bucket/set` and not a folder of this machine."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(address)) is not None


def fetch_index(address: str, cache: Path) -> Path:
    """A folder with `index.json` as it is there now, and its `samples.parquet`.

    Another index gives another folder, so what an open set reads never changes under it.
    """
    raw = _again(f"{address}/{INDEX}", lambda files, path: files.cat_file(path))
    index = index_of(raw, f"{address}/{INDEX}")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", title(address))
    folder = cache / "remote" / "sets" / f"{name}-{hashlib.sha256(address.encode() + raw).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / ".lock"):
        parquet = folder / SAMPLES
        if not (parquet.is_file() and file_sha256(parquet) == index.samples_sha256):
            part = folder / f"{SAMPLES}.part"
            _download(f"{address}/{SAMPLES}", part, index.samples_bytes, index.samples_sha256)
            os.replace(part, parquet)
        part = folder / f"{INDEX}.part"
        part.write_bytes(raw)
        os.replace(part, folder / INDEX)
    read_index(folder)
    return folder


def title(address: str) -> str:
    return address.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class _Kept:
    """A file of the cache: a tar, or a stretch of one."""

    url: str
    """Of the tar."""
    name: str
    ending: str
    bytes: int
    fetch: Callable[[Path], object]
    """Makes the file, as it should be, or raises."""


@dataclass(frozen=True)
class RemoteTars:
    """The tars of one set, by their numbers."""

    address: str
    entries: Sequence[ShardEntry]
    cache: Path
    limit: int = LIMIT

    @property
    def folder(self) -> Path:
        return self.cache / "remote" / "tars"

    def read(self, number: int, size: int, offset: int) -> bytes:
        """Bytes of tar `number`, fetched now if it is not here; fewer only if the tar ends before."""
        with self._held(self._tar(number)) as descriptor:
            return os.pread(descriptor, size, offset)

    def read_alone(self, number: int, size: int, offset: int, check: Callable[[bytes], None]) -> bytes:
        """The same of a tar that need not come for it: where it is not here, these bytes alone are fetched and kept.

        What comes is held to the size of the tar and to `check`, which raises `SampleError` for what is not right.
        """
        tar = self._tar(number)
        alone = _Kept(
            tar.url,
            f"{tar.name}-{offset}",
            "bytes",
            size,
            lambda target: target.write_bytes(_range(tar.url, tar.bytes, offset, size, check)),
        )
        if not self._path(alone).exists() and (descriptor := self._opened(tar)) is not None:
            try:
                return os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)
        try:
            with self._held(alone) as descriptor:
                return os.pread(descriptor, size, 0)
        except _WholeOnly:
            found = self.read(number, size, offset)
        with self._held(replace(alone, fetch=lambda target: target.write_bytes(found))):
            return found

    def _tar(self, number: int) -> _Kept:
        entry = self.entries[number]
        url = f"{self.address}/{entry.name}"
        return _Kept(
            url, entry.sha256, "tar", entry.bytes, lambda target: _download(url, target, entry.bytes, entry.sha256)
        )

    @contextmanager
    def _held(self, kept: _Kept) -> Iterator[int]:
        """The file opened under a shared lock, which keeps it from being removed."""
        descriptor = self._opened(kept)
        if descriptor is None:
            descriptor = self._fetched(kept)
        try:
            os.utime(descriptor)
            yield descriptor
        finally:
            os.close(descriptor)

    def _opened(self, kept: _Kept) -> int | None:
        path = self._path(kept)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        status = os.fstat(descriptor)
        if status.st_nlink and status.st_size == kept.bytes:
            return descriptor
        if status.st_nlink:  # somebody else cut it: fetch it again
            path.unlink(missing_ok=True)
        os.close(descriptor)
        return None

    def _fetched(self, kept: _Kept) -> int:
        """The file fetched by this process, or by another that is at it already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            part = self._reserve(kept)
            if part is not None:
                try:
                    path = self._path(kept, part=True)
                    kept.fetch(path)
                    os.replace(path, self._path(kept))
                except BaseException:
                    with suppress(FileNotFoundError):
                        os.unlink(self._path(kept, part=True))
                    os.close(part)
                    raise
                fcntl.flock(part, fcntl.LOCK_SH)
                return part
            descriptor = self._opened(kept)
            if descriptor is not None:
                return descriptor
            time.sleep(0.05)

    def _reserve(self, kept: _Kept) -> int | None:
        """An empty locked file that stands for the bytes to come; None if another process came first or room lacks."""
        if kept.bytes > self.limit:
            raise ConfigError(
                f"{kept.url}: has {kept.bytes:,} bytes, remote_cache_gb allows {self.limit:,} for "
                f"all tars; raise it, or convert with fewer rows_per_shard"
            )
        with _locked(self.folder / ".lock"):
            path = self._path(kept, part=True)
            if self._path(kept).exists() or (path.exists() and not _abandoned(path)):
                return None
            if not self._make_room(kept):
                return None
            part = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(part, fcntl.LOCK_EX)
            return part

    def _make_room(self, kept: _Kept) -> bool:
        """Whether the file is within the limit and on the disk, after removing files that nobody reads."""
        size, free, taken, files = kept.bytes, shutil.disk_usage(self.folder).free, 0, []
        for path in self.folder.iterdir():
            # What is being fetched counts with the size it will have, which its name tells.
            whole = int(path.stem.rpartition("-")[2]) if path.suffix == ".part" else 0
            try:
                status = path.stat()
            except FileNotFoundError:
                taken += whole  # it has just become a tar
                continue
            if path.suffix == ".part":
                gone = _abandoned(path)
                taken += 0 if gone else whole
                free += status.st_size - (0 if gone else whole)
            elif path.suffix in (".tar", ".bytes"):
                taken += status.st_size
                longer = STRETCHES_STAY if path.suffix == ".bytes" else 0
                files.append((status.st_mtime + longer, status.st_size, path))
        for _, bytes_, path in sorted(files):
            if taken + size <= self.limit and size <= free:
                break
            if _abandoned(path):
                taken, free = taken - bytes_, free + bytes_
        if taken == 0 and free < size:
            raise ConfigError(
                f"{kept.url}: {size:,} bytes of it are needed, and {self.folder} has room for {free:,}; make room, or "
                f"name another `cache`"
            )
        return taken + size <= self.limit and size <= free

    def _path(self, kept: _Kept, *, part: bool = False) -> Path:
        return self.folder / (f"{kept.name}-{kept.bytes}.part" if part else f"{kept.name}.{kept.ending}")


def _abandoned(path: Path) -> bool:
    """Removes a file that no process holds, and says whether it did."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(url: str, target: Path, size: int, sha256: str) -> None:
    """The file at `url`, complete and with this hash, or `RemoteError`."""

    def once(files: Any, path: str) -> None:
        files.get_file(path, str(target))
        found = target.stat().st_size
        if found != size:
            raise _Wrong(f"has {found:,} bytes, {INDEX} says {size:,}")
        if file_sha256(target) != sha256:
            raise _Wrong(f"its sha256 is not the one in {INDEX}")

    _again(url, once)


def _range(url: str, whole: int, offset: int, size: int, check: Callable[[bytes], None]) -> bytes:
    """Bytes of the file at `url`, which must have `whole` of them, or `RemoteError` if they do not pass the check.

    `_WholeOnly` for a server that gives whole files alone.
    """

    def once(files: Any, path: str) -> bytes:
        with files.open(path, "rb", cache_type="none") as file:
            try:
                file.seek(0, os.SEEK_END)
                if (there := file.tell()) != whole:
                    raise _Wrong(f"has {there:,} bytes, {INDEX} says {whole:,}")
                file.seek(offset)
                found = file.read(size)
            except ValueError:
                raise _WholeOnly from None
        if len(found) != size:
            raise _Wrong(f"gives {len(found):,} of the {size:,} bytes from byte {offset:,} on")
        try:
            check(found)
        except SampleError as error:
            raise _Wrong(str(error).removesuffix(f"; {REMEDY}")) from None
        return found

    return _again(url, once)


class _WholeOnly(Exception):
    """A server that gives no part of a file."""


class _Wrong(Exception):
    """What came is not what the index says."""


def _again(url: str, action: Callable[[Any, str], T]) -> T:
    """What `action` gives for the file system and path of `url`, tried a few times, for networks fail."""
    problem: Exception | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
        try:
            # Made anew in each process that comes here: after a fork, an event loop of the parent would hang.
            return action(*_file_system(url))
        except FileNotFoundError:
            raise RemoteError(
                f"{url}: is not there; name the folder that `mmit-data convert` wrote, copied whole, {INDEX} last"
            ) from None
        except (ConfigError, SampleError, _WholeOnly):
            raise
        except _Wrong as error:
            if isinstance(problem, _Wrong):
                break
            problem = error
        except OSError as error:
            if error.errno in FULL:
                raise ConfigError(f"{url}: the `cache` has no room ({error}); make some, or name another") from None
            problem = error
        except Exception as error:  # the client of every store has errors of its own
            problem = error
    if isinstance(problem, _Wrong):
        raise RemoteError(
            f"{url}: {problem}; the copy there was changed or cut after its index was written: copy the set again"
        )
    raise RemoteError(f"{url}: cannot be fetched after {ATTEMPTS} attempts ({type(problem).__name__}: {problem})")


def _file_system(url: str) -> tuple[Any, str]:
    options: dict[str, Any] = {}
    try:
        if url.startswith(("http://", "https://")):
            import aiohttp

            # No limit for the whole file: the default of five minutes would cut large tars off.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
            options = {"client_kwargs": {"timeout": timeout}}
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise ConfigError(f"{url}: {error}; for http and https: pip install 'mmit[remote]'") from None
    except ValueError as error:
        raise ConfigError(f"{url}: {error}; write a folder, or an address such as s3://bucket/set") from None
