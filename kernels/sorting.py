"""Sorting in NumPy: by integer keys, several times faster than a stable sort of indices."""

import numpy as np


def stable_order(keys: np.ndarray) -> np.ndarray:
    """The indices that sort the integers `keys` [M] upwards; equal keys keep their order."""
    # Numbers are sorted faster than indices. So the index becomes the low part of the number, if there is room for it.
    bits = len(keys).bit_length()
    if len(keys) == 0 or int(keys.max()) - int(keys.min()) >= 1 << (62 - bits):
        return keys.argsort(kind="stable")
    numbers = ((keys.astype(np.int64) - keys.min()) << bits) | np.arange(len(keys))
    numbers.sort()
    return numbers & ((1 << bits) - 1)


def descending_keys(scores: np.ndarray) -> np.ndarray:
    """Integers that sort upwards as float32 or float64 `scores` sort downwards. NaN comes first; -0.0 equals 0.0."""
    bits = 8 * scores.dtype.itemsize
    largest = 2 ** (bits - 1) - 1
    keys: np.ndarray = (scores + 0).view(f"int{bits}")  # -0.0 + 0 is 0.0
    keys = keys ^ (np.right_shift(keys, bits - 1) & largest)  # of negative numbers, larger bits mean less
    keys[np.isnan(scores)] = largest
    return np.invert(keys)


def numbered(*keys: np.ndarray) -> np.ndarray:
    """Groups numbered from 0 on, given sorted keys [M]: a group begins wherever a key changes."""
    begins = np.zeros(len(keys[0]), dtype=bool)
    for key in keys:
        begins[1:] |= key[1:] != key[:-1]
    return begins.cumsum()


def rank_in_group(group: np.ndarray) -> np.ndarray:
    """The position of each row within its group, given sorted groups [M] that are numbered from 0 on."""
    sizes = np.bincount(group)
    return np.arange(len(group)) - (sizes.cumsum() - sizes).take(group)
