"""A data set of the Hugging Face hub by its name, through the `datasets` library (pip install datasets).

INPUT is the name (`HuggingFaceM4/the_cauldron`). Its rows are written once as parquet into a temporary folder and read
by the format that `layout` names; without one, the columns decide. `revision` should be a commit: then the same command
gives the same shards next year.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.rows import Rejected
from mmit.config import ConfigError
from mmit.data.sample import Sample

KEPT: list[tempfile.TemporaryDirectory[str]] = []
"""Until this process ends: workers read the pictures when all rows have long been read."""


def samples(
    path: Path,
    images: Path | None = None,
    *,
    layout: str = "",
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    options: dict[str, Any] | str = "{}",
) -> Iterator[Sample | Rejected]:
    """`layout`: the format of the rows. `options`: that format's options as JSON."""
    try:
        import datasets
    except ImportError:
        raise ConfigError("format hub needs the datasets library: pip install 'mmit[hub]'") from None
    try:
        data: Any = datasets.load_dataset(str(path), config, split=split, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"hub: {path} cannot be loaded ({str(error).strip().partition(chr(10))[0]})") from None
    try:
        given = json.loads(options) if isinstance(options, str) else options
    except ValueError as error:
        raise ConfigError(f"hub: options {options!r} is not JSON ({error}); write for example {{least: 4}}") from None
    KEPT.append(tempfile.TemporaryDirectory())
    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    file = Path(KEPT[-1].name) / f"{Path(path).name}.parquet"
    data.to_parquet(str(file))
    from data_tools.detect import detect
    from data_tools.formats import samples_of

    yield from samples_of(layout or detect(file), file, images, given)
