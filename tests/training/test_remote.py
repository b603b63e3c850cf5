"""Laws of training on shards that lie elsewhere: the same losses, and no network fault passes for a bad sample."""

from __future__ import annotations

import functools
import http.server
import io
import re
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.index import index
from mmit.training.data import SURVEYED_TARS, too_long
from tests.data.pictures import picture
from tests.training.tiny import (
    assembled,
    config,
    ended,
    metrics,
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
def served(data: Path) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(data.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_run_over_the_network_gives_the_losses_of_the_run_beside_the_data(
    data: Path, served: str, tmp_path: Path
) -> None:
    beside = run(config(tmp_path / "beside", stage("sft", data, TRAIN)))
    largest = max(path.stat().st_size for path in data.glob("*.tar"))
    far = stage("sft", data, TRAIN) | {"data": [{"shards": f"{served}/{data.name}"}]}
    bounds = {"workers": 2, "remote_cache_gb": 2 * largest / 1e9, "cache": str(tmp_path / "other")}
    assert metrics(run(config(tmp_path / "far", far, **bounds))) == metrics(beside)
    kept = list((tmp_path / "other" / "remote" / "tars").glob("*.tar"))
    assert 0 < sum(path.stat().st_size for path in kept) <= 2 * largest


def test_tars_of_others_train_in_place_beside_us_and_over_the_network(served: str, data: Path, tmp_path: Path) -> None:
    folder = data.parent / "tars"
    folder.mkdir()
    for number in range(3):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for key in range(number * 5, number * 5 + 5):
                for name, content in ((f"{key}.PNG", picture(9, 7, seed=key).data), (f"{key}.txt", b"it is %d" % key)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content or b"")
                    tar.addfile(member, io.BytesIO(content or b""))
    index(folder)
    beside = run(config(tmp_path / "beside", stage("sft", folder, TRAIN)))
    assert len(metrics(beside)) == 3
    far = stage("sft", folder, TRAIN) | {"data": [{"shards": f"{served}/tars"}]}
    assert metrics(run(config(tmp_path / "far", far, cache=str(tmp_path / "other")))) == metrics(beside)


def test_the_first_look_at_a_set_fetches_few_of_its_tars(data: Path, served: str, tmp_path: Path) -> None:
    folder = shards(data.parent / "many", [written(number) for number in range(60)])
    assert len(list(folder.glob("*.tar"))) > SURVEYED_TARS
    far = stage("sft", folder, {"language": {"lr": 1e-3}}, max_tokens=40) | {"data": [{"shards": f"{served}/many"}]}
    wanted = config(tmp_path / "run", far, vision=None, cache=str(tmp_path / "other"))
    (line,) = too_long(opened(wanted, assembled(wanted)))
    assert len(list((tmp_path / "other" / "remote" / "tars").glob("*.tar"))) == SURVEYED_TARS
    assert re.search(r"of \d+ sampled of 60 samples", line)


def test_a_shard_that_went_away_stops_the_run_though_bad_samples_are_skipped(tmp_path: Path) -> None:
    folder = shards(tmp_path / "set", [written(number) for number in range(20)])
    (folder / "shard-000001.tar").unlink()
    far = stage("sft", folder, {"language": {"lr": 1e-3}}, on_bad_sample="skip")
    far["data"] = [{"shards": folder.as_uri()}]
    wanted = config(tmp_path / "run", far, vision=None, workers=1)
    assert ended(start(wanted)) == 3
    assert "shard-000001.tar: is not there" in said(wanted)
