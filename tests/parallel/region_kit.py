"""Rectangles at random."""

from hypothesis import strategies as st

from headrace.parallel.regions import box_at

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=2).map(tuple)


@st.composite
def rectangles(draw, shape):
    """One in a tensor of that shape."""
    cuts = [sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True))) for size in shape]
    return tuple(map(tuple, cuts))


@st.composite
def partitions(draw, shape):
    """Rectangles that are each element once, in any order."""
    boxes = [box_at([0] * len(shape), shape)]
    for _ in range(draw(st.integers(0, 12))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        first, last = box[axis]
        if last - first == 1:
            boxes.append(box)
            continue
        cut = draw(st.integers(first + 1, last - 1))
        boxes += [(*box[:axis], span, *box[axis + 1 :]) for span in ((first, cut), (cut, last))]
    return draw(st.permutations(boxes))
