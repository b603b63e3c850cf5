"""Files that are complete under their name or not there, and a full disk that is told with the name of the file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def named(path: Path, *others: Path) -> Iterator[None]:
    """Around the writing of a file: a full disk, which says of no file that it had no room, says `path`; what is said
    of `others`, its temporary names, is said of it too."""
    try:
        yield
    except OSError as error:
        if (error.filename is None and error.errno in FULL) or error.filename in [str(other) for other in others]:
            error.filename = str(path)
        raise


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write to: in the end the file takes the place of `path`, or nothing is left of it."""
    if path.exists() and not path.is_file():
        yield path  # a pipe or a device, or a folder, which says so
        return
    target = path.resolve()  # a link stays one
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with named(path, temporary):
            yield temporary
            os.replace(temporary, target)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
