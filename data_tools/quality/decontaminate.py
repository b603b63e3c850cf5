"""Find training samples that hold what an evaluation asks: shared runs of words, and shared pictures.

Texts: word n-grams of the evaluation's prompts, n = 13 as in GPT-3 (Brown et al. 2020, appendix C), anywhere in the
texts of a sample. A prompt of 8 to 12 words counts if all of it occurs; shorter ones say too little and are counted,
not compared. Of each match the share of the prompt that is covered is told, since a shared phrase is not yet a leak.

A report is written first, a line a match, for people to look at. Nothing is removed unless asked.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.quality.pictures import alike as pictures_alike
from data_tools.quality.pictures import check_bits, prints_of
from data_tools.quality.subset import Derived, Progress, Removal, derive, open_set, silent, texts_of
from data_tools.quality.words import words
from mmit.config import ConfigError
from mmit.data.files import whole
from mmit.data.sample import SampleError
from mmit.data.shards import ShardSet

LEAST_WORDS = 8
COMMON, COMMON_SHARE = 10, 0.01
"""Runs of words that more items of an evaluation than this many, and than this share of them, have in common are its
wording ("answer with the letter of the option"), not its content."""
MOST_MATCHES = 10
"""Items named for one sample, the best covered first."""
MOST_TEXT = 400
BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Match:
    """One sample that holds one item of an evaluation."""

    sample: str
    """Its key; `number` counts from 0 over the set."""
    number: int
    item: str
    """FOLDER/SHARD:KEY of the item of the evaluation."""
    kind: str
    """`text`, `picture` (the same bytes) or `alike` (the same to the eye)."""
    covered: float
    """Share of the words of the item's prompt that the sample has in runs as long; 1 for pictures."""
    text: str
    """The longest run of words in common."""
    remove: bool
    """Whether `--apply` leaves the sample out."""


@dataclass(frozen=True)
class Against:
    """What one evaluation set gave."""

    name: str
    items: int
    too_short: int
    """Items none of whose prompts has enough words to compare."""
    common: int
    """Runs of words left out as the wording of the set."""
    found_texts: int = 0
    """Items of which a sample holds the text."""
    found_pictures: int = 0


@dataclass(frozen=True)
class Survey:
    against: list[Against]
    samples: int
    matched: int
    """Samples with any match."""
    marked: int
    """Samples to be left out by `--apply`."""
    first: list[Match] = field(default_factory=list)


def survey(
    shards: Path,
    against: Sequence[Path],
    report: Path,
    *,
    words_in_common: int = 13,
    covered: float = 0.5,
    alike: int | None = None,
    progress: Progress = silent,
) -> Survey:
    """Compare a set with evaluation sets and write the report.

    Marked for removal are samples that share a picture, or words that cover at least `covered` of an item's prompt.
    """
    if words_in_common < LEAST_WORDS:
        raise ConfigError(
            f"--words {words_in_common}: fewer than {LEAST_WORDS} words are shared by chance; 13 is usual"
        )
    if not 0 <= covered <= 1:
        raise ConfigError(f"--covered {covered}: a share of the item's words, 0 to 1")
    opened, evaluations = open_set(shards), [open_set(folder) for folder in against]
    for evaluation in evaluations:
        if evaluation.fingerprint == opened.fingerprint:
            raise ConfigError(f"--against {evaluation.folder}: is the set to be checked itself; name an evaluation set")
    if alike is not None:
        check_bits(alike)
    index = _Prompts(evaluations, words_in_common, progress)
    shown = _pictures(opened, evaluations, alike, progress)
    matched = marked = 0
    first: list[Match] = []
    found: dict[str, set[tuple[int, int]]] = {"text": set(), "picture": set()}
    with whole(report) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(json.dumps(_header(opened, evaluations, words_in_common, covered, alike)) + "\n")
        for number, sample in texts_of(opened, progress, "compare"):
            hits = [(item, "text", share, text) for item, share, text in index.found([m.text for m in sample.messages])]
            hits += [(item, kind, 1.0, "") for item, kind in shown.get(number, [])]
            matches = []
            for item, kind, share, text in hits:
                found["text" if kind == "text" else "picture"].add(item)
                place = evaluations[item[0]].where(item[1])
                remove = kind != "text" or share >= covered
                matches.append(Match(sample.key, number, place, kind, round(share, 4), text, remove))
            for match in matches:
                stream.write(json.dumps(asdict(match), ensure_ascii=False) + "\n")
            matched += bool(matches)
            marked += any(match.remove for match in matches)
            first += matches[: max(0, 10 - len(first))]
    per_set = [
        Against(
            evaluation.folder.name,
            len(evaluation),
            index.too_short[number],
            index.common[number],
            sum(item[0] == number for item in found["text"]),
            sum(item[0] == number for item in found["picture"]),
        )
        for number, evaluation in enumerate(evaluations)
    ]
    return Survey(per_set, len(opened), matched, marked, first)


