"""Laws of the loader: a step is the same samples, ids and pixels for any workers, ranks, start and cache."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmit.config import ConfigError
from mmit.data import loader
from mmit.data.byte_tokenizer import byte_tokenizer
from mmit.data.chat import Chat, resolve
from mmit.data.fit import PictureFit
from mmit.data.images import decode
from mmit.data.loader import Encoder, Rendering, Step, Steps, load
from mmit.data.order import Order, Origin
from mmit.data.packing import Row
from mmit.data.remote import Stopped
from mmit.data.sample import BoxPart, ImagePart, Picture, Sample, SampleError, message
from mmit.data.shards import ShardSet, write_shards
from tests.data.pictures import PICTURES, mixed, picture, sample

# Three workers on a machine of two CPUs are what these tests want; torch warns of them.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

FIT = PictureFit("pad", 8, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), "bicubic")
IMAGE_TOKENS = 4


@pytest.fixture(scope="module")
def chat() -> Chat:
    tokenizer = byte_tokenizer()
    return resolve("chatml", tokenizer, placeholder=tokenizer.convert_tokens_to_ids("<image>"))


@pytest.fixture(scope="module")
def rendering(chat: Chat) -> Rendering:
    return Rendering(chat, FIT, IMAGE_TOKENS, 400, "cut")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[ShardSet]:
    """Two sources with pictures in common; the second also shows boxes and pictures twice."""
    root = tmp_path_factory.mktemp("sets")
    second = [
        Sample(
            f"s{n:03d}",
            "second",
            (
                message("user", ImagePart(1), "and", ImagePart(0), "and", ImagePart(1), "at", BoxPart(0, 1, 2, 7, 8)),
                message("assistant", "so" * n),
            ),
            (PICTURES[n % 6], PICTURES[(n + 2) % 6]),
        )
        for n in range(13)
    ]
    return [
        write_shards(mixed(23), root / "first", samples_per_shard=5),
        write_shards(second, root / "second", samples_per_shard=4),
    ]


def steps_of(sets: Sequence[ShardSet], rendering: Rendering, cache: Path | None = None, **layout: Any) -> Steps:
    origins = tuple(
        Origin(shards.fingerprint, np.arange(len(shards)), repeat=1.5 if number else 1.0)
        for number, shards in enumerate(sets)
    )
    encoders = [Encoder(shards, rendering, number, cache) for number, shards in enumerate(sets)]
    return Steps(Order(origins, 0, layout.pop("batch_size", 9)), encoders, **({"row_tokens": 500} | layout))


def told(found: Step | Row) -> dict[str, Any]:
    """A step or row as values that compare to the bit."""
    values = {}
    for field in fields(found):
        value = getattr(found, field.name)
        if isinstance(value, torch.Tensor):
            value = (value.dtype, value.shape, value.numpy().tobytes())
        elif field.name == "rows":
            value = [told(row) for row in value]
        values[field.name] = value
    return values


def all_told(steps: Iterable[Step]) -> list[dict[str, Any]]:
    return [told(step) for step in steps]


def apart(steps: Iterable[Step]) -> list[Counter[Any]]:
    """Per step: each sample by its place, ids, what it learns and its pixels, whatever the rows it lies in."""
    steps = list(steps)
    found: dict[int, Counter[Any]] = {step.number: Counter() for step in steps}
    for step in steps:
        for row in step.rows:
            spans_before = 0
            for number, where in enumerate(row.samples):
                start, stop = row.boundaries[number].item(), row.boundaries[number + 1].item()
                inside = (row.predicts >= start) & (row.predicts < stop)
                spans = int(row.is_image[0, start:stop].sum()) // IMAGE_TOKENS
                shown = row.shown[spans_before : spans_before + spans]
                spans_before += spans
                found[step.number][
                    where,
                    tuple(row.ids[0, start:stop].tolist()),
                    tuple((row.predicts[inside] - start).tolist()),
                    tuple(row.targets[inside].tolist()),
                    tuple(row.sources[inside].tolist()),
                    tuple(hashlib.sha256(row.pixels[place].numpy().tobytes()).hexdigest() for place in shown),
                ] += 1
            assert spans_before == len(row.shown)
    return [found[number] for number in sorted(found)]


# Equal for every layout ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(sets: list[ShardSet], rendering: Rendering) -> list[Step]:
    return list(load(steps_of(sets, rendering), 0, 8, workers=0))


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_steps(
    sets: list[ShardSet], rendering: Rendering, straight: list[Step], tmp_path: Path, workers: int
) -> None:
    found = list(load(steps_of(sets, rendering, tmp_path), 0, 8, workers=workers))
    assert all_told(found) == all_told(straight)


@pytest.mark.parametrize("start", [1, 5])
def test_starting_at_any_step_gives_the_same_steps(
    sets: list[ShardSet], rendering: Rendering, straight: list[Step], start: int
) -> None:
    assert all_told(load(steps_of(sets, rendering), start, 8, workers=0)) == all_told(straight[start:])
    assert all_told(load(steps_of(sets, rendering), start, 8, workers=2)) == all_told(straight[start:])


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_together_hold_the_samples_of_one_alone(
    sets: list[ShardSet], rendering: Rendering, straight: list[Step], ranks: int
) -> None:
    alone = apart(straight)
    by_rank = [list(load(steps_of(sets, rendering, rank=r, ranks=ranks), 0, 8, workers=0)) for r in range(ranks)]
    together = [sum(parts, Counter()) for parts in zip(*(apart(steps) for steps in by_rank), strict=True)]
    assert together == alone
    for same_step in zip(*by_rank, strict=True):
        assert len({len(step.rows) for step in same_step}) == 1
        assert len({(step.samples, step.tokens, step.pictures, step.holes, step.cut) for step in same_step}) == 1
        for rows in zip(*(step.rows for step in same_step), strict=True):
            # A collective waits for all: where one rank encodes pictures, every rank must.
            assert len({row.touch_vision for row in rows}) == 1
            assert rows[0].touch_vision == any(len(row.pixels) for row in rows)


def test_other_row_sizes_hold_the_same_samples(
    sets: list[ShardSet], rendering: Rendering, straight: list[Step]
) -> None:
    for row_tokens, row_images in ((400, 1), (10_000, None)):
        steps = steps_of(sets, rendering, row_tokens=row_tokens, row_images=row_images)
        assert apart(load(steps, 0, 8, workers=0)) == apart(straight)


def test_a_pickled_loader_gives_the_same_steps(
    sets: list[ShardSet], rendering: Rendering, straight: list[Step], tmp_path: Path
) -> None:
    """macOS spawns its workers, as later Pythons do."""
    steps = steps_of(sets, rendering, tmp_path)
    assert told(steps[1]) == told(straight[1])
    copy = pickle.loads(pickle.dumps(steps))
    assert [told(copy[number]) for number in (0, 6)] == [told(straight[number]) for number in (0, 6)]


def test_loading_draws_nothing_from_any_global_generator(sets: list[ShardSet], rendering: Rendering) -> None:
    for workers in (0, 2):
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
        for _ in load(steps_of(sets, rendering), 0, 3, workers=workers):
            pass
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]


# What a step holds --------------------------------------------------------------------------------------------------


def test_a_step_holds_what_rendering_and_decoding_each_sample_by_hand_gives(
    sets: list[ShardSet], rendering: Rendering, straight: list[Step]
) -> None:
    order = steps_of(sets, rendering).order
    for step, found in zip(straight, apart(straight), strict=True):
        expected: Counter[Any] = Counter()
        for taken in order.step(step.number):
            made = sets[taken.source].read(taken.index)
            rendered = rendering.render(made, "")
            learned = [place for place in range(1, len(rendered.labels)) if rendered.labels[place] != -100]
            fitted = [FIT.apply(decode(p.data or b"", "", window=p.window)).numpy().tobytes() for p in made.images]
            expected[
                sets[taken.source].where(taken.index),
                tuple(rendered.ids.tolist()),
                tuple(place - 1 for place in learned),
                tuple(rendered.ids[learned].tolist()),
                (taken.source,) * len(learned),
                tuple(hashlib.sha256(fitted[number]).hexdigest() for _, _, number in rendered.images),
            ] += 1
        assert found == expected
        assert step.samples == expected.total()
        assert step.tokens == sum(len(key[1]) * count for key, count in expected.items())


def test_a_picture_that_samples_share_is_in_a_row_once(sets: list[ShardSet], rendering: Rendering) -> None:
    step = steps_of(sets, rendering, row_tokens=10_000, batch_size=36)[0]
    (row,) = step.rows
    assert len(row.pixels) == len(row.keys) == len(set(row.keys)) == 6
    assert len(row.shown) > 30


def test_cached_ids_are_the_ids_rendered_anew(
    sets: list[ShardSet],
    rendering: Rendering,
    straight: list[Step],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert all_told(load(steps_of(sets, rendering, tmp_path), 0, 8, workers=0)) == all_told(straight)

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("rendered although cached")

    monkeypatch.setattr(Rendering, "render", refused)
    assert all_told(load(steps_of(sets, rendering, tmp_path), 0, 8, workers=0)) == all_told(straight)


def test_another_rendering_never_meets_these_cached_ids(
    sets: list[ShardSet], rendering: Rendering, tmp_path: Path
) -> None:
    changes = [
        {},
        {"image_tokens": 5},
        {"max_tokens": 60},
        {"max_tokens": 60, "over_long": "drop"},
        {"fit": replace(FIT, policy="crop")},
        {"chat": resolve("vicuna_v1", byte_tokenizer(), placeholder=rendering.chat.placeholder)},
    ]
    renderings = [replace(rendering, **change) for change in changes]
    assert len({made.fingerprint for made in renderings}) == len(changes)
    for made in renderings:
        for shards in sets:
            for index in range(len(shards)):
                cached = Encoder(shards, made, 0, tmp_path).example(index)
                fresh = Encoder(shards, made, 0, None).example(index)
                assert pickle.dumps(cached) == pickle.dumps(fresh)


def test_no_picture_is_opened_to_count_tokens(
    sets: list[ShardSet], rendering: Rendering, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ShardSet.read

    def only_text(shards: ShardSet, i: int, *, images: bool = True) -> Sample:
        assert not images
        return read(shards, i, images=False)

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ShardSet, "read", only_text)
    monkeypatch.setattr(loader, "decode", refused)
    monkeypatch.setattr(PictureFit, "apply", refused)
    for number, shards in enumerate(sets):
        encoder = Encoder(shards, rendering, number, None)
        assert all(isinstance(encoder.example(i), tuple) for i in range(len(shards)))


# Too long -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Samples of 1 to 12 turns; each third shows a picture in every turn."""
    made = []
    for n in range(12):
        turns = []
        for turn in range(n + 1):
            shown = (ImagePart(turn),) if n % 3 == 0 else ()
            turns += [message("user", *shown, f"question {turn}"), message("assistant", f"answer {turn}" * (n + 1))]
        pictures = tuple(PICTURES[turn % 6] for turn in range(n + 1)) if n % 3 == 0 else ()
        made.append(Sample(f"g{n}", "growing", tuple(turns), pictures))
    return write_shards(made, tmp_path_factory.mktemp("growing") / "set")


