"""Laws of training on shards that lie elsewhere: the same losses, and no network fault passes for a bad sample."""

from __future__ import annotations

import io
import os
import re
import signal
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.index import index
from mmit.data.shards import ShardSet
from mmit.training.data import SURVEYED_TARS, fetched_again, too_long
from tests.data.pictures import picture
from tests.data.served import Ranged, served
from tests.training.ranks import assert_same_losses, run_ranks, start_ranks
from tests.training.tiny import (
    assembled,
    config,
    ended,
    metrics,
    mixed,
    opened,
    run,
    said,
    shards,
    stage,
    start,
    written,
)

pytest.importorskip("aiohttp", reason="http needs the extra mmit[remote]")
TRAIN = {"projector": {"lr": 1e-3}, "language": {"lr": 1e-3}}


@pytest.fixture
def host(data: Path) -> Iterator[str]:
    with served(data.parent) as (root, _):
        yield root


def test_a_run_over_the_network_gives_the_losses_of_the_run_beside_the_data(
    data: Path, host: str, tmp_path: Path
) -> None:
    beside = run(config(tmp_path / "beside", stage("sft", data, TRAIN)))
    largest = max(path.stat().st_size for path in data.glob("*.tar"))
    far = stage("sft", data, TRAIN) | {"data": [{"shards": f"{host}/{data.name}"}]}
    bounds = {"workers": 2, "remote_cache_gb": 2 * largest / 1e9, "cache": str(tmp_path / "other")}
    assert metrics(run(config(tmp_path / "far", far, **bounds))) == metrics(beside)
    kept = list((tmp_path / "other" / "remote" / "tars").glob("*.tar"))
    assert 0 < sum(path.stat().st_size for path in kept) <= 2 * largest


def foreign(folder: Path) -> Path:
    """Three tars of somebody else, indexed."""
    folder.mkdir()
    for number in range(3):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for key in range(number * 5, number * 5 + 5):
                for name, content in ((f"{key}.PNG", picture(9, 7, seed=key).data), (f"{key}.txt", b"it is %d" % key)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content or b"")
                    tar.addfile(member, io.BytesIO(content or b""))
    index(folder)
    return folder


def test_tars_of_others_train_in_place_beside_us_and_over_the_network(host: str, data: Path, tmp_path: Path) -> None:
    folder = foreign(data.parent / "tars")
    beside = run(config(tmp_path / "beside", stage("sft", folder, TRAIN)))
    assert len(metrics(beside)) == 3
    far = stage("sft", folder, TRAIN) | {"data": [{"shards": f"{host}/tars"}]}
    assert metrics(run(config(tmp_path / "far", far, cache=str(tmp_path / "other")))) == metrics(beside)


def test_a_few_samples_of_tars_of_others_come_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmit.data.shards.REQUEST", 0)
    local = ShardSet(foreign(tmp_path / "tars"))
    with served(tmp_path, Ranged) as (root, asked):
        few = ShardSet(f"{root}/tars", cache=tmp_path / "cache").for_few([2, 8])
        assert [few.read(i) for i in (2, 8, 2)] == [local.read(i) for i in (2, 8, 2)]
    sizes = [len(local.read(i).images[0].data or b"") for i in (2, 8)]
    assert [line for line in asked if ".tar" in line] == [f"/tars/0.tar {sizes[0]}", f"/tars/1.tar {sizes[1]}"]


def test_the_first_look_at_a_set_fetches_few_of_its_tars(data: Path, host: str, tmp_path: Path) -> None:
    folder = shards(data.parent / "many", [written(number) for number in range(60)])
    assert len(list(folder.glob("*.tar"))) > SURVEYED_TARS
    far = stage("sft", folder, {"language": {"lr": 1e-3}}, max_tokens=40) | {"data": [{"shards": f"{host}/many"}]}
    wanted = config(tmp_path / "run", far, vision=None, cache=str(tmp_path / "other"))
    (line,) = too_long(opened(wanted, assembled(wanted)))
    assert len(list((tmp_path / "other" / "remote" / "tars").glob("*.tar"))) == SURVEYED_TARS
    assert re.search(r"of \d+ sampled of 60 samples", line)


