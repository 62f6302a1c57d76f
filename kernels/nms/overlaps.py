"""Which boxes overlap by more than a threshold, found in NumPy without comparing every pair.

Few boxes are compared directly. Many are first put into a tree, whose leaves hold eight boxes that lie near each other
and have similar sizes, and whose other nodes hold eight nodes. Two nodes are compared only if the bounds of all boxes
below them allow an IoU above the threshold. The pairs of boxes that remain are decided with the arithmetic of
`pairwise_iou`, step by step, so that the decisions are those of every other implementation.

NumPy runs in the calling thread alone. PyTorch would divide the work among threads that wait for each other at the end
of each operation, and such a wait takes milliseconds where another process keeps the processor busy.
"""

from typing import NamedTuple

import numpy as np

from ssdcore.kernels.sorting import stable_order

DIRECT_PAIRS = 2**16  # compared without a tree: 256 KB per array
FANOUT = 8  # boxes of a leaf, and nodes of any other node
ROOT_PAIRS = 2**10  # with more pairs of roots, the tree gets another level
PAIRS_AT_ONCE = 256  # of nodes: 16,384 pairs of what they hold, 64 KB per array
MARGIN = 1 - 1e-5  # exceeds the rounding errors of a comparison, a few times 2**-24, by far
CELLS = 256  # of a grid over the boxes, along each axis
# The bits of each number below CELLS at every other position: two of them interleave to the cell's Morton code.
SPREAD_BITS = np.array([sum((x >> bit & 1) << 2 * bit for bit in range(8)) for x in range(CELLS)])


class Level(NamedTuple):
    """The nodes at one height. The nodes of a group follow each other, and NaN fills up the last node of each group."""

    members: np.ndarray  # [5, FANOUT, nodes]: the bounds of what each node holds
    first_member: np.ndarray  # [nodes]: the number of each node's first member on the level below


class Tree(NamedTuple):
    """Boxes in a tree for each group."""

    levels: list[Level]  # leaves first
    order: np.ndarray  # [M]: the boxes, as the members of the leaves are numbered
    first_root: np.ndarray  # [P + 1]: the first root of each group


