from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools.convert import Settings, convert
from mmit.data.sample import ImagePart, Sample, TextPart
from mmit.data.shards import ShardSet

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def shared() -> Path:
    """The real files that lie beside a checkout of the project, for tests marked `shared`."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not there: real files are not part of the project")
    return SHARED


def picture_bytes(number: int = 0, *, kind: str = "PNG", size: tuple[int, int] = (20, 12), **save: Any) -> bytes:
    """A small noisy picture, another for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=kind, **save)
    return stream.getvalue()


def read_all(shards: ShardSet) -> list[Sample]:
    return [shards.read(number) for number in range(len(shards))]


def flat(sample: Sample) -> list[tuple[str, list[Any]]]:
    """Role and parts of each message, texts as strings and pictures as their number: easy to write in a test."""
    return [
        (
            item.role,
            [p.text if isinstance(p, TextPart) else p.image if isinstance(p, ImagePart) else p for p in item.parts],
        )
        for item in sample.messages
    ]


Converter = Callable[..., list[Sample]]


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Converter:
    """Writes rows as a JSON file (or takes a path), converts them, and gives the samples read back."""

    def convert_rows(
        format: str,
        rows: Any,
        images: Path | None = None,
        *,
        name: str = "rows.json",
        settings: Settings | None = None,
        **options: Any,
    ) -> list[Sample]:
        path = rows
        if not isinstance(rows, Path):
            path = tmp_path / name
            lines = name.endswith(".jsonl")
            text = "\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows)
            path.write_text(text, encoding="utf-8")
        out = tmp_path_factory.mktemp("out")  # not below tmp_path, which may be the input
        return read_all(convert(format, path, images, out, options=options, settings=settings))

    return convert_rows


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of small pictures: 0.png to 4.png, and deep/5.jpg."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for number in range(5):
        (folder / f"{number}.png").write_bytes(picture_bytes(number))
    (folder / "deep" / "5.jpg").write_bytes(picture_bytes(5, kind="JPEG"))
    return folder