def apply(shards: Path, report: Path, out: Path, *, progress: Progress = silent) -> Derived:
    """Write the samples that no line of the report marks; lines may have been deleted or set to `"remove": false`."""
    opened = open_set(shards)
    header = _read_header(report)
    if header["input"] != opened.fingerprint:
        raise ConfigError(f"{report}: is a report about another set than {shards}; run decontaminate on this one first")
    with report.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()

    def decide(work: Path) -> Iterator[Removal]:
        last = -1
        for line, record in _lines(report):
            if not record["remove"] or record["number"] == last:
                continue
            last = record["number"]
            if not 0 <= last < len(opened) or opened.key(last) != record["sample"]:
                raise SampleError(f"{report}:{line}: sample {last} is not {record['sample']!r}; edit only `remove`")
            yield Removal(last, record["kind"], {"item": record["item"]})

    options = header | {"report": digest}
    libraries = {"imagehash": version("imagehash")} if header["alike"] is not None else {}
    return derive(
        opened, out, tool="decontaminate", options=options, decide=decide, libraries=libraries, progress=progress
    )


def table(result: Survey) -> list[str]:
    """The survey in a few lines."""
    lines = [
        f"{'against':<24} {'items':>8} {'too short':>10} {'wording':>8} {'texts found':>12} {'pictures found':>15}"
    ]
    for one in result.against:
        lines.append(
            f"{one.name[:24]:<24} {one.items:>8,} {one.too_short:>10,} {one.common:>8,} {one.found_texts:>12,} "
            f"{one.found_pictures:>15,}"
        )
    lines.append(f"{result.matched:,} of {result.samples:,} samples match, {result.marked:,} are marked for removal")
    for match in result.first:
        words_shown = f": {match.text[:80]}" if match.text else ""
        lines.append(f"  {match.sample} ~ {match.item} ({match.kind}, {match.covered:.0%}){words_shown}")
    return lines


# The report -----------------------------------------------------------------------------------------------------------


def _header(
    shards: ShardSet, evaluations: list[ShardSet], words_in_common: int, covered: float, alike: int | None
) -> dict[str, Any]:
    return {
        "report": "mmit-data decontaminate",
        "input": shards.fingerprint,
        "against": [{"folder": one.folder.name, "fingerprint": one.fingerprint} for one in evaluations],
        "words": words_in_common,
        "covered": covered,
        "alike": alike,
    }


