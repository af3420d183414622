"""Rectangles: what two have in common, and whether some are a tensor's every element just once."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import CheckpointError
from headrace.parallel.group import RankGroup
from headrace.parallel.regions import Region, inside, overlap, regions_of, require_whole, volume
from parallel.model_jobs import build
from parallel.region_kit import SHAPES, partitions, rectangles


def mask(box, shape):
    counts = np.zeros(shape, int)
    counts[inside(box, [0] * len(shape))] = 1
    return counts


@given(st.data(), SHAPES)
def test_overlap_is_what_both_have(data, shape):
    a, b = data.draw(rectangles(shape)), data.draw(rectangles(shape))
    both = overlap(a, b)
    expected = mask(a, shape) & mask(b, shape)
    assert (both is None) == (not expected.any())
    assert both == overlap(b, a)
    if both is not None:
        assert np.array_equal(mask(both, shape), expected) and volume(both) == expected.sum()
        start = [first for first, _ in a]
        local = np.arange(volume(a)).reshape([last - first for first, last in a])
        whole = np.full(shape, -1)
        whole[inside(a, [0] * len(shape))] = local
        assert np.array_equal(local[inside(both, start)], whole[inside(both, [0] * len(shape))])


@given(st.data(), SHAPES)
def test_a_partition_is_whole(data, shape):
    boxes = data.draw(partitions(shape))
    require_whole("x", shape, boxes)
    assert sum(map(volume, boxes)) == np.prod(shape)


@given(st.data(), SHAPES)
def test_a_hole_is_found(data, shape):
    boxes = data.draw(partitions(shape))
    boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
    with pytest.raises(CheckpointError, match="x has a hole"):
        require_whole("x", shape, boxes)


@given(st.data(), SHAPES)
def test_what_is_held_twice_is_found_even_where_the_count_is_right(data, shape):
    boxes = data.draw(partitions(shape))
    extra = data.draw(rectangles(shape))
    with pytest.raises(CheckpointError, match="x is held twice"):
        require_whole("x", shape, [*boxes, extra])
    if len(boxes) > 1:
        gone = data.draw(st.integers(0, len(boxes) - 1))
        rest = boxes[:gone] + boxes[gone + 1 :]
        same = [box for box in rest if volume(box) == volume(boxes[gone])]
        if same:
            with pytest.raises(CheckpointError, match="x is held twice"):
                require_whole("x", shape, [*rest, same[0]])


@given(st.data(), SHAPES)
def test_whole_is_every_element_once(data, shape):
    """Against counting, with rectangles at random."""
    boxes = data.draw(st.lists(rectangles(shape), max_size=4))
    counts = sum((mask(box, shape) for box in boxes), np.zeros(shape, int))
    try:
        require_whole("x", shape, boxes)
        found = True
    except CheckpointError:
        found = False
    assert found == bool((counts == 1).all())


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_kv_heads": 1, "qkv_bias": True, "o_bias": True}, {"tie_word_embeddings": True, "virtual_shards": 4}],
)
def test_ranks_of_a_model_write_each_element_once(size, changes):
    """Also where ranks hold the same kv head, and where a table is tied: it then has no name of its own."""
    spoken: dict[str, list[Any]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rank in range(size):
        group = RankGroup.of_size(size, rank)
        model = build(group, changes)
        for name, region in regions_of("model", model.tensors(), group):
            assert isinstance(region, Region) and shapes.setdefault(name, region.shape) == region.shape
            boxes = spoken.setdefault(name, [])
            if region.writes:
                boxes.append(region.box)
        assert not any(region.writes for _, region in regions_of("model", model.tensors(), group, writes=False))
    for name, boxes in spoken.items():
        require_whole(name, shapes[name], boxes)
    assert ("model/lm_head.weight" in spoken) == (not changes.get("tie_word_embeddings"))
    assert set(spoken) == {f"model/{name}" for name, _ in build(RankGroup(), changes).tensors()}
