"""All rows looked at before any is waited for, so that a wrong --images costs seconds and names all that is missing.

The batches that were looked at are kept, and what there is no room for is read again. Other processes begin with them
meanwhile: what they have finished by the time something is found missing stays for the same command given again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from data_tools.album import missing, remedy_for
from data_tools.one_shard import place_of
from data_tools.rows import Rejected
from data_tools.workers import Team
from mmit.config import ConfigError
from mmit.data.sample import Sample

Rows = list[Sample | Rejected]
Batch = tuple[int, Rows]
"""The number of a shard, and its rows."""
MOST_KEPT = 96 * 2**20
"""Bytes of rows, by a rough estimate."""
ROW = 3000
"""Bytes of memory that a short conversation about a picture takes beside its texts."""


class Missed:
    """The pictures below a folder that rows name and that are not there."""

    def __init__(self, file: Path, below: Path, prefix: str | None) -> None:
        """`prefix`: what an option takes off the names, None where the format has no such option."""
        self.file = file
        self.below = below
        self.prefix = prefix
        self.rows = 0
        self.names: dict[str, str] = {}

    def look(self, items: Iterable[Sample | Rejected], first: int) -> None:
        """`first`: the number of the first row."""
        for number, item in enumerate(items, first):
            if isinstance(item, Rejected):
                continue
            absent = missing(item)
            self.rows += bool(absent)
            for picture in absent:
                self.names.setdefault(picture, place_of(item, self.file.name, number))

    def refuse(self) -> None:
        """ConfigError if there are any, with what would find them."""
        if not self.names:
            return
        count = len(self.names)
        shown = "".join(f"\n  {name}   ({where})" for name, where in islice(self.names.items(), 20))
        more = f"\n  and {count - 20} more" if count > 20 else ""
        folder = self.below if self.below.is_dir() else self.below.parent
        told = (remedy_for(name, folder, self.prefix) for name in islice(self.names, 20))
        found = next(filter(None, told), "Check --images and --set image_prefix=...")
        files, verb = (f"{count} files", "are") if count > 1 else ("1 file", "is")
        by = f"{self.rows} rows" if self.rows > 1 else "1 row"
        raise ConfigError(
            f"{self.file}: {files} named by {by} {verb} missing below {self.below}:{shown}{more}\n"
            f"{found}; or say --on-missing drop (leave those rows out) or "
            f"text-only (in a config: options: {{on_missing: drop}})"
        )


def looked_at(
    batches: Callable[[], Iterable[Batch]], missed: Missed, rows_per_shard: int, team: Team
) -> Iterator[Batch]:
    """Each batch once: to processes of the team that are free while the others are looked at, then all that are left.

    `batches` gives them from the first on, each time it is called. ConfigError if pictures are missing, when all rows
    have been looked at.
    """
    kept: deque[Batch] = deque()
    room, unkept, given = MOST_KEPT, False, set[int]()
    for turn, (number, items) in enumerate(batches()):
        missed.look(items, number * rows_per_shard)
        taken = memory_of(items)
        if missed.names:
            kept.clear()
        elif turn and team.free(bytes_of(items)):
            given.add(number)
            yield number, items
        elif taken < room:
            kept.append((number, items))
            room -= taken
            given.add(number)
        else:
            unkept = True
    missed.refuse()
    while kept:
        yield kept.popleft()
    if unkept:
        yield from (batch for batch in batches() if batch[0] not in given)


def memory_of(items: Rows) -> int:
    samples = [item for item in items if isinstance(item, Sample)]
    return bytes_of(items) + ROW * len(items) + sum(len(said.text) for item in samples for said in item.messages)


def bytes_of(items: Rows) -> int:
    """Of the pictures that came within the rows themselves."""
    samples = (item for item in items if isinstance(item, Sample))
    return sum(len(picture.data) for sample in samples for picture in sample.images if picture.data is not None)
