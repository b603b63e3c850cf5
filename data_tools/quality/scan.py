"""Personal data and secrets in texts: how many, of which type and where, never the value itself."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from data_tools.quality.subset import Derived, Progress, Removal, derive, open_set, silent, texts_of
from mmit.data.files import whole
from mmit.data.sample import Sample

KEYS = (
    r"AKIA[0-9A-Z]{16}",  # AWS
    r"gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22,}|glpat-[A-Za-z0-9_-]{20,}",
    r"sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{30,}|AIza[0-9A-Za-z_-]{35}",  # model and map services
    r"xox[abprs]-[0-9A-Za-z-]{10,}|[rs]k_live_[0-9A-Za-z]{20,}",  # chat and payment services
    r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",  # JSON web tokens
)
EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])")
PHONE = re.compile(
    r"(?<![\w.+-])(?:\+\d{1,3}(?:[ .-]?(?:\(\d{1,4}\)|\d{1,4})){2,5}|\(\d{2,4}\) ?\d{3,4}[ .-]\d{3,4}|"
    r"\d{3}[-.]\d{3}[-.]\d{4})(?![\w-]|\.\d)"
)
KEY = re.compile(rf"(?<![A-Za-z0-9_-])(?:{'|'.join(KEYS)})(?![A-Za-z0-9])|-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----")
CARD = re.compile(r"(?<![\d.,-])[3-6](?:[ -]?\d){12,18}(?![\d-])")


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def _luhn(text: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1)."""
    digits = [int(digit) for digit in _digits(text)]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0 and len(set(digits)) > 1


TYPES: dict[str, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "e-mail": (EMAIL, lambda text: True),
    "card": (CARD, _luhn),
    "key": (KEY, lambda text: True),
    "phone": (PHONE, lambda text: 8 <= len(_digits(text)) <= 15),
}


@dataclass(frozen=True)
class Find:
    """One value found."""

    sample: str
    number: int
    where: str
    """FOLDER/SHARD:KEY and the message."""
    type: str
    masked: str


@dataclass(frozen=True)
class Scan:
    samples: int
    values: dict[str, int]
    """Values found, by type."""
    affected: dict[str, int]
    """Samples that hold any, by type."""
    any: int
    """Samples that hold one of any type."""


def masked(type: str, value: str) -> str:
    """What may be shown of a value: enough to recognise a false alarm, too little to use."""
    if type == "e-mail":
        return f"{value[0]}***@***.{value.rpartition('.')[2]}"
    if value.startswith("-----BEGIN"):
        return value
    return value[:3] + re.sub(r"\w", "*", value[3:])


def finds(text: str) -> Iterator[tuple[str, str]]:
    """Type and value of everything found in a text; a value counts under the first type it fits."""
    taken: list[tuple[int, int]] = []
    for type, (pattern, holds) in TYPES.items():
        for match in pattern.finditer(text):
            begin, end = match.span()
            if holds(match.group()) and not any(begin < b and a < end for a, b in taken):
                taken.append((begin, end))
                yield type, match.group()


def scan(shards: Path, report: Path | None = None, *, progress: Progress = silent) -> Scan:
    """Count what is found; `report` gets a line a value, masked."""
    opened = open_set(shards)
    values: Counter[str] = Counter()
    affected: Counter[str] = Counter()
    any_found = 0
    with (
        whole(report or Path(os.devnull)) as target,
        target.open("w", encoding="utf-8", errors="backslashreplace") as stream,
    ):
        for number, sample in texts_of(opened, progress, "scan"):
            here = list(_in_sample(sample, number, opened.where(number)))
            values.update(item.type for item in here)
            affected.update({item.type for item in here})
            any_found += bool(here)
            for item in here:
                stream.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")
    return Scan(
        len(opened), {type: values[type] for type in TYPES}, {type: affected[type] for type in TYPES}, any_found
    )


def without(shards: Path, out: Path, *, progress: Progress = silent) -> Derived:
    """Write the samples in which nothing is found."""
    opened = open_set(shards)

    def decide(work: Path) -> Iterator[Removal]:
        for number, sample in texts_of(opened, progress, "scan"):
            first = next(_in_sample(sample, number, ""), None)
            if first is not None:
                yield Removal(number, first.type, {"found": first.masked})

    return derive(opened, out, tool="scan", options={"types": list(TYPES)}, decide=decide, progress=progress)


def _in_sample(sample: Sample, number: int, where: str) -> Iterator[Find]:
    for place, item in enumerate(sample.messages):
        for type, value in finds(item.text):
            yield Find(sample.key, number, f"{where}: message {place}", type, masked(type, value))
