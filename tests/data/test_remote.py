"""Laws of remote shards: the same samples as beside us, a cache that stays in bounds, nothing wrong taken for right."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest

from mmit.config import ConfigError
from mmit.data import remote
from mmit.data.remote import RemoteError, Stopped, is_remote
from mmit.data.sample import SampleError
from mmit.data.shards import ShardSet, write_shards
from tests.data.pictures import mixed
from tests.data.served import Counting, Ranged, served


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_shards(mixed(), tmp_path_factory.mktemp("there") / "set", samples_per_shard=5)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)


@pytest.fixture
def address(local: ShardSet, request: pytest.FixtureRequest) -> Iterator[str]:
    """The set in the memory of fsspec, where a test may damage it."""
    files, root = fsspec.core.url_to_fs("memory://there/set")
    for path in local.folder.iterdir():
        if path.suffix != ".arrow":
            files.pipe_file(f"{root}/{path.name}", path.read_bytes())
    yield "memory://there/set"
    files.rm(root, recursive=True)


@pytest.fixture(params=[Counting])
def server(local: ShardSet, request: pytest.FixtureRequest) -> Iterator[tuple[str, list[str]]]:
    """The address of the set on a server of this machine, and what it has been asked for."""
    pytest.importorskip("aiohttp", reason="http needs the extra mmit[remote]")
    with served(local.folder.parent, request.param) as (root, asked):
        yield f"{root}/set", asked


def tars(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (cache / "remote" / "tars").iterdir() if path.name != ".lock"}


def equal(shards: ShardSet, local: ShardSet) -> None:
    assert len(shards) == len(local)
    assert shards.fingerprint == local.fingerprint
    for i in np.random.default_rng(0).permutation(len(local)).tolist():
        assert shards.read(i) == local.read(i)
        assert shards.read(i, images=False) == local.read(i, images=False)
        assert shards.where(i) == local.where(i)
        assert shards.image_sizes(i) == local.image_sizes(i)


def test_samples_from_memory_are_those_beside_us(address: str, local: ShardSet, tmp_path: Path) -> None:
    equal(ShardSet(address, cache=tmp_path), local)


def test_samples_from_a_server_are_those_beside_us_and_each_tar_comes_once(
    server: tuple[str, list[str]], local: ShardSet, tmp_path: Path
) -> None:
    equal(ShardSet(server[0] + "/", cache=tmp_path), local)
    equal(ShardSet(server[0], cache=tmp_path), local)
    assert sorted(path for path in server[1] if path.endswith(".tar")) == [f"/set/{name}" for name in local.shard_names]


def test_the_cache_stays_in_bounds_and_what_was_read_last_stays(address: str, local: ShardSet, tmp_path: Path) -> None:
    largest = max((local.folder / name).stat().st_size for name in local.shard_names)
    shards = ShardSet(address, cache=tmp_path, limit=2 * largest)
    for i in (*range(23), *reversed(range(23))):
        assert shards.read(i) == local.read(i)
        assert sum(tars(tmp_path).values()) <= 2 * largest
    assert f"{local.shard_sha256[0]}.tar" in tars(tmp_path)


def test_a_tar_in_use_is_never_removed(address: str, local: ShardSet, tmp_path: Path) -> None:
    sizes = [(local.folder / name).stat().st_size for name in local.shard_names]
    shards = ShardSet(address, cache=tmp_path, limit=sizes[0] + max(sizes[1:]))
    shards.read(0)
    first = tmp_path / "remote" / "tars" / f"{local.shard_sha256[0]}.tar"
    with first.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        for i in range(5, 23):
            assert shards.read(i) == local.read(i)
            assert first.exists(), "though it was read longest ago"
    for i in range(5, 23):
        shards.read(i)
    shards.read(5)
    assert sum(tars(tmp_path).values()) <= sizes[0] + max(sizes[1:])


def test_a_disk_smaller_than_the_bound_bounds_the_cache(
    address: str, local: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max((local.folder / name).stat().st_size for name in local.shard_names)
    room = 2 * largest

    def usage(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(free=room - sum(tars(tmp_path).values()))

    monkeypatch.setattr(remote.shutil, "disk_usage", usage)
    shards = ShardSet(address, cache=tmp_path)
    for i in range(23):
        assert shards.read(i) == local.read(i)
        assert sum(tars(tmp_path).values()) <= room
    room = 700
    with pytest.raises(ConfigError, match=r"shard-000000.tar: .* bytes of it are needed, and .*tars has room for 700;"):
        shards.read(0)


def test_a_disk_that_fills_up_while_a_tar_comes_is_told_as_what_it_is(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardSet(address, cache=tmp_path)
    calls: list[str] = []

    def full(url: str) -> object:
        calls.append(url)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remote, "_file_system", full)
    with pytest.raises(ConfigError, match=r"shard-000000.tar: the `cache` has no room .*No space left on device"):
        shards.read(0)
    assert len(calls) == 1
    assert tars(tmp_path) == {}


def test_a_tar_larger_than_the_bound_is_refused_by_name(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shard-000000.tar: has .* remote_cache_gb"):
        ShardSet(address, cache=tmp_path, limit=100).read(0)


def _read_all(
    address: str, cache: Path, limit: int, seed: int, expected: Path, failed: multiprocessing.SimpleQueue[str]
) -> None:
    try:
        shards, local = ShardSet(address, cache=cache, limit=limit), ShardSet(expected)
        for i in np.random.default_rng(seed).integers(0, len(local), 60).tolist():
            assert shards.read(i) == local.read(i)
    except BaseException as error:
        failed.put(repr(error))


def test_many_processes_share_a_small_cache(server: tuple[str, list[str]], local: ShardSet, tmp_path: Path) -> None:
    largest = max((local.folder / name).stat().st_size for name in local.shard_names)
    context = multiprocessing.get_context("fork")
    failed = context.SimpleQueue()
    readers = [
        context.Process(target=_read_all, args=(server[0], tmp_path, 2 * largest, seed, local.folder, failed))
        for seed in range(4)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
        assert reader.exitcode == 0
    assert failed.empty(), failed.get()
    assert sum(tars(tmp_path).values()) <= 2 * largest
    assert not [name for name in tars(tmp_path) if name.endswith(".part")]


def test_threads_that_want_one_tar_fetch_it_once(
    server: tuple[str, list[str]], local: ShardSet, tmp_path: Path
) -> None:
    shards = ShardSet(server[0], cache=tmp_path)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(shards.read, range(5))) == [local.read(i) for i in range(5)]
    assert len([path for path in server[1] if path.endswith(".tar")]) == 1


def test_what_a_killed_process_left_is_taken_away(address: str, local: ShardSet, tmp_path: Path) -> None:
    folder = tmp_path / "remote" / "tars"
    folder.mkdir(parents=True)
    (folder / f"{local.shard_sha256[1]}-100.part").write_bytes(b"half")
    size = (local.folder / local.shard_names[0]).stat().st_size
    (folder / f"{local.shard_sha256[0]}-{size}.part").write_bytes(b"half of the one we want")
    assert ShardSet(address, cache=tmp_path).read(0) == local.read(0)
    assert list(tars(tmp_path)) == [f"{local.shard_sha256[0]}.tar"]


def test_a_cut_file_in_the_cache_is_fetched_again(address: str, local: ShardSet, tmp_path: Path) -> None:
    ShardSet(address, cache=tmp_path).read(0)
    os.truncate(tmp_path / "remote" / "tars" / f"{local.shard_sha256[0]}.tar", 700)
    assert ShardSet(address, cache=tmp_path).read(0) == local.read(0)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda data: data[:-1024], "has .* bytes, index.json says"),
        (lambda data: data[:600] + bytes([data[600] ^ 1]) + data[601:], "its sha256 is not the one"),
        (lambda data: None, "is not there"),
    ],
)
@pytest.mark.parametrize("name", ["shard-000001.tar", "samples.parquet"])
def test_a_broken_or_changed_file_is_named_and_refused(
    address: str, local: ShardSet, tmp_path: Path, name: str, damage: object, text: str
) -> None:
    files, root = fsspec.core.url_to_fs(address)
    data = damage(files.cat_file(f"{root}/{name}"))  # type: ignore[operator]
    files.rm(f"{root}/{name}")
    if data is not None:
        files.pipe_file(f"{root}/{name}", data)
    with pytest.raises(RemoteError, match=rf"memory://there/set/{name}: .*{text}"):
        ShardSet(address, cache=tmp_path).read(7)
    left = [path.name for path in tmp_path.rglob("*.part") if path.parent.name == "tars"]
    assert left == []


def test_an_index_that_names_a_path_as_hash_is_refused(address: str, tmp_path: Path) -> None:
    files, root = fsspec.core.url_to_fs(address)
    record = json.loads(files.cat_file(f"{root}/index.json"))
    record["shards"][0]["sha256"] = "../../escaped"
    files.pipe_file(f"{root}/index.json", json.dumps(record).encode())
    with pytest.raises(SampleError, match="damaged"):
        ShardSet(address, cache=tmp_path)


def test_a_network_that_fails_once_is_asked_again(
    address: str, local: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = remote._file_system
    calls: list[str] = []

    def failing(url: str) -> object:
        calls.append(url)
        if len(calls) % 2:
            raise ConnectionResetError("reset by peer")
        return found(url)

    monkeypatch.setattr(remote, "_file_system", failing)
    equal(ShardSet(address, cache=tmp_path), local)
    monkeypatch.setattr(remote, "_file_system", lambda url: 1 / 0)
    with pytest.raises(RemoteError, match=r"memory://there/set/index.json: cannot be fetched after 4 attempts"):
        ShardSet(address, cache=tmp_path)


def test_whoever_is_stopped_while_a_file_is_fetched_does_not_ask_again(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def stopping(url: str) -> object:
        calls.append(url)
        raise Stopped

    shards = ShardSet(address, cache=tmp_path)
    monkeypatch.setattr(remote, "_file_system", stopping)
    with pytest.raises(Stopped):
        shards.read(0)
    assert len(calls) == 1
    assert tars(tmp_path) == {}


@pytest.mark.parametrize("text", ["nonsense://x/set", "http://127.0.0.1:9/set"])
def test_addresses_that_lead_nowhere_are_named(text: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, RemoteError), match=text):
        ShardSet(text, cache=tmp_path)


def test_folders_are_no_addresses() -> None:
    assert not any(is_remote(text) for text in ("data/set", "/data/set", "C:set", Path("s3://x")))
    assert all(is_remote(text) for text in ("s3://b/set", "gs://b/x", "memory://x", "http://h/x"))


# A few samples of large tars --------------------------------------------------------------


@pytest.fixture
def large_tars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking costs nothing, as it does beside a gigabyte."""
    monkeypatch.setattr("mmit.data.shards.REQUEST", 0)


