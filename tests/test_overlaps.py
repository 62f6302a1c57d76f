"""The search for overlapping boxes finds the pairs that a comparison of every pair finds."""

from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssdcore.kernels.boxes.eager import pairwise_iou
from ssdcore.kernels.nms import overlaps

THRESHOLDS = [0.0, 1e-45, 0.3, 0.5, 1.0, 2.0]
# Sides and areas overflow, underflow, or are negative, zero, infinite or NaN.
EXTREME = [-np.inf, -3e38, -1e19, -1e-20, 0.0, 1e-45, 1e-30, 1e-20, 1e-19, 1.0, 1e19, 3e38, np.inf, np.nan]


@pytest.fixture
def small_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few boxes make a tree of several levels, which is compared in several steps."""
    for name, value in {"DIRECT_PAIRS": 0, "FANOUT": 2, "ROOT_PAIRS": 3, "PAIRS_AT_ONCE": 5}.items():
        monkeypatch.setattr(overlaps, name, value)


def by_comparison(
    boxes: np.ndarray, group: np.ndarray, others: np.ndarray, other_group: np.ndarray, threshold: float
) -> np.ndarray:
    """Which of `boxes` and `others` overlap and are of the same group: bool [M, N]."""
    overlap = pairwise_iou(torch.from_numpy(boxes), torch.from_numpy(others)) > threshold
    return overlap.numpy() & (group[:, None] == other_group)


@st.composite
def grouped_boxes(draw: Any, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [M, 4] and their sorted groups [M], each group numbered from 0 on."""
    number = draw(st.integers(1, 30))
    elements = draw(
        st.sampled_from(
            [
                st.integers(0, 5).map(float),  # equal boxes, boxes without area, inverted boxes
                st.sampled_from(EXTREME),
                st.floats(-100, 100, width=32),
            ]
        )
    )
    boxes = draw(hnp.arrays(dtype, (number, 4), elements=elements.map(lambda x: float(np.dtype(dtype).type(x)))))
    begins = draw(hnp.arrays(bool, number, elements=st.sampled_from([False, False, False, True])))
    return boxes, (begins.cumsum() - begins[0]).astype(np.int64)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NMS ignores them around both functions
def test_trees_find_what_a_comparison_finds(small_trees: None, dtype: str) -> None:
    @given(grouped_boxes(dtype), grouped_boxes(dtype), st.sampled_from(THRESHOLDS))
    def check(left: Any, right: Any, threshold: float) -> None:
        first, second = overlaps.overlapping_pairs(*left, threshold)
        expected = np.triu(by_comparison(*left, *left, threshold), k=1)
        assert sorted(map(list, zip(first.tolist(), second.tolist(), strict=True))) == np.argwhere(expected).tolist()
        found = overlaps.overlapped(*left, *right, threshold)
        assert found.tolist() == by_comparison(*left, *right, threshold).any(axis=1).tolist()

    check()


@pytest.mark.parametrize("num_boxes", [200, 300, 2000])  # compared directly; in a tree of one level; of two levels
@pytest.mark.parametrize("num_groups", [1, 7])
def test_many_boxes(num_boxes: int, num_groups: int) -> None:
    generator = np.random.default_rng(0)
    corner = generator.random((num_boxes, 2)) * 100
    boxes = np.concatenate((corner, corner + generator.random((num_boxes, 2)) * 40), axis=1).astype(np.float32)
    group = np.sort(generator.integers(num_groups, size=num_boxes))
    first, second = overlaps.overlapping_pairs(boxes, group, 0.4)
    expected = np.triu(by_comparison(boxes, group, boxes, group, 0.4), k=1)
    assert expected.sum() > 10
    found = np.zeros_like(expected)
    found[first, second] = True
    assert (found == expected).all() and len(first) == expected.sum()
    found = overlaps.overlapped(boxes[::2], group[::2], boxes[1::2], group[1::2], 0.4)
    assert (found == by_comparison(boxes[::2], group[::2], boxes[1::2], group[1::2], 0.4).any(axis=1)).all()


def test_small_groups_beside_a_large_one_take_little_memory() -> None:
    sizes = np.array([5000] + [1] * 3000)
    boxes = np.random.default_rng(0).random((sizes.sum(), 4), dtype=np.float32)
    depth = overlaps._depth(sizes, sizes)
    tree = overlaps._tree_of(boxes, np.repeat(np.arange(len(sizes)), sizes), sizes, depth, 0.5)
    # A group of one box takes a node of eight on each level.
    assert sum(level.members[0].size for level in tree.levels) < 2 * 5000 + 3000 * overlaps.FANOUT * depth
    assert depth == 3
