"""Laws of the record cache: what it gives is what was put or None, whoever writes, whenever they are killed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmit.data.cache import RecordCache, cache_folder

RECORDS = {b"a": b"first", b"": b"under an empty key", b"empty": b"", b"\x00\xff" * 9: bytes(range(256)), b"z": b"last"}
fork = multiprocessing.get_context("fork")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "records"


def filled(file: Path) -> RecordCache:
    cache = RecordCache(file)
    for key, value in RECORDS.items():
        cache.put(key, value)
    return cache


def in_child(work: Callable[[], None]) -> None:
    child = fork.Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_what_is_put_is_what_is_got_also_by_another_that_opened_before(file: Path) -> None:
    early = RecordCache(file)
    assert early.get(b"a") is None
    cache = filled(file)
    for reader in (cache, early, RecordCache(file)):
        assert {key: reader.get(key) for key in RECORDS} == RECORDS
        assert reader.get(b"unknown") is None


def test_the_first_value_stays(file: Path) -> None:
    first, second = RecordCache(file), RecordCache(file)
    first.put(b"key", b"first")
    size = file.stat().st_size
    second.put(b"key", b"second")
    assert first.get(b"key") == second.get(b"key") == b"first"
    assert file.stat().st_size == size


def test_a_file_cut_at_any_byte_gives_whole_records_or_none_and_takes_new_ones(file: Path) -> None:
    filled(file)
    whole = file.read_bytes()
    lost = []
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        cache = RecordCache(file)
        found = {key: cache.get(key) for key in RECORDS}
        assert all(found[key] in (None, value) for key, value in RECORDS.items())
        lost.append(sum(value is None for value in found.values()))
        cache.put(b"new", b"after the cut")
        for key, value in RECORDS.items():
            cache.put(key, value)
        assert {key: RecordCache(file).get(key) for key in RECORDS} == RECORDS
        assert RecordCache(file).get(b"new") == b"after the cut"
    assert lost == sorted(lost, reverse=True)
    assert set(lost) == {1, 2, 3, 4, 5}


def test_any_damaged_byte_or_garbage_at_the_end_never_gives_a_wrong_value(file: Path) -> None:
    filled(file)
    whole = file.read_bytes()
    chance = random.Random(0)
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << chance.randrange(8))]) + whole[place + 1 :])
        cache = RecordCache(file)
        assert all(cache.get(key) in (None, value) for key, value in RECORDS.items())
    for tail in (b"mmr1", b"mmr1" + b"\0" * 12, whole[:20], *(chance.randbytes(n) for n in (1, 15, 16, 17, 400))):
        file.write_bytes(whole + tail)
        cache = RecordCache(file)
        cache.put(b"new", b"value")
        for reader in (cache, RecordCache(file)):
            assert {key: reader.get(key) for key in RECORDS} == RECORDS
            assert reader.get(b"new") == b"value"


def test_a_file_that_shrinks_vanishes_or_changes_while_open_never_gives_a_wrong_value(file: Path) -> None:
    whole = filled(file) and file.read_bytes()
    for damage in range(len(whole)):
        file.write_bytes(whole)
        cache = RecordCache(file)
        assert {key: cache.get(key) for key in RECORDS} == RECORDS
        if damage % 2:
            file.write_bytes(whole[:damage])
        else:
            file.write_bytes(whole[:damage] + bytes([whole[damage] ^ 1]) + whole[damage + 1 :])
        assert all(cache.get(key) in (None, value) for key, value in RECORDS.items())
        for key, value in RECORDS.items():
            cache.put(key, value)
        assert {key: cache.get(key) for key in RECORDS} == RECORDS
        assert all(RecordCache(file).get(key) in (None, value) for key, value in RECORDS.items())
    file.write_bytes(whole)
    cache = RecordCache(file)
    assert cache.get(b"a") == b"first"
    file.unlink()
    cache.put(b"other", b"value")
    assert cache.get(b"a") in (None, b"first")
    assert RecordCache(file).get(b"other") == b"value"


def test_several_processes_that_put_at_once_lose_nothing(file: Path) -> None:
    shared = RecordCache(file)
    shared.put(b"before the fork", b"0")

    def put_many(writer: int) -> None:
        for n in range(60):
            shared.put(f"own {writer} {n}".encode(), bytes([writer, n]) * (n * 7))
            shared.put(f"common {n}".encode(), f"value {n}".encode() * n)

    children = [fork.Process(target=put_many, args=(writer,)) for writer in range(4)]
    for child in children:
        child.start()
    put_many(4)
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    for reader in (shared, RecordCache(file)):
        assert reader.get(b"before the fork") == b"0"
        for n in range(60):
            assert reader.get(f"common {n}".encode()) == f"value {n}".encode() * n
            for writer in range(5):
                assert reader.get(f"own {writer} {n}".encode()) == bytes([writer, n]) * (n * 7)


def test_a_writer_killed_anywhere_leaves_whole_values_and_a_free_file(file: Path) -> None:
    def put_for_ever() -> None:
        cache = RecordCache(file)
        for n in range(10**9):
            cache.put(f"{n}".encode(), f"{n}".encode() * 999)

    for round_number in range(5):
        child = fork.Process(target=put_for_ever)
        child.start()
        time.sleep(0.02 + 0.01 * round_number)
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join(60)
        cache = RecordCache(file)
        cache.put(f"after {round_number}".encode(), b"x")
        kept = [n for n in range(2000) if cache.get(f"{n}".encode()) is not None]
        assert kept == list(range(len(kept)))
        assert all(cache.get(f"{n}".encode()) == f"{n}".encode() * 999 for n in kept)


def test_a_pickled_cache_reads_and_writes_the_same_file(file: Path) -> None:
    cache = filled(file)
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.get(b"a") == b"first"
    copy.put(b"new", b"value")
    assert cache.get(b"new") == b"value"


def test_more_caches_than_a_process_may_open_files(tmp_path: Path) -> None:
    """A set has a cache a shard, and a worker of a large set meets them all: `ulimit -n` is often 1024."""
    caches = [RecordCache(tmp_path / f"{n}") for n in range(100)]
    for cache in caches:
        cache.put(b"key", b"value")

    def meet_all() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        for cache in caches:
            assert cache.get(b"key") == b"value"
            cache.put(b"other", b"value")

    in_child(meet_all)


def test_the_folder_is_the_one_configured_else_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMIT_CACHE", "/environment")
    assert cache_folder("/configured") == Path("/configured")
    assert cache_folder(None) == Path("/environment")
    monkeypatch.delenv("MMIT_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder(None) == Path("/home/somebody/.cache/mmit")


def test_on_a_full_disk_nothing_more_is_kept_and_nothing_fails(tmp_path: Path) -> None:
    cache = RecordCache(tmp_path / "records")
    cache.put(b"first", b"1" * 500)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, limits[1]))
    try:
        for _ in range(2):
            cache.put(b"second", b"2" * 500)
            assert cache.get(b"second") is None
            assert cache.get(b"first") == b"1" * 500
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    cache.put(b"second", b"2" * 500)
    assert RecordCache(tmp_path / "records").get(b"second") == b"2" * 500