@pytest.mark.parametrize("server", [Ranged], indirect=True)
def test_a_few_samples_come_without_their_tars_and_once(
    server: tuple[str, list[str]], local: ShardSet, tmp_path: Path, large_tars: None
) -> None:
    wanted = [1, 8, 22]
    few = ShardSet(server[0], cache=tmp_path).for_few(wanted)
    for _ in range(2):
        for i in wanted:
            assert few.read(i) == local.read(i)
            assert few.read(i, images=False) == local.read(i, images=False)
    sizes = [f"/set/{local.shard_names[local.shard_of(i)[0]]} {local._value('bytes', i)}" for i in wanted]
    assert [line for line in server[1] if ".tar" in line] == sizes


def test_a_few_samples_from_memory_are_those_beside_us(
    address: str, local: ShardSet, tmp_path: Path, large_tars: None
) -> None:
    few = ShardSet(address, cache=tmp_path).for_few([3, 17])
    assert [few.read(i) for i in (3, 17)] == [local.read(i) for i in (3, 17)]
    assert not [name for name in tars(tmp_path) if name.endswith(".tar")]


def test_a_few_samples_are_read_from_a_tar_that_is_here(
    address: str, local: ShardSet, tmp_path: Path, large_tars: None
) -> None:
    shards = ShardSet(address, cache=tmp_path)
    shards.read(0)
    assert shards.for_few([1]).read(1) == local.read(1)
    assert list(tars(tmp_path)) == [f"{local.shard_sha256[0]}.tar"]


