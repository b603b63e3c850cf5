"""Laws of shards: same bytes, whole or refused, read by others, no key or tar can lead outside."""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.compat import WebDataset

from mmit.data.sample import Sample, SampleError
from mmit.data.shard_index import WrittenShard
from mmit.data.shard_writer import KEY, ShardWriter, member_header, shard_name, stored, write_index, write_shard
from mmit.data.shards import ShardSet, verify, write_shards
from tests.data.pictures import PICTURES, mixed, picture, sample


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_shards(mixed(), tmp_path_factory.mktemp("written") / "set", samples_per_shard=5)


@pytest.fixture
def copy(written: ShardSet, tmp_path: Path) -> Path:
    """A shard set that a test may damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in written.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix != ".arrow"
    }


# Writing ------------------------------------------------------------------------------------------------------------


def test_same_samples_give_the_same_bytes_also_in_another_process(written: ShardSet, tmp_path: Path) -> None:
    write_shards(iter(mixed()), tmp_path / "again", samples_per_shard=5)
    assert contents(tmp_path / "again") == contents(written.folder)
    program = (
        "import sys; from pathlib import Path; from mmit.data.shards import write_shards;"
        "from tests.data.pictures import mixed; write_shards(mixed(), Path(sys.argv[1]), samples_per_shard=5)"
    )
    elsewhere = {**os.environ, "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "other")], check=True, env=elsewhere)
    assert contents(tmp_path / "other") == contents(written.folder)


def test_shards_written_apart_and_indexed_once_are_the_same_set(written: ShardSet, tmp_path: Path) -> None:
    samples = mixed()

    def parts() -> Iterator[WrittenShard]:
        finished = {n: write_shard(tmp_path / shard_name(n), samples[n * 5 : n * 5 + 5]) for n in (3, 0, 4, 2, 1)}
        for n in sorted(finished):
            yield finished[n]

    write_index(tmp_path, parts())
    assert contents(tmp_path) == contents(written.folder)


def test_what_is_read_is_what_was_written(written: ShardSet) -> None:
    samples = mixed()
    assert len(written) == len(samples)
    for i in np.random.default_rng(0).permutation(len(samples)).tolist():
        expected = samples[i]
        assert written.read(i) == expected
        assert written.read(i, images=False) == replace(
            expected, images=tuple(replace(image, data=None) for image in expected.images)
        )
        assert written.image_sizes(i) == [(image.width, image.height) for image in expected.images]
        assert written.picture_hashes(i) == [image.sha256 for image in expected.images]
        assert (written.key(i), written.source(i), written.meta(i)) == (expected.key, expected.source, expected.meta)
        assert written.characters(i) == sum(len(item.text) for item in expected.messages)
        assert written.where(i) == f"set/shard-{i // 5:06d}.tar:{expected.key}"
        assert written.shard_of(i) == (i // 5, i % 5)
    assert written.shard_sizes == [5, 5, 5, 5, 3]
    assert list(written.verify()) == []


def test_numbers_beyond_the_set_are_index_errors(written: ShardSet) -> None:
    for i in (-1, len(written)):
        with pytest.raises(IndexError, match="of 23"):
            written.read(i)


def test_tars_say_nothing_of_who_wrote_them_when_and_where(written: ShardSet) -> None:
    with tarfile.open(written.folder / "shard-000000.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members][:4] == ["k00000.json", "k00001.json", "k00001.0.jpg", "k00002.json"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


@given(st.from_regex(KEY, fullmatch=True), st.integers(0, 8**11 - 1))
@settings(max_examples=200, deadline=None)
def test_headers_are_those_of_tarfile(key: str, size: int) -> None:
    member = tarfile.TarInfo(f"{key}.0.jpg")
    member.size, member.mode = size, 0o644
    assert member_header(member.name, size) == member.tobuf(tarfile.USTAR_FORMAT)


def test_stored_samples_are_written_to_the_same_bytes_and_not_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_shard(tmp_path / "a.tar", mixed())
    ready = [stored(item, "") for item in mixed()]
    for name in ("check", "checked", "to_json"):
        monkeypatch.setattr(f"mmit.data.shard_writer.{name}", lambda *_: pytest.fail("checked again"))
    second = write_shard(tmp_path / "b.tar", ready)
    assert (first.entry.sha256, first.rows) == (second.entry.sha256, second.rows)


def test_a_row_without_a_sample_leaves_its_place_empty(tmp_path: Path) -> None:
    samples = mixed(12)
    with ShardWriter(tmp_path, samples_per_shard=4) as writer:
        for n, item in enumerate(samples):
            if n in (1, 4, 5, 6, 7):
                writer.skip()
            else:
                writer.write(item)
    shards = ShardSet(tmp_path)
    assert shards.shard_sizes == [3, 0, 4]
    assert [shards.key(i) for i in range(len(shards))] == [samples[n].key for n in (0, 2, 3, 8, 9, 10, 11)]
    assert [shards.shard_of(i) for i in (2, 3)] == [(0, 2), (2, 0)]
    assert list(shards.verify()) == []


def test_a_set_without_samples_works(tmp_path: Path) -> None:
    shards = write_shards([], tmp_path)
    assert len(shards) == len(shards.picture_groups()) == len(shards.meta_groups("any")) == 0
    assert list(shards.verify()) == []


@pytest.mark.parametrize(
    "key", ["", ".", "..", "a.b", "a/b", "/etc/x", "../x", "a\\b", "-rf", "a b", "a\n", "a\0", "ключ", "k" * 81, "C:x"]
)
def test_keys_that_could_name_something_else_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(SampleError, match="letters, digits"):
        write_shards([replace(sample(0), key=key)], tmp_path / "set")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "UNFINISHED"]


@given(key=st.text(max_size=90))
@settings(max_examples=150, deadline=None)
def test_any_key_is_refused_or_read_back(tmp_path_factory: pytest.TempPathFactory, key: str) -> None:
    path = tmp_path_factory.mktemp("keys") / "shard-000000.tar"
    try:
        write_shard(path, [replace(sample(0), key=key)])
    except SampleError:
        assert not path.exists()
    else:
        with tarfile.open(path) as tar:
            assert tar.getnames() == [f"{key}.json"]


def test_pictures_that_are_not_what_they_say_are_refused(tmp_path: Path) -> None:
    good = PICTURES[0]
    wrong = {
        "has no bytes": replace(good, data=None),
        "sha256": replace(good, sha256="0" * 64),
        "pixels, the sample says": replace(good, width=5),
        "ending": replace(good, ending="jpg"),
    }
    for number, (text, image) in enumerate(wrong.items()):
        with pytest.raises(SampleError, match=rf"shard-000000.tar:k00000: picture 0: .*{text}"):
            write_shards([sample(0, image)], tmp_path / str(number))


def test_two_samples_of_one_key_or_broken_unicode_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="two samples"):
        write_shards([sample(1), sample(1)], tmp_path / "twice")
    with pytest.raises(SampleError, match="half of a character"):
        write_shards([sample(1, text="\ud83d")], tmp_path / "half")


def test_a_failed_writing_leaves_no_set_and_can_be_repeated(written: ShardSet, tmp_path: Path) -> None:
    folder = tmp_path / "set"

    def failing() -> Iterator[Sample]:
        yield from mixed(12)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(failing(), folder, samples_per_shard=2)
    assert not list(folder.glob("*.tmp"))
    with pytest.raises(SampleError, match="writing was not finished"):
        ShardSet(folder)
    write_shards(mixed(), folder, samples_per_shard=5)
    assert contents(folder) == contents(written.folder)


def test_what_a_killed_writer_left_gives_way_to_the_next(written: ShardSet, tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from mmit.data.shards import ShardWriter;"
        "from tests.data.pictures import mixed; writer = ShardWriter(Path(sys.argv[1]), samples_per_shard=1);"
        "[writer.write(item) for item in mixed(9)]; os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "shard-000008.tar").exists()
    with pytest.raises(SampleError, match="writing was not finished"):
        ShardSet(tmp_path)
    write_shards(mixed(), tmp_path, samples_per_shard=5)
    assert contents(tmp_path) == contents(written.folder)


def test_a_finished_set_is_overwritten_only_on_purpose(tmp_path: Path, written: ShardSet) -> None:
    write_shards(mixed(9), tmp_path, samples_per_shard=1)
    with pytest.raises(SampleError, match="already holds a finished shard set"):
        write_shards(mixed(), tmp_path)
    write_shards(mixed(), tmp_path, samples_per_shard=5, overwrite=True)
    assert contents(tmp_path) == contents(written.folder)


@pytest.mark.parametrize("name", ["shard-000000.tar", "cc3m.tar"])
def test_tars_of_others_are_never_removed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(SampleError, match=f"holds {name}, which is not ours to remove"):
        write_shards(mixed(), tmp_path, overwrite=True)
    (tmp_path / name).rename(tmp_path / "kept")
    write_shards(mixed(), tmp_path)
    (tmp_path / "kept").rename(tmp_path / "other.tar")
    with pytest.raises(SampleError, match=r"holds other.tar, which is not ours to remove"):
        write_shards(mixed(), tmp_path, overwrite=True)
    assert (tmp_path / "other.tar").read_bytes() == b"precious"
    assert len(ShardSet(tmp_path)) == 23


# Other readers ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves closing to the collector
def test_webdataset_reads_the_same_samples_and_bytes(written: ShardSet) -> None:
    urls = [str(written.folder / name) for name in written.shard_names]
    read = list(WebDataset(urls, shardshuffle=False, empty_check=False))
    gc.collect()
    assert len(read) == len(written)
    for i, found in enumerate(read):
        ours = written.read(i)
        assert found["__key__"] == ours.key
        assert json.loads(found["json"])["key"] == ours.key
        assert [found[f"{n}.{image.ending}"] for n, image in enumerate(ours.images)] == [x.data for x in ours.images]


def test_datasets_reads_the_same_samples_and_bytes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra mmit[hub]")
    # One kind of sample: `datasets` wants the same members in all samples.
    samples = [sample(n, PICTURES[0], PICTURES[1], group="x") for n in range(7)]
    ours = write_shards(samples, tmp_path / "set", samples_per_shard=3)
    loaded = datasets.load_dataset(
        "webdataset",
        data_files={"train": [str(ours.folder / name) for name in ours.shard_names]},
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert isinstance(loaded, datasets.Dataset)
    for column in ("0.png", "1.jpg"):
        loaded = loaded.cast_column(column, datasets.Image(decode=False))
    rows = loaded.to_list()
    assert [row["__key__"] for row in rows] == [item.key for item in samples]
    for row, item in zip(rows, samples, strict=True):
        assert [row["0.png"]["bytes"], row["1.jpg"]["bytes"]] == [image.data for image in item.images]


# Damage -------------------------------------------------------------------------------------------------------------


def test_a_tar_cut_anywhere_is_refused_by_name(copy: Path) -> None:
    random = np.random.default_rng(3)
    for name in ("shard-000001.tar", "shard-000004.tar"):
        whole = (copy / name).read_bytes()
        for length in [0, len(whole) - 1, *random.integers(0, len(whole), 60).tolist()]:
            (copy / name).write_bytes(whole[:length])
            with pytest.raises(SampleError, match=name):
                ShardSet(copy)
            assert any(name in str(fault) for fault in verify(copy))
        (copy / name).write_bytes(whole)
    assert list(verify(copy)) == []


def test_a_tar_cut_while_open_is_named_when_read(copy: Path) -> None:
    shards = ShardSet(copy)
    os.truncate(copy / "shard-000000.tar", 1000)
    with pytest.raises(SampleError, match=r"copy/shard-000000.tar:k00002: the tar ends"):
        shards.read(2)


def test_any_changed_byte_is_found_by_verify(copy: Path) -> None:
    random = np.random.default_rng(4)
    path = copy / "shard-000002.tar"
    whole = path.read_bytes()
    for place in random.integers(0, len(whole), 40).tolist():
        changed = bytearray(whole)
        changed[place] ^= int(random.integers(1, 256))
        path.write_bytes(changed)
        assert any("shard-000002.tar: its sha256" in str(fault) for fault in verify(copy))


def test_a_damaged_table_is_found_by_verify_though_a_mapped_copy_lies_beside_it(copy: Path) -> None:
    assert list(verify(copy)) == []
    (mapped,) = copy.glob("*.arrow")
    path = copy / "samples.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    assert [fault.where for fault in verify(copy)] == [str(path)]
    path.unlink()
    assert [fault.where for fault in verify(copy)] == [str(path)]
    path.write_bytes(whole)
    content = mapped.read_bytes()
    place = content.index(b"k00004")
    mapped.write_bytes(content[:place] + b"K" + content[place + 1 :])
    assert [fault.where for fault in verify(copy)] == [str(mapped)]


def test_a_tar_put_out_of_the_list_while_it_is_read_stays_open(
    written: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, pread = ShardSet(written.folder), os.pread
    expected = shards.read(0)

    def put_out(descriptor: int, size: int, offset: int) -> bytes:
        shards._tars.clear()
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", put_out)
    assert shards.read(0) == expected


def test_a_changed_picture_is_refused_when_read(copy: Path) -> None:
    shards = ShardSet(copy)
    data = shards.read(1).images[0].data
    assert data is not None
    path = copy / "shard-000000.tar"
    path.write_bytes(path.read_bytes().replace(data, data[:-20] + bytes(20)))
    with pytest.raises(SampleError, match="k00001: picture 0 is not the one that was written"):
        ShardSet(copy).read(1)
    assert len(ShardSet(copy).read(1, images=False).images) == 1


def test_a_tar_with_other_members_in_its_place_is_named(copy: Path) -> None:
    path = copy / "shard-000000.tar"
    path.write_bytes(path.read_bytes().replace(b"k00001.0", b"k0000X.0"))
    with pytest.raises(SampleError, match=r"shard-000000.tar:k00001: (found the member|no tar header)"):
        ShardSet(copy).read(1)


def test_links_in_a_tar_are_not_followed(copy: Path) -> None:
    path = copy / "shard-000000.tar"
    link = tarfile.TarInfo("k00000.json")
    link.type, link.linkname, link.size = tarfile.SYMTYPE, "/etc/passwd", 0
    path.write_bytes(link.tobuf(tarfile.USTAR_FORMAT) + path.read_bytes()[512:])
    with pytest.raises(SampleError, match="found the member"):
        ShardSet(copy).read(0)


def test_missing_and_swapped_files_are_named(copy: Path) -> None:
    (copy / "shard-000003.tar").rename(copy / "away")
    with pytest.raises(SampleError, match=r"shard-000003.tar: is listed in index.json but missing"):
        ShardSet(copy)
    assert [fault.where for fault in verify(copy)] == [str(copy / "shard-000003.tar")]
    (copy / "away").rename(copy / "shard-000003.tar")
    (copy / "extra.tar").write_bytes(b"")
    assert [fault.where for fault in verify(copy)] == [str(copy / "extra.tar")]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": 99}, "format 99, this mmit reads 1"),
        ({"fingerprint": "0" * 64}, "fingerprint"),
        ({"shards": "nonsense"}, "damaged"),
        ({"shards": [{"name": "../x.tar", "bytes": 1, "sha256": "", "samples": 1}]}, "outside of its folder"),
        ({"shards": [{"name": 5, "bytes": "1", "sha256": "", "samples": 1}]}, "damaged"),
    ],
)
def test_an_index_that_cannot_be_right_is_refused(copy: Path, change: dict[str, object], text: str) -> None:
    record = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(record | change))
    with pytest.raises(SampleError, match=text):
        ShardSet(copy)
    assert [text in str(fault) for fault in verify(copy)] == [True]


def test_a_folder_without_index_is_no_shard_set(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="not a folder of shards"):
        ShardSet(tmp_path)


def test_a_parquet_of_another_set_is_refused(copy: Path, tmp_path: Path) -> None:
    other = write_shards(mixed(7), tmp_path / "other")
    for cached in copy.glob("*.arrow"):
        cached.unlink()
    (copy / "samples.parquet").write_bytes((other.folder / "samples.parquet").read_bytes())
    with pytest.raises(SampleError, match=r"samples.parquet: is not the one"):
        ShardSet(copy)


def test_a_stale_or_cut_arrow_file_is_never_used(copy: Path, tmp_path: Path) -> None:
    (cached,) = copy.glob("*.arrow")
    cached.write_bytes(cached.read_bytes()[:700])
    assert ShardSet(copy).key(22) == "k00022"
    write_shards(mixed(7)[::-1], copy, overwrite=True)
    assert [ShardSet(copy).key(i) for i in range(7)] == [f"k{n:05d}" for n in reversed(range(7))]


def test_a_read_only_folder_is_mapped_through_the_cache(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cached in copy.glob("*.arrow"):
        cached.unlink()
    monkeypatch.setenv("MMIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert ShardSet(copy).read(3) == mixed()[3]
    assert not list(copy.glob("*.arrow"))
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 1


# Reading ------------------------------------------------------------------------------------------------------------


def test_reading_without_images_touches_no_picture_byte(written: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = []
    real = os.pread

    def watched(descriptor: int, size: int, offset: int) -> bytes:
        spans.append((offset, size))
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", watched)
    json_ends = {}
    for name in written.shard_names:
        with tarfile.open(written.folder / name) as tar:
            json_ends |= {m.name[:-5]: m.offset_data + m.size for m in tar.getmembers() if m.name.endswith(".json")}
    for i in range(len(written)):
        written.read(i, images=False)
        (offset, size) = spans.pop()
        assert not spans
        assert offset + size == json_ends[written.key(i)]


def read_all(shards: ShardSet) -> list[Sample]:
    return [shards.read(i) for i in range(len(shards))]


def test_a_set_survives_pickling_threads_and_another_process(written: ShardSet) -> None:
    expected = read_all(written)
    assert read_all(pickle.loads(pickle.dumps(written))) == expected
    with ThreadPoolExecutor(4) as threads:
        for result in threads.map(lambda _: read_all(written), range(8)):
            assert result == expected
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_all, (written,)) == expected


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_and_its_parent_read_the_same_at_once(written: ShardSet) -> None:
    expected = read_all(written)  # the tars are open now, and the child inherits them
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if all(read_all(written) == expected for _ in range(5)) else 2
        finally:
            os._exit(code)
    assert all(read_all(written) == expected for _ in range(5))
    assert os.waitpid(child, 0)[1] == 0


def test_no_more_than_a_few_tars_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmit.data.shards.OPEN_TARS", 3)
    shards = write_shards(mixed(), tmp_path, samples_per_shard=1)
    before = len(os.listdir("/dev/fd"))
    assert [item.key for item in read_all(shards)] == [item.key for item in mixed()]
    assert len(os.listdir("/dev/fd")) - before <= 3


# Groups -------------------------------------------------------------------------------------------------------------


def reachable(links: list[set[int]]) -> list[int]:
    """The smallest sample reachable over shared pictures, by plain search."""
    result = []
    for start in range(len(links)):
        seen, todo = {start}, [start]
        while todo:
            here = todo.pop()
            near = {j for j in range(len(links)) if links[j] & links[here]} - seen
            seen |= near
            todo += near
        result.append(min(seen))
    return result


@given(shown=st.lists(st.lists(st.integers(0, 11), max_size=3), max_size=14))
@settings(max_examples=40, deadline=None)
def test_samples_that_share_a_picture_through_any_chain_are_one_group(
    tmp_path_factory: pytest.TempPathFactory, shown: list[list[int]]
) -> None:
    pictures = [picture(2 + n, 2, seed=n) for n in range(12)]
    samples = [sample(n, *[pictures[p] for p in named]) for n, named in enumerate(shown)]
    shards = write_shards(samples, tmp_path_factory.mktemp("groups"), samples_per_shard=4)
    groups = shards.picture_groups()
    assert groups.dtype == np.int64
    assert groups.tolist() == reachable([set(named) for named in shown])


def test_samples_group_by_a_meta_value(written: ShardSet) -> None:
    assert written.meta_groups("group").tolist() == [n % 5 for n in range(23)]
    with pytest.raises(SampleError, match=r"k00000: has no meta value 'patient' \(it has: group\)"):
        written.meta_groups("patient")


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory through /proc")
def test_writing_holds_one_shard_of_rows_at_most(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from mmit.data.shards import write_shards
from tests.data.pictures import peak_memory, picture, reset_peak_memory, sample
def samples(count):
    for n in range(count):
        yield sample(n, big)
big = picture(200, 200)
write_shards(samples(200), Path(sys.argv[1]) / "warm", samples_per_shard=50)
before = reset_peak_memory()
write_shards(samples(1000), Path(sys.argv[1]) / "set", samples_per_shard=50)
print(peak_memory() - before)
"""
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert sum(path.stat().st_size for path in (tmp_path / "set").glob("*.tar")) > 60 * 2**20
    assert int(run.stdout) < 20 * 1024