def test_evaluations_fetch_what_they_hold_out_once_and_not_its_tars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmit.data.shards.REQUEST", 0)  # as beside a gigabyte
    folder = shards(tmp_path / "many", mixed(200))
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    eval = {"holdout": {"fraction": 0.3, "by": "sample"}, "every": 1, "generate": 2, "max_new_tokens": 2}
    few = {"steps": 2, "order": "window", "window": 1}
    beside = run(config(tmp_path / "beside", stage("sft", folder, TRAIN, **few), eval=eval))
    with served(tmp_path, Ranged) as (root, asked):
        far = stage("sft", folder, TRAIN, **few) | {"data": [{"shards": f"{root}/many"}]}
        cache = {"cache": str(tmp_path / "other"), "remote_cache_gb": 15 * largest / 1e9}
        wanted = config(tmp_path / "far", far, eval=eval, **cache)
        assert metrics(run(wanted), evaluations=True) == metrics(beside, evaluations=True)
        held_out = opened(wanted, assembled(wanted)).held_out
    assert held_out is not None
    local = ShardSet(folder)
    places = [(local.shard_of(int(i))[0], local._value("bytes", int(i))) for i in held_out.order.origins[0].indices]
    assert len({shard for shard, _ in places}) > 20
    sizes = {f"/many/{path.name} {path.stat().st_size}" for path in folder.glob("*.tar")}
    whole = [line for line in asked if line in sizes]
    alone = [line for line in asked if ".tar" in line and line not in sizes]
    assert len(whole) <= SURVEYED_TARS + 3, "what was looked at and trained on"
    once = Counter(f"/many/{local.shard_names[shard]} {size}" for shard, size in places)
    assert not Counter(alone) - once
    assert len(alone) > 40, "but for those in the tars that are here"


@pytest.mark.parametrize(
    ("order", "tars", "told"),
    [
        ({}, 8, "order: window, or raise"),
        ({}, 9, None),
        ({"order": "window", "window": 3}, 2, r"lower window \(now 3\)"),
        ({"order": "window", "window": 3}, 3, None),
    ],
)
def test_a_cache_too_small_for_the_order_is_told_before_training(
    tmp_path: Path, order: dict[str, object], tars: int, told: str | None
) -> None:
    folder = shards(tmp_path / "set", [written(number) for number in range(60)])
    sizes = [path.stat().st_size for path in folder.glob("*.tar")]
    assert len(sizes) == 9
    for place, expected in ((folder.as_uri(), told), (str(folder), None)):
        here = stage("sft", folder, {"language": {"lr": 1e-3}}, **order) | {"data": [{"shards": place}]}
        wanted = config(tmp_path / "run", here, vision=None, remote_cache_gb=sum(sorted(sizes)[-tars:]) / 1e9)
        lines = fetched_again(opened(wanted, assembled(wanted)), wanted, wanted.stages[0])
        assert len(lines) == (expected is not None)
        assert expected is None or re.search(expected, lines[0])


def test_a_shard_that_went_away_stops_the_run_though_bad_samples_are_skipped(tmp_path: Path) -> None:
    folder = shards(tmp_path / "set", [written(number) for number in range(20)])
    (folder / "shard-000001.tar").unlink()
    far = stage("sft", folder, {"language": {"lr": 1e-3}}, on_bad_sample="skip")
    far["data"] = [{"shards": folder.as_uri()}]
    wanted = config(tmp_path / "run", far, vision=None, workers=1)
    assert ended(start(wanted)) == 3
    assert "shard-000001.tar: is not there" in said(wanted)


class Waiting(Ranged):
    """Gives tars as long as it is not told to wait, and then for a minute none."""

    waits = threading.Event()

    def do_GET(self) -> None:
        if self.waits.is_set() and self.path.endswith(".tar"):
            self.asked.append("waits")
            time.sleep(60)
        super().do_GET()


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 1)])
def test_a_signal_while_a_tar_is_fetched_ends_the_run_at_once_with_every_step_saved(
    tmp_path: Path, ranks: int, workers: int
) -> None:
    folder = shards(tmp_path / "many", mixed(200))
    few = {"order": "window", "window": 1}
    straight = run(config(tmp_path / "straight", stage("sft", folder, TRAIN, **few, steps=15)))
    kind = type("Own", (Waiting,), {"waits": threading.Event()})
    with served(tmp_path, kind) as (root, asked):
        far = stage("sft", folder, TRAIN, **few, steps=15) | {"data": [{"shards": f"{root}/many"}]}
        wanted = config(tmp_path / "run", far, workers=workers, cache=str(tmp_path / "other"))
        processes = start_ranks(wanted, ranks) if ranks > 1 else [start(wanted)]
        told = tmp_path / "run" / "metrics.jsonl"
        while not told.exists() or not told.read_text():
            time.sleep(0.01)
        kind.waits.set()
        while "waits" not in asked:
            time.sleep(0.01)
        time.sleep(0.5)  # the steps that need no further tar are computed meanwhile
        began = time.monotonic()
        for process in processes:
            os.kill(process, signal.SIGTERM)
        assert {ended(process) for process in processes} == {75}, said(wanted)
        assert time.monotonic() - began < 20
        computed = metrics(tmp_path / "run")
        assert 0 < len(computed) < 15
        assert checkpoints(tmp_path / "run") == [len(computed)]
        kind.waits.clear()
        (run_ranks if ranks > 1 else lambda wanted, _: run(wanted))(wanted, ranks)
    assert_same_losses(straight, tmp_path / "run", relative=1e-4 if ranks > 1 else 0)


def checkpoints(run: Path) -> list[int]:
    """The steps that are saved."""
    return sorted(int(path.name.rpartition("-")[2]) for path in (run / "checkpoints").iterdir())