def overlapping_pairs(boxes: np.ndarray, group: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of `boxes` [M, 4] of the same group whose IoU exceeds `threshold`, as two indices each, lower first.

    `group` [M] numbers the groups from 0 on, and is sorted.
    """
    if len(boxes) ** 2 <= DIRECT_PAIRS:
        first, second = _compare_directly(boxes, boxes, threshold)
        wanted = (first < second) & (group.take(first) == group.take(second))
    else:
        sizes = np.bincount(group)
        tree = _tree_of(boxes, group, sizes, _depth(sizes, sizes), threshold)
        first, second = _compare_trees(tree, tree)
        first, second = np.minimum(first, second), np.maximum(first, second)
        wanted = first != second
    return _decide(boxes, first.compress(wanted), boxes, second.compress(wanted), threshold)


def overlapped(
    boxes: np.ndarray, group: np.ndarray, others: np.ndarray, other_group: np.ndarray, threshold: float
) -> np.ndarray:
    """Which of `boxes` [M, 4] have an IoU above `threshold` with one of `others` [N, 4] of the same group: bool [M].

    Both groups are as in `overlapping_pairs`.
    """
    if len(boxes) * len(others) <= DIRECT_PAIRS:
        first, second = _compare_directly(boxes, others, threshold)
        wanted = group.take(first) == other_group.take(second)
        first, second = first.compress(wanted), second.compress(wanted)
    else:
        num_groups = 1 + max(int(group[-1]), int(other_group[-1]))
        sizes, other_sizes = (np.bincount(x, minlength=num_groups) for x in (group, other_group))
        depth = _depth(sizes, other_sizes)
        tree = _tree_of(boxes, group, sizes, depth, threshold)
        first, second = _compare_trees(tree, _tree_of(others, other_group, other_sizes, depth, threshold))
    found = np.zeros(len(boxes), dtype=bool)
    found[_decide(boxes, first, others, second, threshold)[0]] = True
    return found


def _decide(
    boxes: np.ndarray, index: np.ndarray, others: np.ndarray, other_index: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Those of the pairs of indices whose IoU exceeds `threshold`, by the arithmetic of `pairwise_iou`."""
    a, b = boxes.take(index, axis=0).T, others.take(other_index, axis=0).T
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    intersection = np.multiply(*np.maximum(sides, 0, out=sides))
    union = np.multiply(*(a[2:] - a[:2])) + np.multiply(*(b[2:] - b[:2]))
    union -= intersection
    exceeds = intersection / union > threshold
    return index.compress(exceeds), other_index.compress(exceeds)


# --- bounds -----------------------------------------------------------------------------------------------


def _bounds(corners: np.ndarray, threshold: float) -> np.ndarray:
    """The bounds [5, ...] of boxes, given their coordinates [4, M]: x1, y1, x2, y2 and the least intersection.

    IoU > t needs an intersection of more than t times the larger area. The least intersection is positive, so that
    boxes that do not overlap never reach it.
    """
    bounds = np.empty((5, corners.shape[1]), dtype=corners.dtype)
    bounds[:4] = corners
    area = np.multiply(*(bounds[2:4] - bounds[:2]))
    # `fmax` also turns NaN, which is an infinite area times a threshold of 0, into a bound that excludes nothing.
    np.fmax(area * (threshold * MARGIN), np.finfo(area.dtype).smallest_subnormal, out=bounds[4])
    return bounds


def _near(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where the bounds `a` and `b` [5, ...] allow an IoU above the threshold: flat indices.

    Rounding keeps the order of numbers, so what holds for the bounds of two nodes holds for the boxes below them. A
    NaN allows nothing, because no IoU of it exceeds anything.
    """
    width, height = sides = np.minimum(a[2:4], b[2:4])
    sides -= np.maximum(a[:2], b[:2])
    np.maximum(width, 0, out=width)
    width *= height
    return (width >= np.maximum(a[4], b[4], out=height)).ravel().nonzero()[0]


def _compare_directly(boxes: np.ndarray, others: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The near pairs of `boxes` [M, 4] and `others` [N, 4]: two indices each."""
    a = _bounds(boxes.T, threshold)
    b = a if others is boxes else _bounds(others.T, threshold)
    return np.divmod(_near(a[:, :, None], b[:, None, :]), max(1, len(others)))


def _compare_trees(tree: Tree, other: Tree) -> tuple[np.ndarray, np.ndarray]:
    """The near pairs of boxes of the same group: two indices each. Of a tree with itself, every pair once."""
    first, second = _root_pairs(tree, other)
    for level, other_level in zip(reversed(tree.levels), reversed(other.levels), strict=True):
        found = [(np.empty(0, dtype=np.int64),) * 2]
        for start in range(0, len(first), PAIRS_AT_ONCE):
            i, j = first[start : start + PAIRS_AT_ONCE], second[start : start + PAIRS_AT_ONCE]
            flat = _near(level.members.take(i, axis=2)[:, :, None], other_level.members.take(j, axis=2)[:, None])
            places, pair = np.divmod(flat, len(i))
            below = level.first_member.take(i).take(pair) + places // FANOUT
            other_below = other_level.first_member.take(j).take(pair) + places % FANOUT
            if tree is other:
                once = below <= other_below
                below, other_below = below.compress(once), other_below.compress(once)
            found.append((below, other_below))
        first, second = (np.concatenate(x) for x in zip(*found, strict=True))
    return tree.order.take(first), other.order.take(second)


def _root_pairs(tree: Tree, other: Tree) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of roots of the same group: two numbers each. Of a tree with itself, every pair once."""
    roots_per_group = np.diff(tree.first_root)
    end = np.repeat(other.first_root[1:], roots_per_group)
    begin = np.arange(len(end)) if tree is other else np.repeat(other.first_root[:-1], roots_per_group)
    count = end - begin
    first = np.repeat(np.arange(len(end)), count)
    return first, np.arange(len(first)) - np.repeat(count.cumsum() - count - begin, count)


# --- trees ------------------------------------------------------------------------------------------------


def _depth(sizes: np.ndarray, other_sizes: np.ndarray) -> int:
    """The number of levels for two trees with these many boxes in each group."""
    roots, other_roots, depth = -(-sizes // FANOUT), -(-other_sizes // FANOUT), 1
    while (roots * other_roots).sum() > ROOT_PAIRS + len(sizes):  # a group has one pair at least
        roots, other_roots, depth = -(-roots // FANOUT), -(-other_roots // FANOUT), depth + 1
    return depth


def _tree_of(boxes: np.ndarray, group: np.ndarray, sizes: np.ndarray, depth: int, threshold: float) -> Tree:
    """The tree of `boxes` [M, 4], which are sorted by `group` [M]; `sizes` [P] counts the boxes of each group."""
    order = _order_in_space(boxes, group)
    bounds = _bounds(boxes.take(order, axis=0).T, threshold)
    levels = []
    for _ in range(depth):
        nodes = -(-sizes // FANOUT)
        first_node = np.concatenate(([0], nodes.cumsum()))
        # Each group begins with a new node.
        shift = first_node[:-1] * FANOUT - (sizes.cumsum() - sizes)
        members = np.full((5, first_node[-1] * FANOUT), np.nan, dtype=boxes.dtype)
        members[:, np.arange(bounds.shape[1]) + np.repeat(shift, sizes)] = bounds
        members = members.reshape(5, -1, FANOUT)
        first_member = np.arange(first_node[-1]) * FANOUT - np.repeat(shift, nodes)
        levels.append(Level(np.ascontiguousarray(members.transpose(0, 2, 1)), first_member))
        # `fmin` and `fmax` pass over NaN.
        low, high = np.fmin.reduce(members[:2], axis=2), np.fmax.reduce(members[2:4], axis=2)
        bounds, sizes = np.stack((*low, *high, np.fmin.reduce(members[4], axis=1))), nodes
    return Tree(levels, order, first_node)


def _order_in_space(boxes: np.ndarray, group: np.ndarray) -> np.ndarray:
    """An order of `boxes` [M, 4] by group, then by size, then along a Morton curve through the image."""
    x1, y1, x2, y2 = boxes.T
    key = group << 18
    for bit, side in ((17, x2 - x1), (16, y2 - y1)):
        key |= (side > np.median(side)).astype(np.int64) << bit
    for bit, centre in ((1, x1 + x2), (0, y1 + y2)):
        low, high = np.fmin.reduce(centre), np.fmax.reduce(centre)
        cell = (centre - low) * (CELLS / (high - low))
        # Any cell is right for boxes with NaN or infinite sides, and where all boxes have one centre.
        cell = np.nan_to_num(cell, nan=0, posinf=0, neginf=0).clip(0, CELLS - 1).astype(np.int64)
        key |= SPREAD_BITS.take(cell) << bit
    return stable_order(key)
