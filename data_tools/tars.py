"""The samples of somebody else's tar: which members belong together and where they lie, from the headers alone.

A sample is what has the same name up to its first dot, as webdataset has it; members that stand apart are joined.
Nothing is unpacked, no link is followed, no name is ever used as a path.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from data_tools.rows import Rejected
from mmit.data.images import MAX_BYTES

PICTURES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm"}
TEXTS = {"txt", "caption", "text", "json", "question", "answer"}
MOST_TEXT = 64 * 2**20
CUT = "the tar was cut or damaged: copy it again"


@dataclass(frozen=True)
class Member:
    """A file in a tar."""

    ending: str
    """All after the first dot of its name, as it is written there."""
    offset: int
    """Of its content; `size` bytes of it."""
    size: int

    @property
    def kind(self) -> str:
        return self.ending.rpartition(".")[2].lower()

    @property
    def limit(self) -> int:
        return MAX_BYTES + 1 if self.kind in PICTURES else MOST_TEXT


@dataclass(frozen=True)
class Group:
    """The members of one sample."""

    number: int
    key: str
    members: tuple[Member, ...]


class StrictHeader(tarfile.TarInfo):
    """A member's header; what is neither one nor the end mark is an error, which `tarfile` takes for the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> StrictHeader:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not buf.strip(b"\0"):
                raise
            raise tarfile.ReadError(str(error) if buf else "no end mark") from None


def check_end(read: Callable[[int], bytes]) -> None:
    """`tarfile.ReadError` unless what `read` gives after the first block of an end mark is the rest of one."""
    zeros = 0
    while piece := read(1 << 20):
        if piece.strip(b"\0"):
            raise tarfile.ReadError("more data follows its end mark, as when tars are joined with `cat`")
        zeros += len(piece)
    if zeros < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("its end mark is cut")


def is_plain(tar: Path) -> bool:
    """Whether members can be read where they lie: the tar is not compressed as a whole."""
    try:
        with tarfile.open(tar, "r:"):
            return True
    except tarfile.ReadError:
        return False


def unpacked(tar: Path) -> IO[bytes]:
    """The bytes of a tar that is compressed as a whole, all parts of it and their checksums checked.

    `tarfile` itself would stop after the first of several parts, and not look at the checksum of any.
    """
    with tar.open("rb") as file:
        start = file.read(6)
    for magic, opened in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open)):
        if start.startswith(magic):
            return opened(tar, "rb")  # type: ignore[return-value]
    return tar.open("rb")


def groups(tar: Path) -> Iterator[Group | Rejected]:
    """The samples of an uncompressed tar in the order of their first members; those that cannot be right, rejected."""
    found: dict[str, list[Member]] = {}
    faults: dict[str, str] = {}
    key, broken = "", ""
    try:
        with tar.open("rb") as file, tarfile.open(fileobj=file, mode="r:", tarinfo=StrictHeader) as stream:
            for member in stream:
                if member.isdir() or is_hidden(member.name):
                    continue
                key, ending = key_and_ending(member.name)
                members = found.setdefault(key, [])
                fault = fault_of(member, ending, [other.ending for other in members])
                if fault is not None:
                    faults.setdefault(key, fault)
                members.append(Member(ending, member.offset_data, member.size))
                stream.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
            file.seek(stream.offset + tarfile.BLOCKSIZE)  # type: ignore[attr-defined]
            check_end(file.read)
    except (tarfile.TarError, EOFError, OSError) as error:
        broken = f"the tar ends or breaks here ({error})"
    for number, (name, members) in enumerate(found.items()):
        where = f"{tar.name}:{name}"
        if name in faults:
            yield Rejected(tar.name, number, name, f"{where}: {faults[name]}")
        elif broken and name == key:
            yield Rejected(
                tar.name, number, name, f"{where}: {broken} after this sample, which may lack members; {CUT}"
            )
        else:
            yield Group(number, name, tuple(members))
    if broken and key not in found:
        yield Rejected(tar.name, 0, "", f"{tar.name}: {broken}; {CUT}")


def is_hidden(name: str) -> bool:
    """Notes of a system or of Energon, which are no samples."""
    return name.rpartition("/")[2].startswith(".") or ".nv-meta" in name


def key_and_ending(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{folder}{slash}{stem}".removeprefix("./"), ending


def fault_of(member: tarfile.TarInfo, ending: str, before: list[str]) -> str | None:
    """Why a member cannot be part of a sample that already has members with the endings `before`."""
    if not member.isreg():
        kind = "link" if member.issym() or member.islnk() else "device or pipe"
        return f"its member {member.name!r} is a {kind}, which is never followed; store the file itself"
    if member.issparse():
        return f"its member {member.name!r} is stored with holes; write the tar without --sparse"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return f"the name {member.name!r} leads out of the tar; name members below it"
    kind = ending.rpartition(".")[2].lower()
    for other in before:
        if other.lower() == ending.lower():
            return f"two members are called .{ending}; name every sample apart"
        if kind in TEXTS and other.rpartition(".")[2].lower() == kind:
            return (
                f"both .{other} and .{ending} would be its {kind}; a name ends at its first dot, so files with dots in "
                f"their names are taken for one sample: rename them"
            )
    return None
