"""A million short samples converted, and as many in tars of others indexed: seconds and peak memory, beside a tenth of
them, so that memory that grows with the set is seen. By hand: `python -m tests.bench.bench_million [rows [index]]`.
"""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_tools.convert import convert
from data_tools.index import index
from mmit.data.shard_writer import member_header
from mmit.data.shards import ShardSet


def make(path: Path, rows: int) -> None:
    with path.open("w") as stream:
        for number in range(rows):
            row = {"instruction": f"What is {number} plus one?", "input": "", "output": f"It is {number + 1}."}
            stream.write(json.dumps(row) + "\n")


def make_tars(folder: Path, rows: int) -> None:
    folder.mkdir()
    for first in range(0, rows, 10_000):
        with (folder / f"{first:09d}.tar").open("wb") as tar:
            for number in range(first, min(first + 10_000, rows)):
                text = json.dumps(
                    {"question": f"What is {number} plus one?", "answer": f"It is {number + 1}."}
                ).encode()
                tar.write(member_header(f"{number:09d}.json", len(text)) + text.ljust(512, b"\0"))
            tar.write(bytes(1024))


def megabytes() -> int:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measure(path: Path, out: Path) -> dict[str, float]:
    """In a process of its own, for the peak never falls. A file is converted into `out`, a folder of tars indexed."""
    gc.freeze()
    found: dict[str, float] = {"MB before": megabytes()}
    begun = time.perf_counter()
    if path.is_dir():
        index(path)
    else:
        convert("alpaca", path, None, out)
    found["seconds"] = round(time.perf_counter() - begun, 1)
    found["MB then"] = megabytes()
    begun = time.perf_counter()
    shards = ShardSet(path if path.is_dir() else out)
    found["seconds to open"] = round(time.perf_counter() - begun, 3)
    begun = time.perf_counter()
    for number in range(1000):
        shards.read(number * 7919 % len(shards))
    found["microseconds a random read"] = round((time.perf_counter() - begun) * 1000)
    found["MB after reading"] = megabytes()
    return found


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    for work in sys.argv[2:] or ["convert", "index"]:
        for count in (rows // 10, rows):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "input"
                (make if work == "convert" else make_tars)(path, count)
                command = [sys.executable, "-m", "tests.bench.bench_million", "measure", str(path), f"{folder}/out"]
                told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                print(f"{work} {count:,} samples: {told.strip()}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(Path(sys.argv[2]), Path(sys.argv[3]))))
    else:
        main()