def _read_header(report: Path) -> dict[str, Any]:
    if not report.is_file():
        raise ConfigError(f"{report}: no such file; run decontaminate without --reviewed first, it writes the report")
    with report.open(encoding="utf-8") as stream:
        line = stream.readline()
    try:
        header = json.loads(line)
        if header["report"] == "mmit-data decontaminate":
            return header
    except (ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{report}: its first line is not that of a report of decontaminate; leave that line as it was")


def _lines(report: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with report.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if number == 1 or not line.strip():
                continue
            try:
                record = json.loads(line)
                yield number, {name: record[name] for name in ("sample", "number", "item", "kind", "remove")}
            except (ValueError, KeyError, TypeError) as error:
                raise SampleError(
                    f"{report}:{number}: no line of a report ({type(error).__name__}: {error}); edit only `remove`"
                ) from error


# Texts ----------------------------------------------------------------------------------------------------------------


class _Prompts:
    """The runs of words of the prompts of all evaluation sets, as sorted hashes."""

    def __init__(self, evaluations: list[ShardSet], most: int, progress: Progress) -> None:
        self.evaluations, self.most = evaluations, most
        self.too_short, self.common = [0] * len(evaluations), [0] * len(evaluations)
        hashes: dict[int, list[np.ndarray]] = {}
        items: dict[int, list[np.ndarray]] = {}
        for number, evaluation in enumerate(evaluations):
            for item, sample in texts_of(evaluation, progress, f"read {evaluation.folder.name}"):
                prompts = [words(m.text) for m in sample.messages if m.role == "user"]
                long = [prompt for prompt in prompts if len(prompt) >= LEAST_WORDS]
                self.too_short[number] += not long
                for prompt in long:
                    length = min(most, len(prompt))
                    found = np.unique(_runs(prompt, (length,))[length])
                    hashes.setdefault(length, []).append(found)
                    items.setdefault(length, []).append(np.full((len(found), 2), (number, item), dtype=np.int32))
        self.lengths = tuple(sorted(hashes))
        self.hashes: dict[int, np.ndarray] = {}
        self.items: dict[int, np.ndarray] = {}
        for length in self.lengths:
            joined, owners = np.concatenate(hashes.pop(length)), np.concatenate(items.pop(length))
            order = np.argsort(joined, kind="stable")
            self._keep(length, joined[order], owners[order])

        @lru_cache(maxsize=4096)
        def prompts_of(evaluation: int, item: int) -> list[list[str]]:
            sample = evaluations[evaluation].read(item, images=False)
            return [words(m.text) for m in sample.messages if m.role == "user"]

        self.prompts_of = prompts_of

    def _keep(self, length: int, hashes: np.ndarray, items: np.ndarray) -> None:
        """Leaves out, by evaluation, what is only its wording."""
        kept = np.ones(len(hashes), dtype=bool)
        for number, evaluation in enumerate(self.evaluations):
            mine = np.flatnonzero(items[:, 0] == number)
            _, inverse, counts = np.unique(hashes[mine], return_inverse=True, return_counts=True)
            wording = counts > max(COMMON, COMMON_SHARE * len(evaluation))
            self.common[number] += int(wording.sum())
            kept[mine] = ~wording[inverse]
        self.hashes[length], self.items[length] = hashes[kept], items[kept]

    def found(self, texts: list[str]) -> list[tuple[tuple[int, int], float, str]]:
        """The items whose prompts these texts hold in part or whole: item, share covered, longest run; best first."""
        split = [words(text) for text in texts]
        candidates: set[tuple[int, int]] = set()
        for part in split:
            for length, runs in _runs(part, self.lengths).items():
                begins = np.searchsorted(self.hashes[length], runs, side="left")
                ends = np.searchsorted(self.hashes[length], runs, side="right")
                for place in np.flatnonzero(ends > begins).tolist():
                    rows = self.items[length][begins[place] : ends[place]]
                    candidates.update((int(a), int(b)) for a, b in rows)
        results = []
        for item in sorted(candidates):
            share, text = max(self._covered(prompt, split) for prompt in self.prompts_of(*item))
            if share > 0:
                results.append((item, share, text))
        results.sort(key=lambda result: (-result[1], result[0]))
        return results[:MOST_MATCHES]

    def _covered(self, prompt: list[str], texts: list[list[str]]) -> tuple[float, str]:
        """Share of the words of a prompt that lie in runs which the texts have too, word by word, and the longest."""
        length = min(self.most, len(prompt))
        if length < LEAST_WORDS:
            return 0.0, ""
        theirs = {tuple(text[i : i + length]) for text in texts for i in range(len(text) - length + 1)}
        inside = np.zeros(len(prompt) + 1, dtype=bool)
        for i in range(len(prompt) - length + 1):
            if tuple(prompt[i : i + length]) in theirs:
                inside[i : i + length] = True
        if not inside.any():
            return 0.0, ""
        edges = np.flatnonzero(np.diff(inside.astype(np.int8), prepend=0)).reshape(-1, 2)
        longest = edges[int(np.argmax(edges[:, 1] - edges[:, 0]))]
        return float(inside.sum()) / len(prompt), " ".join(prompt[longest[0] : longest[1]])[:MOST_TEXT]


@lru_cache(maxsize=1 << 18)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _runs(text: list[str], lengths: Sequence[int]) -> dict[int, np.ndarray]:
    """uint64 hashes of all runs of words, by length; polynomial, so that each length continues the one before."""
    values = np.fromiter((_hash(word) for word in text), dtype=np.uint64, count=len(text))
    found = {}
    runs = np.zeros(len(text), dtype=np.uint64)
    for length in range(1, max(lengths, default=0) + 1):
        count = len(text) - length + 1
        if count <= 0:
            break
        runs = runs[:count] * BASE + values[length - 1 :]
        if length in lengths:
            found[length] = runs
    return found


# Pictures -------------------------------------------------------------------------------------------------------------


def _pictures(
    shards: ShardSet, evaluations: list[ShardSet], alike: int | None, progress: Progress
) -> dict[int, list[tuple[tuple[int, int], str]]]:
    """Of every sample that shows a picture of an evaluation set: the first item of each set that shows it, and how."""
    shown: dict[int, list[tuple[tuple[int, int], str]]] = {}
    owners, hashes = shards.pictures()
    for number, evaluation in enumerate(evaluations):
        theirs, their_hashes = evaluation.pictures()
        distinct, first = np.unique(their_hashes, return_index=True)
        same: Counter[int] = Counter()
        for picture in np.flatnonzero(np.isin(hashes, distinct)).tolist():
            owner = int(owners[picture])
            if not same[owner]:
                item = int(theirs[first[np.searchsorted(distinct, hashes[picture])]])
                shown.setdefault(owner, []).append(((number, item), "picture"))
            same[owner] += 1
        if alike is None:
            continue
        with tempfile.TemporaryDirectory() as ours_kept, tempfile.TemporaryDirectory() as theirs_kept:
            ours = prints_of(shards, Path(ours_kept), progress)
            other = prints_of(evaluation, Path(theirs_kept), progress)
        found: dict[int, int] = {}
        for query, near in pictures_alike(other.values, ours.values, alike):
            item = int(other.owners[np.flatnonzero(other.shown == query)[0]])
            for picture in near.tolist():
                found[picture] = min(item, found.get(picture, item))
        for picture in np.flatnonzero(np.isin(ours.shown, list(found))).tolist():
            owner = int(ours.owners[picture])
            if not same[owner]:
                shown.setdefault(owner, []).append(((number, found[int(ours.shown[picture])]), "alike"))
                same[owner] += 1
    return shown