@pytest.mark.parametrize("over_long", ["cut", "drop"])
@pytest.mark.parametrize("max_tokens", [90, 300, 5000])
def test_what_is_too_long_loses_whole_turns_or_leaves_a_counted_hole(
    growing: ShardSet, rendering: Rendering, over_long: str, max_tokens: int
) -> None:
    made = replace(rendering, max_tokens=max_tokens, over_long=over_long)  # type: ignore[arg-type]
    step = steps_of([growing], made, batch_size=12, row_tokens=5000)[0]
    whole, cut, dropped = {}, {}, set()
    for index in range(12):
        shown = growing.read(index)
        lengths = []
        for turns in range(1, len(shown.messages) // 2 + 1):
            used = {p.image for m in shown.messages[: 2 * turns] for p in m.parts if isinstance(p, ImagePart)}
            part = replace(shown, messages=shown.messages[: 2 * turns], images=shown.images[: len(used)])
            lengths.append(len(rendering.chat.render(part, [IMAGE_TOKENS] * len(used))))
        if lengths[-1] <= max_tokens:
            whole[growing.where(index)] = lengths[-1]
        elif over_long == "drop" or lengths[0] > max_tokens:
            dropped.add(growing.where(index))
        else:
            cut[growing.where(index)] = max(length for length in lengths if length <= max_tokens)
    found = {
        where: int(row.boundaries[n + 1] - row.boundaries[n])
        for row in step.rows
        for n, where in enumerate(row.samples)
    }
    assert found == whole | cut
    assert {hole.where for hole in step.holes} == dropped
    assert {hole.kind for hole in step.holes} <= {"long"}
    assert all(str(max_tokens) in hole.reason for hole in step.holes)
    assert (step.samples, step.cut, len(step.holes)) == (len(found), len(cut), len(dropped))
    assert max_tokens == 5000 or cut or dropped


def test_a_step_that_lost_all_its_samples_still_has_a_row_for_every_rank(
    growing: ShardSet, rendering: Rendering
) -> None:
    made = replace(rendering, max_tokens=3)
    for rank in range(2):
        step = steps_of([growing], made, batch_size=4, rank=rank, ranks=2)[0]
        assert [len(row.predicts) for row in step.rows] == [0]
        assert (step.samples, len(step.holes)) == (0, 4)


# Bad samples --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Sample 3 shows a picture whose file ends early; 5 and 8 share it; 7 shows a whole one and then the bad one."""
    whole = picture(40, 30, seed=9)
    assert whole.data is not None
    data = whole.data[: len(whole.data) // 2]
    bad = Picture(40, 30, hashlib.sha256(data).hexdigest(), "png", data)
    shown = {3: (bad,), 5: (bad,), 8: (bad, PICTURES[0]), 7: (PICTURES[1], bad), 2: (PICTURES[1],), 4: (PICTURES[0],)}
    made = [sample(n, *shown.get(n, ())) for n in range(12)]
    return write_shards(made, tmp_path_factory.mktemp("damaged") / "set", samples_per_shard=4)


BAD = {3, 5, 7, 8}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_bad_picture_stops_with_the_name_of_its_sample(damaged: ShardSet, rendering: Rendering, workers: int) -> None:
    steps = steps_of([damaged], rendering, batch_size=12)
    with pytest.raises(SampleError) as caught:
        list(load(steps, 0, 1, workers=workers))
    text = str(caught.value)
    assert any(text.startswith(damaged.where(index)) for index in BAD)
    assert "Traceback" not in text
    assert "\n" not in text


def test_a_bad_sample_that_is_skipped_leaves_the_same_hole_for_any_workers(
    damaged: ShardSet, rendering: Rendering
) -> None:
    steps = steps_of([damaged], rendering, batch_size=5, on_bad_sample="skip")
    straight = list(load(steps, 0, 6, workers=0))
    for workers in (1, 3):
        assert all_told(load(steps, 0, 6, workers=workers)) == all_told(straight)
    for epoch in (straight[:3], straight[3:]):
        holes = [hole for step in epoch for hole in step.holes]
        assert sorted(hole.where for hole in holes) == sorted(damaged.where(index) for index in BAD)
        assert all(hole.kind == "bad" and hole.where in hole.reason for hole in holes)
        taken = [where for step in epoch for row in step.rows for where in row.samples]
        assert sorted(taken) == sorted(damaged.where(index) for index in range(12) if index not in BAD)


def test_a_step_counts_the_samples_that_take_part(damaged: ShardSet, rendering: Rendering) -> None:
    step = steps_of([damaged], rendering, batch_size=12, on_bad_sample="skip")[0]
    assert step.samples == sum(len(row.samples) for row in step.rows) == 8
    assert step.tokens == sum(row.ids.shape[1] for row in step.rows if row.samples)
    assert step.pictures == sum(len(row.pixels) for row in step.rows) == 2


@pytest.mark.parametrize("ranks", [2, 4])
def test_bad_samples_are_the_same_for_any_ranks(damaged: ShardSet, rendering: Rendering, ranks: int) -> None:
    alone = apart([steps_of([damaged], rendering, batch_size=12, on_bad_sample="skip")[0]])
    parts = [
        steps_of([damaged], rendering, batch_size=12, on_bad_sample="skip", rank=rank, ranks=ranks)[0]
        for rank in range(ranks)
    ]
    assert sum((apart([part])[0] for part in parts), Counter()) == alone[0]
    assert sorted(hole.where for part in parts for hole in part.holes) == sorted(damaged.where(i) for i in BAD)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_picture_changed_in_one_place_is_bad_there_whatever_row_shows_its_twin(
    tmp_path: Path, rendering: Rendering, ranks: int
) -> None:
    """Two samples hold the same picture, and the tar is damaged in one of the copies."""
    shards = write_shards([sample(n, PICTURES[0]) for n in range(4)], tmp_path / "set")
    tar = shards.folder / shards.shard_names[0]
    whole = tar.read_bytes()
    copies = [place for place in range(len(whole)) if whole.startswith(PICTURES[0].data or b"", place)]
    for damaged, place in enumerate(copies):
        tar.write_bytes(whole[: place + 60] + bytes([whole[place + 60] ^ 255]) + whole[place + 61 :])
        layout = {"on_bad_sample": "skip", "row_tokens": 400, "ranks": ranks}
        opened = [ShardSet(shards.folder)]
        parts = [steps_of(opened, rendering, rank=rank, **layout)[0] for rank in range(ranks)]
        assert [hole.where for part in parts for hole in part.holes] == [shards.where(damaged)]
    assert len(copies) == 4


def test_a_picture_for_a_model_without_vision_is_a_bad_sample(sets: list[ShardSet], rendering: Rendering) -> None:
    blind = replace(rendering, fit=None)
    with pytest.raises(SampleError, match=r"first/shard-0.*model\.vision is null"):
        list(load(steps_of(sets[:1], blind, batch_size=23), 0, 1, workers=0))
    (step,) = load(steps_of(sets[:1], blind, batch_size=23, on_bad_sample="skip"), 0, 1, workers=0)
    assert (step.samples, len(step.holes), step.pictures) == (8, 15, 0)


def test_a_sample_that_cannot_be_rendered_is_named_by_its_shard(sets: list[ShardSet], rendering: Rendering) -> None:
    captions = replace(rendering, chat=resolve("plain", byte_tokenizer(), placeholder=rendering.chat.placeholder))
    with pytest.raises(SampleError) as caught:
        Encoder(sets[0], captions, 0, None).example(0)
    assert str(caught.value).startswith("first/shard-000000.tar:k00000: the chat format plain")


# Ended by a signal --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_the_step_that_is_not_waited_for_comes_empty_and_is_the_last(
    sets: list[ShardSet], rendering: Rendering, straight: list[Step], workers: int
) -> None:
    turns = iter(range(4))

    @contextmanager
    def stoppable() -> Iterator[None]:
        if next(turns) == 3:
            raise Stopped
        yield

    *steps, last = load(steps_of(sets, rendering), 2, 8, workers=workers, stoppable=stoppable)
    assert all_told(steps) == all_told(straight[2:5])
    assert (last.number, last.samples, last.supervised, len(last.rows)) == (5, 0, 0, 1)
    assert not multiprocessing.active_children()


def test_after_the_last_step_nothing_is_waited_for(
    sets: list[ShardSet], rendering: Rendering, straight: list[Step]
) -> None:
    turns = iter(range(3))

    @contextmanager
    def stoppable() -> Iterator[None]:
        next(turns)
        yield

    assert all_told(list(load(steps_of(sets, rendering), 5, 8, workers=0, stoppable=stoppable))) == all_told(
        straight[5:]
    )


@pytest.mark.parametrize("fault", [ConfigError("remote_cache_gb: too little"), OSError(28, "No space left", "a/file")])
def test_a_fault_of_place_in_a_worker_comes_as_it_is_and_without_a_traceback_in_it(
    sets: list[ShardSet], rendering: Rendering, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def failing(self: Encoder, index: int) -> None:
        raise fault

    monkeypatch.setattr(Encoder, "example", failing)
    with pytest.raises(type(fault)) as told:
        list(load(steps_of(sets, rendering), 0, 8, workers=1))
    assert str(told.value) == str(fault)


def test_a_worker_that_is_left_while_it_hands_a_step_over_says_nothing() -> None:
    """As a signal leaves it; the thread that hands memory over printed a traceback into the log of the run."""
    left = """
import socket
from multiprocessing import resource_sharer
from mmit.data.loader import _prepare_worker

_prepare_worker(0)
address, _ = resource_sharer.DupFd(1)._id
for _ in range(5):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    connection.close()
resource_sharer.stop(timeout=60)
"""
    ended = subprocess.run([sys.executable, "-c", left], capture_output=True, text=True, check=True, timeout=120)
    assert ended.stderr == ""
