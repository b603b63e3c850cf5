"""Laws of the order: a pure function of sources, seed and step, that takes each sample as often as asked."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import pickle
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmit.config import ConfigError, Holdout, parse_config
from mmit.data.order import Occurrence, Order, Origin, held_out, permutation
from mmit.data.sample import Sample, SampleError
from mmit.data.shards import ShardSet, write_shards
from mmit.model.build import assemble
from mmit.training.data import StageData, _hold_out, open_stage
from tests.data.pictures import PICTURES, picture, sample

PINNED = [1, 9, 4, 2, 7, 8, 6, 3, 5, 10, 11, 0]
PINNED_DIGEST = "c623d8914a84233b2b2323a927955a092358e8401682973636eacae6e759bffe"
PINNED_HELD_OUT = [6, 8, 15, 19, 29, 40, 46]


def origin(size: int, name: str = "a", **changes: object) -> Origin:
    return Origin(name, np.arange(size), **changes)  # type: ignore[arg-type]


def epoch_of(order: Order, epoch: int) -> list[Occurrence]:
    """All samples of an epoch, its steps found by walking from step 0 as a loader would."""
    before = sum(order.steps(earlier) for earlier in range(epoch))
    return [taken for step in range(before, before + order.steps(epoch)) for taken in order.step(step)]


def indices(taken: Sequence[Occurrence], source: int = 0) -> list[int]:
    return [occurrence.index for occurrence in taken if occurrence.source == source]


# The permutation ----------------------------------------------------------------------------------------------------


def test_a_permutation_is_pinned_to_its_values() -> None:
    """A resumed run must go on in the same order after any update: these numbers may never change."""
    assert permutation(12, 0, "fingerprint", 3).tolist() == PINNED
    digest = hashlib.sha256(permutation(100_000, 7, "x").astype("<i8").tobytes()).hexdigest()
    assert digest == PINNED_DIGEST


def test_a_permutation_is_splitmix64_by_the_book() -> None:
    """Against Python integers: the n-th output of splitmix64 seeded by the key's hash sorts position n."""
    wrap = 2**64 - 1
    seed = int.from_bytes(hashlib.sha256(b"5\0key").digest()[:8], "little")

    def output(n: int) -> int:
        z = (seed + (n + 1) * 0x9E3779B97F4A7C15) & wrap
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & wrap
        return z ^ (z >> 31)

    assert permutation(500, 5, "key").tolist() == sorted(range(500), key=output)


@given(st.integers(0, 300), st.integers(0, 2**63), st.text(max_size=5))
@settings(max_examples=50, deadline=None)
def test_a_permutation_holds_each_number_once(size: int, seed: int, word: str) -> None:
    assert sorted(permutation(size, seed, word).tolist()) == list(range(size))