def test_of_a_server_without_ranges_the_tars_come_once_for_a_few_samples(
    server: tuple[str, list[str]], local: ShardSet, tmp_path: Path, large_tars: None
) -> None:
    wanted = [1, 8, 12, 22]
    largest = max((local.folder / name).stat().st_size for name in local.shard_names)
    few = ShardSet(server[0], cache=tmp_path, limit=2 * largest).for_few(wanted)
    for _ in range(3):
        assert [few.read(i) for i in wanted] == [local.read(i) for i in wanted]
    whole = [path for path in server[1] if path.endswith(".tar")]
    assert {path: whole.count(path) for path in whole} == {
        f"/set/{local.shard_names[local.shard_of(i)[0]]}": 2 for i in wanted
    }, "once for the range, whose answer is left unread, and once whole"


def test_a_tar_of_which_much_is_read_comes_whole(
    address: str, local: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max((local.folder / name).stat().st_size for name in local.shard_names)
    monkeypatch.setattr("mmit.data.shards.REQUEST", largest // 4)
    few = ShardSet(address, cache=tmp_path).for_few([1, *range(5, 10)])
    assert [few.read(i) for i in (1, 5, 9)] == [local.read(i) for i in (1, 5, 9)]
    assert sorted(name.partition(".")[2] for name in tars(tmp_path)) == ["bytes", "tar"]


def test_what_is_kept_of_a_few_samples_stays_in_bounds(
    address: str, local: ShardSet, tmp_path: Path, large_tars: None
) -> None:
    largest = max(local._value("bytes", i) for i in range(23))
    few = ShardSet(address, cache=tmp_path, limit=2 * largest).for_few([2, 9, 14, 21])
    for i in (2, 9, 14, 21, 2):
        assert few.read(i) == local.read(i)
        assert sum(tars(tmp_path).values()) <= 2 * largest


@pytest.mark.parametrize("place", ["picture", "text", "end"])
def test_a_few_samples_that_are_not_what_was_indexed_are_refused(
    address: str, local: ShardSet, tmp_path: Path, large_tars: None, place: str
) -> None:
    files, root = fsspec.core.url_to_fs(address)
    path = f"{root}/{local.shard_names[0]}"
    data = bytearray(files.cat_file(path))
    i = next(i for i in range(5) if local.image_sizes(i))
    start, size, text = (local._value(column, i) for column in ("offset", "bytes", "json_bytes"))
    if place == "picture":
        data[start + size - 512] ^= 1
    elif place == "text":
        data[start + 512 + text // 2] = 0
    else:
        del data[-512:]
    files.pipe_file(path, bytes(data))
    few = ShardSet(address, cache=tmp_path).for_few([i])
    with pytest.raises(RemoteError, match=rf"set/{local.shard_names[0]}: .*copy the set again"):
        few.read(i)
    assert tars(tmp_path) == {}
