"""Sorting in NumPy gives the order of PyTorch's stable sort."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssdcore.kernels import sorting


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64"])
def test_stable_order(dtype: str) -> None:
    limits = np.iinfo(dtype)

    @given(hnp.arrays(dtype, st.integers(0, 40), elements=st.sampled_from([limits.min, -1, 0, 1, 2, limits.max])))
    def check(keys: np.ndarray) -> None:
        assert sorting.stable_order(keys).tolist() == sorted(range(len(keys)), key=keys.__getitem__)

    check()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_descending_keys_sort_as_pytorch_does(dtype: str) -> None:
    next_to_one = np.nextafter(np.dtype(dtype).type(1), np.dtype(dtype).type(2))
    special = st.sampled_from([-np.inf, -next_to_one, -1.0, -0.0, 0.0, 1.0, next_to_one, np.inf, np.nan, -np.nan])
    floats = st.floats(width=32 if dtype == "float32" else 64)

    @given(hnp.arrays(dtype, st.integers(0, 40), elements=st.one_of(special, floats).map(np.dtype(dtype).type)))
    def check(scores: np.ndarray) -> None:
        # `+ 0.0`, because a radix sort would put -0.0 behind 0.0.
        expected = (torch.from_numpy(scores) + 0.0).argsort(descending=True, stable=True)
        assert sorting.stable_order(sorting.descending_keys(scores)).tolist() == expected.tolist()

    check()


def test_groups_are_numbered_and_ranked() -> None:
    image, label = np.array([0, 0, 0, 1, 1, 4]), np.array([2, 2, 3, 3, 3, 3])
    group = sorting.numbered(image, label)
    assert group.tolist() == [0, 0, 1, 2, 2, 3]
    assert sorting.rank_in_group(group).tolist() == [0, 1, 0, 0, 1, 0]
    assert sorting.numbered(image[:0]).tolist() == sorting.rank_in_group(group[:0]).tolist() == []