def test_permutations_look_uniform() -> None:
    """Where an item lands over 3,000 keys, and which of two comes first: chi-square within six sigma of its mean."""
    size, trials = 10, 3000
    landed = np.zeros((size, size))
    for key in range(trials):
        landed[np.arange(size), permutation(size, key)] += 1
    expected = trials / size
    square = ((landed - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(square - freedom) < 6 * math.sqrt(2 * freedom)
    neighbours = sum(int((np.diff(permutation(1000, "neighbours", key)) == 1).sum()) for key in range(200))
    assert 100 < neighbours < 320  # about one a permutation, as chance has it


# What an epoch holds ------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    batch_size=st.integers(1, 17),
    seed=st.integers(0, 99),
    window=st.sampled_from([None, 1, 3]),
    grouped=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_at_repeat_1_each_sample_comes_once_an_epoch_and_only_its_last_step_is_smaller(
    sizes: list[int], batch_size: int, seed: int, window: int | None, grouped: bool
) -> None:
    origins = tuple(
        origin(
            size,
            f"source {number}",
            shards=np.arange(size) // 4,
            groups=np.arange(size) // 3 if grouped and window is None else None,
        )
        for number, size in enumerate(sizes)
    )
    order = Order(origins, seed, batch_size, window)
    everything = [(number, index) for number, size in enumerate(sizes) for index in range(size)]
    for epoch in range(3):
        taken = epoch_of(order, epoch)
        assert sorted((occurrence.source, occurrence.index) for occurrence in taken) == everything
        assert {occurrence.turn for occurrence in taken} == {epoch}
        first = sum(order.steps(earlier) for earlier in range(epoch))
        lengths = [len(order.step(step)) for step in range(first, first + order.steps(epoch))]
        assert lengths[:-1] == [batch_size] * (len(lengths) - 1)
        assert 0 < lengths[-1] <= batch_size


@given(size=st.integers(1, 40), repeat=st.floats(0.05, 4), window=st.sampled_from([None, 2]), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_epochs_of_any_repeat_cut_one_endless_run_of_whole_permutations(
    size: int, repeat: float, window: int | None, seed: int
) -> None:
    order = Order((origin(size, repeat=repeat, shards=np.arange(size) // 3),), seed, 8, window)
    run = [taken for epoch in range(6) for taken in epoch_of(order, epoch)]
    assert abs(len(run) - 6 * repeat * size) <= 0.5 + 1e-6
    for epoch in range(6):
        assert abs(order.samples(epoch) - repeat * size) <= 1
    by_turn = defaultdict(list)
    for taken in run:
        by_turn[taken.turn].append(taken.index)
    assert sorted(by_turn) == list(range(len(by_turn)))
    for turn, found in by_turn.items():
        if turn < len(by_turn) - 1:
            assert sorted(found) == list(range(size))
        else:
            assert len(set(found)) == len(found)


def test_repeat_one_half_takes_the_other_half_next_epoch() -> None:
    order = Order((origin(10, repeat=0.5),), 0, 4)
    first, second, third = (set(indices(epoch_of(order, epoch))) for epoch in range(3))
    assert len(first) == len(second) == 5
    assert first | second == set(range(10))
    assert third not in (first, second)  # a new permutation


def test_repeat_two_and_a_half_takes_all_twice_and_a_new_half() -> None:
    order = Order((origin(10, repeat=2.5),), 0, 4)
    first, second = (Counter(indices(epoch_of(order, epoch))) for epoch in range(2))
    assert sorted(first.values()) == [2] * 5 + [3] * 5
    assert first + second == Counter({index: 5 for index in range(10)})


def test_held_out_samples_never_come() -> None:
    kept = np.array([1, 4, 5, 9, 11])
    order = Order((Origin("a", kept, repeat=3),), 0, 4)
    assert set(indices(epoch_of(order, 0))) == set(kept.tolist())


# Purity -------------------------------------------------------------------------------------------------------------


def test_any_step_alone_is_the_same_as_in_a_walk_and_in_another_process() -> None:
    def made() -> Order:
        sources = (origin(23, "a", repeat=1.5), origin(9, "b", groups=np.arange(9) // 2))
        return Order(sources, 3, 4)

    walked = [made().step(step) for step in range(40)]
    order = made()
    for step in (39, 0, 17, 17, 5):
        assert order.step(step) == walked[step]
    assert pickle.loads(pickle.dumps(order)).step(23) == walked[23]


@pytest.mark.parametrize("window", [None, 2])
def test_changing_one_source_leaves_what_is_taken_of_another_and_its_sequence_in_turn(window: int | None) -> None:
    mine = origin(20, "mine", repeat=0.5, shards=np.arange(20) // 4)
    other = [origin(size, name, shards=np.arange(size) // 4) for size, name in ((7, "x"), (31, "y"))]
    alone = Order((mine,), 1, 4, window)
    for neighbour in other:
        order = Order((mine, neighbour), 1, 4, window)
        for epoch in range(4):
            assert Counter(indices(epoch_of(order, epoch))) == Counter(indices(epoch_of(alone, epoch)))
            if window is not None:
                assert indices(epoch_of(order, epoch)) == indices(epoch_of(alone, epoch))


def test_seed_fingerprint_and_epoch_each_give_another_order() -> None:
    orders = [Order((origin(50, name),), seed, 50) for name, seed in (("a", 0), ("a", 1), ("b", 0))]
    found = [tuple(indices(order.step(step))) for order in orders for step in range(2)]
    assert len(set(found)) == len(found)


def test_sources_are_mixed_over_the_whole_epoch() -> None:
    for window in (None, 3):
        sources = (origin(300, "a", shards=np.arange(300) // 10), origin(100, "b", shards=np.arange(100) // 10))
        order = Order(sources, 0, 40, window)
        shares = [len(indices(order.step(step), 1)) for step in range(10)]
        assert sum(shares) == 100
        assert 3 <= min(shares) <= max(shares) <= 18


# Counting steps -----------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0.1, 0.5, 1.0, 2.5])), min_size=1, max_size=3),
    batch_size=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_places_and_totals_agree_with_counting(sizes: list[tuple[int, float]], batch_size: int) -> None:
    origins = tuple(origin(size, str(n), repeat=repeat) for n, (size, repeat) in enumerate(sizes))
    order = Order(origins, 0, batch_size)
    counted = [(epoch, number) for epoch in range(12) for number in range(order.steps(epoch))]
    assert [order.place(step) for step in range(len(counted))] == counted
    for epochs in range(12):
        assert order.total_steps(epochs) == sum(epoch < epochs for epoch, _ in counted)
    for epoch in range(12):
        assert order.steps(epoch) == -(-order.samples(epoch) // batch_size)


@pytest.mark.parametrize("tenths", range(1, 40))
def test_a_part_of_an_epoch_is_that_part_of_its_steps(tenths: int) -> None:
    """1.1 epochs of ten steps are 11 steps, though 1.1 - 1 is a little more than 0.1 in floating point."""
    assert Order((origin(10),), 0, 1).total_steps(tenths / 10) == tenths
    assert Order((origin(10),), 0, 2).total_steps(tenths / 10) == math.ceil(tenths / 2)


def test_an_order_without_samples_says_so_instead_of_looking_for_ever() -> None:
    with pytest.raises(IndexError, match="no sample"):
        Order((origin(0),), 0, 4).step(0)


# Windows ------------------------------------------------------------------------------------------------------------


@given(shards=st.lists(st.integers(0, 6), min_size=1, max_size=40).map(sorted), window=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_a_windowed_order_is_that_of_loops_over_its_windows(shards: list[int], window: int) -> None:
    """Written out, so that a resumed run goes on in it after any update."""
    taken = epoch_of(Order((origin(len(shards), shards=np.array(shards)),), 3, 4, window), 0)
    present = sorted(set(shards))
    turned = [present[place] for place in permutation(len(present), 3, "a", 0, "shards")]
    expected = []
    for start in range(0, len(turned), window):
        inside = [i for i, shard in enumerate(shards) if shard in turned[start : start + window]]
        expected += [inside[place] for place in permutation(len(inside), 3, "a", 0, "window", start)]
    assert indices(taken) == expected


@given(shards=st.integers(1, 9), size=st.integers(1, 5), window=st.integers(1, 4), seed=st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_a_window_touches_few_shards_at_a_time(shards: int, size: int, window: int, seed: int) -> None:
    """No sample of a shard follows one of a shard that came more than a window later."""
    order = Order((origin(shards * size, shards=np.arange(shards * size) // size),), seed, 4, window)
    taken = indices(epoch_of(order, 0))
    assert sorted(taken) == list(range(shards * size))
    where = [index // size for index in taken]
    open_at_once = [{shard for shard in where[: place + 1] if shard in where[place:]} for place in range(len(where))]
    assert max(len(shards_open) for shards_open in open_at_once) <= window
    pieces = [where[start : start + window * size] for start in range(0, len(where), window * size)]
    assert sorted(shard for piece in pieces for shard in set(piece)) == list(range(shards))


def test_a_window_mixes_shards_and_samples_anew_every_epoch() -> None:
    order = Order((origin(400, shards=np.arange(400) // 10),), 0, 400, 4)
    first, second = (indices(order.step(step)) for step in range(2))
    assert {index // 10 for index in first[:40]} != {index // 10 for index in second[:40]}
    inside = [index // 10 for index in first[:40]]
    assert sum(a != b for a, b in itertools.pairwise(inside)) > 15


# Groups -------------------------------------------------------------------------------------------------------------


@given(labels=st.lists(st.integers(0, 6), min_size=1, max_size=30), seed=st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_groups_stay_together(labels: list[int], seed: int) -> None:
    """Also beside a source without groups, and with groups numbered as ShardSet numbers them: by their first member."""
    groups = np.array([labels.index(label) for label in labels])
    kept = np.arange(len(labels)) * 2 + 1
    order = Order((origin(8, "plain"), Origin("a", kept, groups=groups)), seed, 5)
    for epoch in range(2):
        taken = epoch_of(order, epoch)
        assert sorted(indices(taken, 1)) == kept.tolist()
        assert sorted(indices(taken, 0)) == list(range(8))
        followed = [f"single {t.index}" if t.source == 0 else f"group {groups[(t.index - 1) // 2]}" for t in taken]
        assert len(list(itertools.groupby(followed))) == len(set(followed))


def test_groups_are_whole_in_each_of_several_turns() -> None:
    groups = np.arange(12) // 3
    order = Order((origin(12, repeat=2, groups=groups),), 0, 24)
    runs = [len(list(run)) for _, run in itertools.groupby(order.step(0), lambda t: (t.turn, groups[t.index]))]
    assert runs == [3] * 8


def test_large_groups_do_not_come_early() -> None:
    """Groups are permuted, not gathered at their first member: else an epoch would end in lone samples only."""
    groups = np.concatenate([np.repeat(0, 30), np.arange(30, 70)])
    first = []
    for seed in range(200):
        taken = indices(Order((origin(70, groups=groups),), seed, 70).step(0))
        order_of_groups = list(dict.fromkeys(groups[taken].tolist()))
        first.append(order_of_groups.index(0))
    assert abs(np.mean(first) - 20) < 4 * 11.8 / math.sqrt(200)  # of 41 places: mean 20, deviation 11.8


# Holding out --------------------------------------------------------------------------------------------------------


def test_held_out_by_name_is_pinned_and_about_the_share() -> None:
    names = [f"name {n}" for n in range(20_000)]
    for fraction in (0.01, 0.1, 0.5):
        share = held_out(names, fraction, 0).mean()
        assert abs(share - fraction) < 5 * math.sqrt(fraction * (1 - fraction) / len(names))
    assert np.flatnonzero(held_out(names[:60], 0.1, 0)).tolist() == PINNED_HELD_OUT


def test_held_out_grows_with_the_share_and_changes_with_the_seed() -> None:
    names = [str(n) for n in range(500)]
    small, large = held_out(names, 0.05, 0), held_out(names, 0.3, 0)
    assert not (small & ~large).any()
    assert (held_out(names, 0.3, 1) != large).any()
    assert (held_out(names[::-1], 0.3, 0)[::-1] == large).all()


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> list[ShardSet]:
    """Two sources of 120 samples with none to three of 90 pictures, many in both sources; meta values likewise."""
    chance = random.Random(5)
    data = [bytes([n]) + PICTURES[0].sha256[2:].encode() for n in range(90)]
    pictures = [replace(PICTURES[0], sha256=hashlib.sha256(item).hexdigest()) for item in data]
    sets = []
    for number in range(2):
        made = []
        for n in range(120):
            shown = chance.sample(pictures, chance.choice([0, 1, 1, 1, 2]))
            made.append(sample(n, *shown, patient=chance.randrange(40), note=chance.choice(["a", 1, None])))  # type: ignore[arg-type]
        sets.append(Held(f"set {number}", made))
    return sets  # type: ignore[return-value]


class Held:
    """What holding out asks of a shard set, told from samples in memory."""

    def __init__(self, fingerprint: str, samples: list[Sample]) -> None:
        self.fingerprint, self.samples = fingerprint, samples

    def __len__(self) -> int:
        return len(self.samples)

    def keys(self) -> list[str]:
        return [item.key for item in self.samples]

    def meta(self, i: int) -> dict[str, Any]:
        return dict(self.samples[i].meta)

    def meta_groups(self, key: str) -> None:
        for item in self.samples:
            if key not in item.meta:
                raise SampleError(f"{item.key}: has no meta value {key!r}")

    def pictures(self) -> tuple[np.ndarray, np.ndarray]:
        pairs = [(n, bytes.fromhex(shown.sha256)) for n, item in enumerate(self.samples) for shown in item.images]
        return np.array([n for n, _ in pairs], dtype=np.int64), np.array([digest for _, digest in pairs], dtype="S32")


def sides(sets: list[Any], by: str, fraction: float = 0.3, seed: int = 0) -> list[np.ndarray]:
    return _hold_out(sets, Holdout(fraction=fraction, by=by), seed)


@pytest.mark.parametrize("seed", range(4))
def test_no_picture_is_on_both_sides_in_any_source(pictured: list[Any], seed: int) -> None:
    out = sides(pictured, "picture", seed=seed)
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    for held, mask in zip(pictured, out, strict=True):
        for item, is_out in zip(held.samples, mask, strict=True):
            seen[bool(is_out)] |= {shown.sha256 for shown in item.images}
    assert not seen[True] & seen[False]
    assert any(mask.any() for mask in out)
    assert not all(mask.all() for mask in out)


def test_a_picture_is_on_its_side_whatever_the_order_of_sources(pictured: list[Any]) -> None:
    first, second = sides(pictured, "picture")
    again_second, again_first = sides(pictured[::-1], "picture")
    assert (first == again_first).all()
    assert (second == again_second).all()


def test_a_meta_value_is_on_one_side_in_all_sources_and_the_share_is_about_the_fraction(pictured: list[Any]) -> None:
    for key in ("patient", "note"):
        out = sides(pictured, f"meta.{key}")
        found = {
            (json.dumps(item.meta[key]), bool(is_out))
            for held, mask in zip(pictured, out, strict=True)
            for item, is_out in zip(held.samples, mask, strict=True)
        }
        assert len(found) == len({value for value, _ in found})
    share = np.mean([np.concatenate(sides(pictured, "meta.patient", seed=seed)).mean() for seed in range(30)])
    assert abs(share - 0.3) < 0.06
    with pytest.raises(SampleError, match="has no meta value 'doctor'"):
        sides(pictured, "meta.doctor")


def test_samples_are_held_out_one_by_one_at_about_the_share(pictured: list[Any]) -> None:
    out = sides(pictured, "sample")
    assert abs(np.concatenate(out).mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 240)
    assert (sides(pictured[:1], "sample")[0] == out[0]).all()


def test_holding_out_many_groups_takes_no_time_of_their_square() -> None:
    """200,000 groups were a matrix of 200,000 x 200,000 comparisons."""
    names = [f"patient {n}" for n in range(100_000)]
    many = Held("many", [])
    many.__dict__["keys"] = lambda: names
    many.__dict__["meta"] = lambda i: {"patient": names[i]}
    many.samples = range(len(names))  # type: ignore[assignment]
    many.__dict__["meta_groups"] = lambda key: None
    (out,) = sides([many], "meta.patient", 0.1)
    assert 0.09 < out.mean() < 0.11


def opened(tmp_path: Path, stages: list[dict[str, Any]], number: int, **changes: Any) -> StageData:
    language = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision = {"model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 1, "image_size": 8, "patch_size": 4}
    tree = {
        "output": str(tmp_path / "run"),
        "model": {
            "language": {"random": language | {"num_attention_heads": 1}},
            "vision": {"library": "transformers", "random": vision},
        },
        "stages": [{"train": {"language": {"lr": 1}}, "batch_size": 4, "max_tokens": 500} | stage for stage in stages],
    }
    config = parse_config(tree | changes, "test")
    assembly = assemble(config.model, seed=0)
    stage = config.stages[number]
    return open_stage(config, stage, assembly, cache=tmp_path / "cache", on_cuda=False, rank=0, ranks=1)


def test_what_a_stage_holds_out_an_earlier_stage_has_not_trained_on(tmp_path: Path) -> None:
    """Also where a sample of the later stage ties two pictures of the earlier one together."""
    pictures = [picture(9, 9, seed=n) for n in range(24)]
    first = write_shards([sample(n, pictures[n]) for n in range(24)], tmp_path / "first")
    tied = [sample(n, pictures[n + 8], pictures[n]) for n in range(8)]
    second = write_shards(tied, tmp_path / "second")
    stages = [
        {"name": "one", "data": [{"shards": str(first.folder)}]},
        {"name": "two", "data": [{"shards": str(second.folder)}]},
    ]
    changes: dict[str, Any] = {"seed": 1, "eval": {"holdout": {"fraction": 0.4}}}
    sets = {0: first, 1: second}
    trained, held = [], []
    for number in range(2):
        data = opened(tmp_path, stages, number, **changes)
        assert data.held_out is not None
        for steps, found in ((data.training, trained), (data.held_out, held)):
            indices = steps.order.origins[0].indices.tolist()
            found.append({digest for i in indices for digest in sets[number].picture_hashes(i)})
    assert trained[0]
    assert held[1]
    assert not (trained[0] | trained[1]) & (held[0] | held[1])


def test_sources_of_one_name_are_told_apart_also_those_only_evaluated(tmp_path: Path) -> None:
    for place in ("a", "b", "c"):
        write_shards([sample(n) for n in range(4)], tmp_path / place / "set")
    sources = [{"shards": str(tmp_path / place / "set")} for place in ("a", "b", "c")]
    stages = [{"name": "one", "data": [*sources[:2], sources[0] | {"name": "set-2"}]}]
    data = opened(tmp_path, stages, 0, eval={"data": [sources[2]]})
    assert data.titles == ["set", "set-2", "set-2-2", "set-3"]
    assert data.held_out is not None
    assert [encoder.source for encoder in data.held_out.encoders] == [3]


def test_a_stage_without_a_step_is_refused(tmp_path: Path) -> None:
    write_shards([sample(n) for n in range(4)], tmp_path / "set")
    stages = [{"name": "one", "data": [{"shards": str(tmp_path / "set"), "repeat": 0.01}]}]
    with pytest.raises(ConfigError, match=r"stages\.one: 1 epochs are no step; raise epochs or repeat"):
        opened(tmp_path, stages, 0)
