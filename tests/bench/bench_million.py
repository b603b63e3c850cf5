"""A million short samples converted and indexed: seconds and peak memory, beside a tenth of them, so that memory that
grows with the set is seen. By hand: `python -m tests.bench.bench_million [rows]`."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def make(path: Path, rows: int) -> None:
    with path.open("w") as stream:
        for number in range(rows):
            row = {"instruction": f"What is {number} plus one?", "input": "", "output": f"It is {number + 1}."}
            stream.write(json.dumps(row) + "\n")


def megabytes() -> int:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measure(path: Path, out: Path) -> dict[str, float]:
    """In a process of its own, for the peak never falls."""
    from data_tools.convert import convert
    from mmit.data.shards import ShardSet

    found: dict[str, float] = {"MB before": megabytes()}
    begun = time.perf_counter()
    shards = convert("alpaca", path, None, out)
    found["seconds to convert and index"] = round(time.perf_counter() - begun, 1)
    found["MB after converting"] = megabytes()
    begun = time.perf_counter()
    shards = ShardSet(out)
    found["seconds to open"] = round(time.perf_counter() - begun, 3)
    begun = time.perf_counter()
    for number in range(1000):
        shards.read(number * 7919 % len(shards))
    found["microseconds a random read"] = round((time.perf_counter() - begun) * 1000)
    found["MB after reading"] = megabytes()
    return found


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for count in (rows // 10, rows):
            path = root / f"{count}.jsonl"
            make(path, count)
            command = [sys.executable, "-m", "tests.bench.bench_million", "measure", str(path), str(root / f"{count}")]
            print(f"{count:,} samples:", subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(Path(sys.argv[2]), Path(sys.argv[3])), indent=1))
    else:
        main()
