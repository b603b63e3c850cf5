"""Laws of packing: each sample in one row of one rank, the rows bounded and balanced, no sample touching another."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data._utils.pin_memory import pin_memory

from mmit.data.loader import Step
from mmit.data.packing import IGNORED, Costs, Example, Load, deal, pack

Dealt = list[list[list[int]]]
PINNED: Dealt = [[[2, 3, 9], [6]], [[1, 4, 7, 8], [0, 5]]]

loads_of_a_step = st.lists(
    st.builds(
        Load,
        st.integers(1, 120),
        st.lists(st.integers(0, 8), max_size=3, unique=True).map(lambda found: tuple(bytes([n]) for n in found)),
    ),
    max_size=25,
)
limits = {
    "ranks": st.sampled_from([1, 2, 3, 4, 8]),
    "row_tokens": st.sampled_from([100, 128, 250, 10_000]),
    "row_images": st.sampled_from([None, 1, 2, 5]),
}


def cost(loads: Sequence[Load], row: Sequence[int], costs: Costs) -> float:
    """What a row costs, written out: every picture is encoded once."""
    pictures = {picture for i in row for picture in loads[i].pictures}
    tokens = [loads[i].tokens for i in row]
    return sum(tokens) + costs.attention * sum(n * n for n in tokens) + costs.picture * len(pictures)


def flat(dealt: Dealt) -> list[int]:
    return [sample for rank in dealt for row in rank for sample in row]


# Dealing ------------------------------------------------------------------------------------------------------------


@given(loads=loads_of_a_step, **limits)
@settings(max_examples=150, deadline=None)
def test_each_sample_is_in_one_row_within_its_bounds_and_ranks_have_as_many_rows(
    loads: list[Load], ranks: int, row_tokens: int, row_images: int | None
) -> None:
    dealt = deal(loads, ranks, row_tokens=row_tokens, row_images=row_images, costs=Costs(0.001, 50))
    assert sorted(flat(dealt)) == list(range(len(loads)))
    assert len(dealt) == ranks
    assert len({len(rank) for rank in dealt}) == 1
    assert len(dealt[0]) >= 1
    for row in itertools.chain(*dealt):
        assert row == sorted(row)
        if len(row) > 1:
            assert sum(loads[i].tokens for i in row) <= row_tokens
            if row_images is not None:
                assert len({picture for i in row for picture in loads[i].pictures}) <= row_images


@given(loads=loads_of_a_step, **limits)
@settings(max_examples=50, deadline=None)
def test_dealing_is_the_same_every_time_and_for_equal_loads(
    loads: list[Load], ranks: int, row_tokens: int, row_images: int | None
) -> None:
    again = [Load(load.tokens, tuple(bytes(picture) for picture in load.pictures)) for load in loads]
    assert deal(loads, ranks, row_tokens=row_tokens, row_images=row_images) == deal(
        again, ranks, row_tokens=row_tokens, row_images=row_images
    )


def test_dealing_is_pinned() -> None:
    """The same layout must give the same bits in a later release: a resumed run deals as it did before."""
    loads = [Load(10 * n % 70 + 3, (bytes([n % 3]),) if n % 2 else ()) for n in range(10)]
    assert deal(loads, 2, row_tokens=120, costs=Costs(0.01, 20)) == PINNED


@given(loads=loads_of_a_step, row_tokens=limits["row_tokens"])
@settings(max_examples=50, deadline=None)
def test_four_rows_of_one_rank_and_one_row_of_four_ranks_cover_the_same_samples(
    loads: list[Load], row_tokens: int
) -> None:
    alone = deal(loads, 1, row_tokens=row_tokens)
    for ranks in (2, 4):
        assert Counter(flat(deal(loads, ranks, row_tokens=row_tokens))) == Counter(flat(alone))
    eight = [Load(50)] * 8
    assert [len(row) for row in deal(eight, 1, row_tokens=100)[0]] == [2] * 4
    assert [[len(row) for row in rank] for rank in deal(eight, 4, row_tokens=100)] == [[2]] * 4


def test_samples_of_one_picture_share_a_row_where_they_fit() -> None:
    loads = [Load(30, (bytes([n % 4]),)) for n in range(12)]  # three of each of four pictures
    for ranks in (1, 2, 4):
        dealt = deal(loads, ranks, row_tokens=100)
        rows_of = {picture: set() for picture in range(4)}
        for number, row in enumerate(itertools.chain(*dealt)):
            for sample in row:
                rows_of[sample % 4].add(number)
        assert [len(rows) for rows in rows_of.values()] == [1] * 4
    tight = deal(loads, 1, row_tokens=60)  # two fit: the third goes elsewhere
    assert all(len(row) <= 2 for row in tight[0])


@given(
    tokens=st.lists(st.integers(1, 500), min_size=1, max_size=40),
    pictures=st.lists(st.integers(0, 6), min_size=40, max_size=40),
    ranks=st.sampled_from([1, 2, 4, 8]),
)
@settings(max_examples=100, deadline=None)
def test_with_room_no_rank_has_more_than_another_by_more_than_one_cluster(
    tokens: list[int], pictures: list[int], ranks: int
) -> None:
    """Longest first into the cheapest row: the last cluster that the fullest row took found it the cheapest."""
    costs = Costs(0.001, 300)
    loads = [Load(n, (bytes([p]),) if p else ()) for n, p in zip(tokens, pictures, strict=False)]
    dealt = deal(loads, ranks, row_tokens=10**6, costs=costs)
    assert [len(rank) for rank in dealt] == [1] * ranks
    clusters = [[i for i, load in enumerate(loads) if load.pictures == (bytes([p]),)] for p in range(1, 7)]
    clusters += [[i] for i, load in enumerate(loads) if not load.pictures]
    rows = [cost(loads, rank[0], costs) for rank in dealt]
    assert max(rows) - min(rows) <= max(cost(loads, cluster, costs) for cluster in clusters) + 1e-6


@given(loads=loads_of_a_step, ranks=st.sampled_from([2, 4]), row_tokens=st.sampled_from([120, 200]))
@settings(max_examples=60, deadline=None)
def test_no_rank_has_more_work_than_another_by_more_than_a_row(loads: list[Load], ranks: int, row_tokens: int) -> None:
    costs = Costs(0.001, 30)
    dealt = deal(loads, ranks, row_tokens=row_tokens, costs=costs)
    work = [sum(cost(loads, row, costs) for row in rank) for rank in dealt]
    assert max(work) - min(work) <= max(cost(loads, row, costs) for rank in dealt for row in rank) + 1e-6


def test_a_picture_shared_by_many_samples_is_paid_once() -> None:
    """Ten questions about one picture (10 + 1000) weigh as much as 1,010 tokens, not as 10,010."""
    loads = [Load(1, (b"x",))] * 10 + [Load(505)] * 3
    dealt = deal(loads, 2, row_tokens=5000, costs=Costs(picture=1000))
    assert sorted(len(rank[0]) for rank in dealt) == [2, 11]


def test_rows_are_few() -> None:
    """As many as the tokens need, where samples are small beside a row."""
    loads = [Load(n) for n in [10] * 100]
    assert len(deal(loads, 1, row_tokens=100)[0]) == 10
    assert len(deal(loads, 4, row_tokens=100)[0]) == 3


def test_a_step_without_samples_has_a_row_for_every_rank() -> None:
    assert deal([], 4, row_tokens=100) == [[[]]] * 4


# Packing ------------------------------------------------------------------------------------------------------------


@st.composite
def examples_of_a_row(draw: st.DrawFn) -> list[Example]:
    """Samples of 1 to 12 tokens; each shows up to two of its pictures, in spans of two tokens, in any order."""
    made = []
    for number in range(draw(st.integers(1, 5))):
        length = draw(st.integers(1, 12))
        ids = np.array(draw(st.lists(st.integers(1, 9), min_size=length, max_size=length)), dtype=np.int32)
        learned = np.array(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        pictures = tuple(bytes([draw(st.integers(0, 3))]) for _ in range(2))
        places = draw(st.lists(st.integers(0, length // 2 - 1), max_size=2, unique=True)) if length >= 2 else []
        spans = [(2 * place, 2 * place + 2, draw(st.integers(0, 1))) for place in sorted(places)]
        for start, stop, _ in spans:
            learned[start:stop] = False
        labels = np.where(learned, ids, IGNORED).astype(np.int32)
        array = np.array(spans, dtype=np.int32).reshape(-1, 3)
        made.append(Example(ids, labels, array, draw(st.integers(0, 2)), f"set/tar:{number}", pictures))
    return made


def pixels_of(key: bytes) -> torch.Tensor:
    return torch.full((3, 2, 2), key[0] + 1, dtype=torch.uint8)


def keys_of(examples: Sequence[Example]) -> list[bytes]:
    return list(dict.fromkeys(example.pictures[p] for example in examples for p in example.spans[:, 2]))


@given(examples=examples_of_a_row(), touch=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_row_says_of_every_position_what_its_sample_alone_says(examples: list[Example], touch: bool) -> None:
    """Against Python loops over one sample at a time."""
    keys = keys_of(examples)
    row = pack(examples, [pixels_of(key) for key in keys], keys, touch_vision=touch)
    expected_ids, positions, boundaries, is_image = [], [], [0], []
    predicted, shown = [], []
    for example in examples:
        offset = len(expected_ids)
        expected_ids += example.ids.tolist()
        positions += range(len(example.ids))
        boundaries.append(len(expected_ids))
        inside = {place for start, stop, _ in example.spans.tolist() for place in range(start, stop)}
        is_image += [place in inside for place in range(len(example.ids))]
        shown += [example.pictures[picture][0] for _, _, picture in example.spans.tolist()]
        for place in range(len(example.ids) - 1):  # the last token predicts nothing: what follows is another sample's
            if example.labels[place + 1] != IGNORED:
                predicted.append((offset + place, int(example.labels[place + 1]), example.source))
    assert row.ids.tolist() == [expected_ids]
    assert row.positions.tolist() == [positions]
    assert row.boundaries.tolist() == boundaries
    assert row.boundaries.dtype == torch.int32
    assert row.longest == max(len(example.ids) for example in examples)
    found = zip(row.predicts.tolist(), row.targets.tolist(), row.sources.tolist(), strict=True)
    assert list(found) == predicted
    assert row.is_image.tolist() == [is_image]
    assert row.image_tokens == sum(is_image)
    assert [row.pixels[picture][0, 0, 0].item() - 1 for picture in row.shown.tolist()] == shown
    assert len(row.pixels) == len(row.keys) == len(set(row.keys)) == len(set(shown))
    assert row.samples == tuple(example.where for example in examples)
    assert row.touch_vision == touch
    assert sum(example.supervised for example in examples) == len(predicted)


@given(examples=examples_of_a_row())
@settings(max_examples=30, deadline=None)
def test_packing_leaves_the_examples_as_they_were(examples: list[Example]) -> None:
    before = [(example.ids.copy(), example.labels.copy()) for example in examples]
    for example in examples:
        example.ids.setflags(write=False)
        example.labels.setflags(write=False)
    keys = keys_of(examples)
    pack(examples, [pixels_of(key) for key in keys], keys, touch_vision=False)
    for example, (ids, labels) in zip(examples, before, strict=True):
        assert (example.ids == ids).all()
        assert (example.labels == labels).all()


@pytest.mark.parametrize("touch", [False, True])
def test_a_row_without_samples_learns_nothing(touch: bool) -> None:
    row = pack([], [], [], touch_vision=touch)
    assert row.ids.shape == row.positions.shape == row.is_image.shape == (1, 1)
    assert row.boundaries.tolist() == [0, 1]
    assert len(row.predicts) == len(row.targets) == len(row.sources) == len(row.shown) == len(row.pixels) == 0
    assert row.touch_vision == touch


def test_a_row_moves_with_all_its_tensors() -> None:
    example = Example(np.arange(4, dtype=np.int32), np.arange(4, dtype=np.int32), np.empty((0, 3), np.int32), 0, "w")
    row = pack([example], [], [], touch_vision=False).to(torch.device("meta"))
    tensors = {name: value for name, value in vars(row).items() if isinstance(value, torch.Tensor)}
    assert {name for name, value in tensors.items() if value.device.type != "meta"} == set()
    assert len(tensors) == 9


def test_torch_pins_a_step_with_all_tensors_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU torch pins nothing, so a copy stands for that here; the rest is what its loader does."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.clone)
    example = Example(np.arange(4, dtype=np.int32), np.arange(4, dtype=np.int32), np.empty((0, 3), np.int32), 0, "w")
    row = pack([example], [], [], touch_vision=False)
    step = Step(number=3, rows=(row,), samples=1, tokens=4, pictures=0, holes=(), cut=0, unlabelled=0)
    pinned = pin_memory(step)
    assert isinstance(pinned, Step)
    assert replace(pinned, rows=step.rows) == step
    for name, value in vars(row).items():
        found = vars(pinned.rows[0])[name]
        if isinstance(value, torch.Tensor):
            assert found is not value
            assert torch.equal(found, value), name
        else:
            assert found == value, name
