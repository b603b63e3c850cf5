"""From a step's number to its rows: order, rendering, dealing, pixels. The loader's whole state is that number.

Each worker makes whole steps. It renders every sample of the step (or finds the ids in the cache; no picture is opened
for that), deals them to all ranks alike, and decodes the pictures of its own rank alone.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import struct
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mmit.config import ConfigError
from mmit.data.cache import RecordCache
from mmit.data.chat import Chat, Rendered, cut
from mmit.data.fit import PictureFit
from mmit.data.images import decode, reuse_memory
from mmit.data.order import Occurrence, Order
from mmit.data.packing import Costs, Example, Load, Row, blank, deal, pack
from mmit.data.remote import RemoteError, Stopped
from mmit.data.sample import BoxPart, Picture, Sample, SampleError
from mmit.data.shards import ShardSet

T = TypeVar("T")
Fault = SampleError | ConfigError | OSError
"""What stops the reading of samples and is told in a line."""
CACHE_HEADER = struct.Struct("<II")  # tokens, image spans


@dataclass(frozen=True)
class Hole:
    """A sample that takes no part in its step, and why: `bad` (see on_bad_sample) or `long` (max_tokens)."""

    where: str
    source: int
    kind: Literal["bad", "long"]
    reason: str
    here: bool = False
    """Found while decoding a picture, so known to this rank alone, which has taken the counts below out of its step."""
    tokens: int = 0
    pictures: int = 0
    was_cut: bool = False
    unlabelled: bool = False


@dataclass(frozen=True)
class Step:
    """What one rank computes in one step."""

    number: int
    rows: tuple[Row, ...]
    samples: int
    """Samples of the step over all ranks; also `tokens`, `pictures` and `holes`. But for pictures that cannot be
    decoded: only the rank that decodes them knows, and tells of its own (`Hole.here`)."""
    tokens: int
    pictures: int
    holes: tuple[Hole, ...]
    cut: int
    """Samples that lost trailing turns to max_tokens."""
    unlabelled: int
    """Samples in which nothing is learned."""

    @property
    def supervised(self) -> int:
        """Tokens that this rank learns from."""
        return sum(len(row.predicts) for row in self.rows)

    def pin_memory(self) -> Self:
        return replace(self, rows=tuple(row.pin_memory() for row in self.rows))


@dataclass(frozen=True)
class Rendering:
    """How a sample becomes ids: everything that the cached ids depend on."""

    chat: Chat
    fit: PictureFit | None
    """None for a model without vision, which refuses pictures."""
    image_tokens: int
    """Tokens of one picture, the same for every size under crop, pad and squash."""
    max_tokens: int
    over_long: Literal["cut", "drop"]

    @property
    def fingerprint(self) -> str:
        text = f"3 {self.chat.fingerprint} {self.fit} {self.image_tokens} {self.max_tokens} {self.over_long}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def render(self, sample: Sample, where: str) -> Rendered:
        if sample.images and self.fit is None:
            raise SampleError(f"{where}: the sample shows {len(sample.images)} pictures, but model.vision is null")
        tokens = [self.image_tokens] * len(sample.images)
        try:
            return self.chat.render(sample, tokens, boxes=lambda part: self._box(part, sample.images))
        except SampleError as error:  # the chat knows the sample, not the shard that holds it
            raise SampleError(f"{where}: {str(error).removeprefix(f'{sample.source}:{sample.key}: ')}") from None

    def identity(self, picture: Picture) -> bytes:
        """What names a fitted picture: equal for equal pixels, so that a row encodes it once, and a cache once ever."""
        return hashlib.sha256(f"{picture.sha256} {picture.window} {self.fit}".encode()).digest()

    def _box(self, part: BoxPart, pictures: Sequence[Picture]) -> str:
        """Corners as shares of the fitted picture, left, top, right, bottom, with two decimals."""
        assert self.fit is not None
        shown = pictures[part.image]
        corners = self.fit.place(shown.width, shown.height, (part.left, part.top, part.right, part.bottom))
        return "[" + ", ".join(f"{corner:.2f}" for corner in corners) + "]"


class Encoder:
    """Samples of one source as examples, with their ids cached in one file a shard."""

    def __init__(self, shards: ShardSet, rendering: Rendering, source: int, cache: Path | None) -> None:
        self.shards, self.rendering, self.source = shards, rendering, source
        folder = cache / "ids" / rendering.fingerprint if cache is not None else None
        self.caches = [
            RecordCache(folder / f"{sha256[:32]}.ids") if folder is not None else None for sha256 in shards.shard_sha256
        ]

    def example(self, index: int) -> tuple[Example, bool] | str:
        """The example of sample `index` and whether it was cut, or why it is too long. Raises `SampleError`."""
        shard, row = self.shards.shard_of(index)
        cache, key = self.caches[shard], struct.pack("<I", row)
        record = cache.get(key) if cache is not None else None
        if record is None:
            record = self._render(index)
            if cache is not None:
                cache.put(key, record)
        return self._unpack(record, index)

    def pixels(self, index: int, wanted: Set[bytes] | None = None) -> Iterator[tuple[bytes, Tensor]]:
        """The `wanted` pictures of sample `index` (None: all), each with its identity: `(3, side, side)` uint8."""
        assert self.rendering.fit is not None
        where = self.shards.where(index)
        for picture in self.shards.read(index).images:
            assert picture.data is not None
            identity = self.rendering.identity(picture)
            if wanted is None or identity in wanted:
                yield identity, self.rendering.fit.apply(decode(picture.data, where, window=picture.window))

    def _render(self, index: int) -> bytes:
        where = self.shards.where(index)
        sample = self.shards.read(index, images=False)
        whole = self.rendering.render(sample, where)
        kept = cut(whole, self.rendering.max_tokens, self.rendering.over_long)
        if kept is None:
            return CACHE_HEADER.pack(0, len(whole.ids))
        spans = np.asarray(kept.images, dtype=np.int32).reshape(-1, 3)
        learned = np.packbits(kept.labels != -100)
        head = CACHE_HEADER.pack(len(kept.ids), len(spans)) + bytes([len(kept.ids) < len(whole.ids)])
        names = b"".join(self.rendering.identity(picture) for picture in sample.images)
        return head + kept.ids.astype("<i4").tobytes() + learned.tobytes() + spans.astype("<i4").tobytes() + names

    def _unpack(self, record: bytes, index: int) -> tuple[Example, bool] | str:
        tokens, spans = CACHE_HEADER.unpack_from(record)
        if tokens == 0:
            return f"{spans} tokens, more than max_tokens {self.rendering.max_tokens} in its first turn or whole"
        start = CACHE_HEADER.size
        was_cut = bool(record[start])
        ids = np.frombuffer(record, "<i4", tokens, start + 1)
        mask = np.frombuffer(record, np.uint8, -(-tokens // 8), start + 1 + 4 * tokens)
        learned = np.unpackbits(mask, count=tokens).astype(bool)
        after_mask = start + 1 + 4 * tokens + len(mask)
        image_spans = np.frombuffer(record, "<i4", 3 * spans, after_mask).reshape(-1, 3)
        names = record[after_mask + 12 * spans :]
        pictures = tuple(names[place : place + 32] for place in range(0, len(names), 32))
        labels = np.where(learned, ids, -100).astype(np.int32)
        return Example(ids, labels, image_spans, self.source, self.shards.where(index), pictures), was_cut


@dataclass(frozen=True, eq=False)
class Steps(Dataset[Step]):
    """The steps of a stage for one rank, by number."""

    order: Order
    encoders: Sequence[Encoder]
    rank: int = 0
    ranks: int = 1
    row_tokens: int = 8192
    row_images: int | None = None
    costs: Costs = field(default_factory=Costs)
    on_bad_sample: Literal["raise", "skip"] = "raise"
    reading: Tensor | None = None
    """`(workers, 3)` int64 in shared memory: each worker's process, and the source and index of what it reads."""

    def __getitem__(self, number: int) -> Step:
        occurrences = self.order.step(number)
        ready: list[tuple[Occurrence, Example]] = []
        was_cut: list[bool] = []
        holes: list[Hole] = []
        lost: set[int] = set()
        for occurrence in occurrences:
            outcome = self.guard(occurrence, lambda encoder, index: encoder.example(index))
            if isinstance(outcome, Hole):
                holes.append(outcome)
            elif isinstance(outcome, str):
                encoder = self.encoders[occurrence.source]
                holes.append(Hole(encoder.shards.where(occurrence.index), encoder.source, "long", outcome))
            else:
                ready.append((occurrence, outcome[0]))
                was_cut.append(outcome[1])
        loads = [Load(len(example.ids), tuple(_shown(example))) for _, example in ready]
        dealt = deal(loads, self.ranks, row_tokens=self.row_tokens, row_images=self.row_images, costs=self.costs)
        rows = []
        for row in dealt[self.rank]:
            packed, faults = self._row([ready[i] for i in row], touch_vision=self.ranks > 1)
            rows.append(packed)
            lost.update(row[place] for place in faults)
            for place, fault in faults.items():
                i = row[place]
                holes.append(
                    replace(
                        fault,
                        here=True,
                        tokens=loads[i].tokens,
                        pictures=len(loads[i].pictures),
                        was_cut=was_cut[i],
                        unlabelled=ready[i][1].supervised == 0,
                    )
                )
        taken = [i for i in range(len(ready)) if i not in lost]
        return Step(
            number=number,
            rows=tuple(rows),
            samples=len(taken),
            tokens=sum(loads[i].tokens for i in taken),
            pictures=sum(len(loads[i].pictures) for i in taken),
            holes=tuple(holes),
            cut=sum(was_cut[i] for i in taken),
            unlabelled=sum(ready[i][1].supervised == 0 for i in taken),
        )

    def _row(self, members: Sequence[tuple[Occurrence, Example]], *, touch_vision: bool) -> tuple[Row, dict[int, Hole]]:
        """The row of those members whose pictures can be read, and the holes of the others by their place."""
        pixels: dict[bytes, Tensor] = {}
        examples, holes = [], {}
        for place, (occurrence, example) in enumerate(members):
            shown = set(_shown(example))
            if shown:
                # Read, and so checked, even if another sample of the row shows the same: a damaged copy is a hole in
                # every layout or in none.
                missing = shown - pixels.keys()
                found = self.guard(occurrence, lambda encoder, i, new=missing: dict(encoder.pixels(i, new)))
                if isinstance(found, Hole):
                    holes[place] = found
                    continue
                pixels.update(found)
            examples.append(example)
        keys = list(dict.fromkeys(key for example in examples for key in _shown(example)))
        return pack(examples, [pixels[key] for key in keys], keys, touch_vision=touch_vision), holes

    def try_example(self, encoder: Encoder, index: int) -> tuple[Example, bool] | str | None:
        """As `encoder.example`, None for a bad sample that the stage skips."""
        outcome = self.guard(Occurrence(self.encoders.index(encoder), index, 0), lambda e, i: e.example(i))
        return None if isinstance(outcome, Hole) else outcome

    def guard(self, occurrence: Occurrence, read: Callable[[Encoder, int], T]) -> T | Hole:
        """What `read` gives, or a hole where the sample is bad and the stage says to skip such samples."""
        encoder, worker = self.encoders[occurrence.source], get_worker_info()
        if self.reading is not None and worker is not None:
            self.reading[worker.id, 1:] = torch.tensor((occurrence.source, occurrence.index))
        try:
            return read(encoder, occurrence.index)
        except SampleError as error:
            if self.on_bad_sample == "raise" or isinstance(error, RemoteError):
                raise
            return Hole(encoder.shards.where(occurrence.index), encoder.source, "bad", str(error))


