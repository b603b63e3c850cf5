"""How fast conversion is, as ratios on the same machine: against `tar cf` over the same files without decoding, against
bare decoding with it.

Conversion brings every shard to the disk before it says that it is done; tar leaves its file to the system. So tar is
timed twice, the second time until its file is on the disk too. The pictures are as large as those of COCO's train2017
(19.3 GB in 118,287 files), on which most of LLaVA's conversations are, unless another JPEG quality is given. Run by
hand on idle cores: `python -m tests.bench.bench_convert [pictures] [JPEG quality]`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.convert import Settings, convert
from mmit.data.images import decode


def make(root: Path, count: int, quality: int = 97) -> None:
    (root / "images").mkdir()
    random = np.random.default_rng(0)
    noise = [Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((640, 480)) for _ in range(8)]
    rows = []
    for number in range(count):
        noise[number % 8].rotate(number % 7).save(root / "images" / f"{number}.jpg", quality=quality)
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise. " * 20}]
        rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (root / "rows.json").write_text(json.dumps(rows))


def cpu() -> float:
    """Seconds of CPU of this process and of the children it has waited for: other programs disturb these little."""
    return sum(os.times()[:4])


def best(times: int, work: Callable[[], object], written: Path | None = None) -> tuple[float, float]:
    """The least wall and the least CPU seconds. What was written before is on the disk by then, and what `work` itself
    has `written` is removed: else memory fills with it, and each run is slower than the one before."""
    walls, cpus = [], []
    for _ in range(times):
        if written is not None:
            shutil.rmtree(written, ignore_errors=True)
            written.unlink(missing_ok=True)
        os.sync()
        begun, used = time.perf_counter(), cpu()
        work()
        walls.append(time.perf_counter() - begun)
        cpus.append(cpu() - used)
    return min(walls), min(cpus)


def main() -> None:
    count, quality = ([*map(int, sys.argv[1:]), *(3000, 97)[len(sys.argv) - 1 :]])[:2]
    processes = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root, count, quality)
        size = sum(file.stat().st_size for file in (root / "images").iterdir()) / count

        def pack() -> None:
            subprocess.run(["tar", "cf", str(root / "x.tar"), "-C", folder, "images"], check=True)

        def pack_to_disk() -> None:
            pack()
            subprocess.run(["sync", str(root / "x.tar")], check=True)

        (tar, tar_cpu), (durable, _) = best(5, pack, root / "x.tar"), best(3, pack_to_disk, root / "x.tar")
        (root / "x.tar").unlink()

        def run(workers: int, *, decoding: bool, prints: bool = False) -> tuple[float, float]:
            settings, out = Settings(rows_per_shard=250, decode=decoding, prints=prints), root / "out"
            return best(
                3 if decoding else 5,
                lambda: convert(
                    "llava", root / "rows.json", root / "images", out, settings=settings, processes=workers
                ),
                out,
            )

        some = [(root / "images" / f"{number}.jpg").read_bytes() for number in range(min(count, 200))]
        bare, bare_cpu = (value / len(some) * count for value in best(2, lambda: [decode(data, "") for data in some]))
        print(
            f"{count} pictures of {size / 1000:.0f} KB; tar cf {tar:.2f} s, until it is on the disk {durable:.2f} s, "
            f"bare decode on one core {bare:.2f} s"
        )
        for workers in sorted({1, processes}):
            (plain, plain_cpu), (decoded, decoded_cpu), (printed, printed_cpu) = (
                run(workers, decoding=False),
                run(workers, decoding=True),
                run(workers, decoding=True, prints=True),
            )
            print(
                f"{workers} processes: without decoding {plain:.2f} s ({tar / plain:.2f} of tar's speed, "
                f"{durable / plain:.2f} of tar's until on the disk), "
                f"with decoding and sha256 {decoded:.2f} s ({bare / workers / decoded:.2f} of the bare decode speed), "
                f"with perceptual hashes {printed:.2f} s ({bare / workers / printed:.2f} of it)"
            )
            if workers == 1:
                ratios = (tar_cpu / plain_cpu, bare_cpu / decoded_cpu, bare_cpu / printed_cpu)
                print("  in CPU seconds: " + ", ".join(f"{ratio:.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