def _shown(example: Example) -> list[bytes]:
    return [example.pictures[picture] for picture in dict.fromkeys(example.spans[:, 2].tolist())]


def load(
    steps: Steps,
    start: int,
    stop: int,
    *,
    workers: int,
    timeout: float = 120,
    pin: bool = False,
    stoppable: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Generator[Step]:
    """Steps `start` to `stop` in order, made ahead by `workers` processes (0: in this one); `pin` them for a GPU.

    SampleError names what the workers read when one dies, or when no step comes for `timeout` seconds. Steps are
    waited for inside `stoppable`, since a tar may take minutes to come: where that raises `Stopped`, the last step that
    is given is an empty one.
    """
    if workers:
        steps = replace(steps, reading=torch.full((workers, 3), -1).share_memory_())
    loader = DataLoader(
        _Told(steps),
        sampler=range(start, stop),
        batch_size=None,
        num_workers=workers,
        # A worker may be fetching a tar from far away, and gives up by itself.
        timeout=timeout if workers and not any(encoder.shards.is_remote for encoder in steps.encoders) else 0,
        prefetch_factor=2 if workers else None,
        pin_memory=pin,
        # Without its own generator, iter(DataLoader) would draw from the global one, and a resumed run would differ.
        generator=torch.Generator(),
        worker_init_fn=_prepare_worker,
    )
    made, number = iter(loader), start
    try:
        with _deaths_told(steps):
            while number < stop:  # and not to the end of `made`: other ranks would not have a step after the last
                with stoppable():
                    step = _next(made, steps)
                if isinstance(step, Exception):
                    raise step
                yield step
                number += 1
    except Stopped:
        _kill_workers(steps)
        yield Step(number, (blank(),), samples=0, tokens=0, pictures=0, holes=(), cut=0, unlabelled=0)
    finally:
        # A fault's traceback would keep the workers, which heed no signal, and the interpreter waits for them at exit.
        del made


def _kill_workers(steps: Steps) -> None:
    """What hangs or fetches heeds nothing less, and would be waited for; torch does not hear of these deaths."""
    processes = steps.reading[:, 0].tolist() if steps.reading is not None else []
    before = signal.getsignal(signal.SIGCHLD)
    in_main = threading.current_thread() is threading.main_thread()
    if in_main:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for child in multiprocessing.active_children():
            if child.pid in processes:
                child.kill()
                child.join()
    finally:
        if in_main:
            signal.signal(signal.SIGCHLD, before)


def _next(made: Iterator[Step | Fault], steps: Steps) -> Step | Fault:
    try:
        return next(made)
    except RuntimeError as error:
        if steps.reading is None or not str(error).startswith("DataLoader "):
            raise
        fault = _lost(steps, error)
        _kill_workers(steps)
        raise fault from None


@contextmanager
def _deaths_told(steps: Steps) -> Iterator[None]:
    """torch raises where a worker's death is noticed, anywhere in the training; inside the block, what it read too."""
    before = signal.getsignal(signal.SIGCHLD)

    def told(number: int, frame: FrameType | None) -> None:
        if callable(before):
            try:
                before(number, frame)
            except RuntimeError as error:
                raise _lost(steps, error) from None

    if steps.reading is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGCHLD, told)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _lost(steps: Steps, error: RuntimeError) -> SampleError:
    assert steps.reading is not None
    found = [steps.encoders[source].shards.where(index) for _, source, index in steps.reading.tolist() if source >= 0]
    return SampleError(
        f"loader: {' '.join(str(error).split())[:200]} In the hands of its workers: {', '.join(found) or 'no sample'}. "
        f"Look at them with `mmit-data verify`; if memory ran out, lower `workers`"
    )


@dataclass(frozen=True, eq=False)
class _Told(Dataset[Step | Fault]):
    """The steps, a fault given instead of raised: torch would put a worker's traceback into its message."""

    steps: Steps

    def __getitem__(self, number: int) -> Step | Fault:
        self._reads_nothing()
        try:
            return self.steps[number]
        except (SampleError, ConfigError, OSError) as error:
            return error
        finally:
            self._reads_nothing()

    def _reads_nothing(self) -> None:
        worker = get_worker_info()
        if self.steps.reading is not None and worker is not None:
            self.steps.reading[worker.id] = torch.tensor((os.getpid(), -1, -1))


def _prepare_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    reuse_memory()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        # A terminal and a scheduler signal the whole group; the process that trains saves first, then lets workers go.
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _unless_left


def _unless_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Tells what nobody caught, but that a signal took the process that trains away while it was handed a step."""
    if not issubclass(kind, EOFError | ConnectionError | multiprocessing.AuthenticationError):
        sys.__excepthook__(kind, error, trace)
