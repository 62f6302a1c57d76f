"""The k largest of many keys, without sorting them.

A key is the bits of a non-negative float as int32, or these bits as the upper half of an int64 whose lower half tells
equal scores apart. The bits of non-negative floats are ordered as the floats are. A negative key is not a candidate.
"""

import triton
import triton.language as tl

from ssdcore.kernels.device.constant import Constant

# The highest bit that any key of a kind has: the search for the k-th largest begins there.
SCORE_TOP_BIT = Constant(29)  # int32 keys of scores: 1.0 is 0x3F800000
FLOAT_TOP_BIT = Constant(30)  # int32 keys of any float: infinity is 0x7F800000
NUMBERED_SCORE_TOP_BIT = Constant(32 + 29)  # int64 keys: a score above a number that makes the key unique
LAST_NUMBER = Constant(0x7FFFFFFF)  # no ground truth, anchor or candidate has this number


@triton.jit
def complement(number):
    """The low word of a key, or the number in it: the lower the number, the larger the key."""
    return tl.cast(LAST_NUMBER, number.dtype) - number


@triton.jit
def limit_of_k_largest(keys_ptr, num_keys, k, TOP_BIT: tl.constexpr, BLOCK: tl.constexpr):
    """A limit that at most k of the keys exceed, and the number of keys that exceed it.

    That number is k, or less if there are fewer candidates or if equal keys straddle the border. The search sets the
    bits of the k-th largest key one by one, from TOP_BIT down: a bit is set if and only if at least k keys reach the
    number that it makes. It ends as soon as exactly k keys do. Random keys take about log2(num_keys) bits beyond those
    that all keys share. If all candidates are among the k largest, the limit is -1 at once. The first BLOCK keys stay
    in registers; further keys are read again from the cache in every step.
    """
    index = tl.arange(0, BLOCK)
    first_keys = tl.load(keys_ptr + index, mask=index < num_keys, other=-1)
    zero = tl.cast(0, first_keys.dtype)
    kth, bit, lowest_bit = zero, tl.cast(TOP_BIT, first_keys.dtype), zero + 1
    num_candidates = _count_above(first_keys, keys_ptr, num_keys, zero - 1, BLOCK)
    num_reaching = num_candidates
    while (num_reaching > k) & (bit >= 0):
        raised = kth | (lowest_bit << bit)
        count = _count_above(first_keys, keys_ptr, num_keys, raised - 1, BLOCK)
        kth = tl.where(count >= k, raised, kth)
        num_reaching = tl.where(count >= k, count, num_reaching)
        bit -= 1
    # If equal keys straddle the border, more than k keys still reach `kth`. The limit is `kth` itself then, so that
    # none of the equal keys exceeds it.
    straddled = num_reaching > k
    num_above = _count_above(first_keys, keys_ptr, num_keys, kth, BLOCK)
    return tl.where(straddled, kth, kth - 1), tl.where(straddled, num_above, num_reaching)


@triton.jit
def _count_above(first_keys, keys_ptr, num_keys, limit, BLOCK: tl.constexpr):
    """The number of keys that are larger than `limit`."""
    count = (first_keys > limit).to(tl.int32)
    for start in range(BLOCK, num_keys, BLOCK):
        index = start + tl.arange(0, BLOCK)
        count += (tl.load(keys_ptr + index, mask=index < num_keys, other=-1) > limit).to(tl.int32)
    # One sum across the threads, at the end: it takes longer than the rest of a step.
    return tl.sum(count)


@triton.jit
def compact_above(keys_ptr, num_keys, limit, BLOCK: tl.constexpr):
    """Move the keys larger than `limit` to the front, in their order, and return their number."""
    count = 0
    for start in range(0, num_keys, BLOCK):
        index = start + tl.arange(0, BLOCK)
        keys = tl.load(keys_ptr + index, mask=index < num_keys, other=-1)
        above = (keys > limit).to(tl.int32)
        slot = count + tl.cumsum(above, 0) - above
        # A key may move to where another thread has yet to read.
        tl.debug_barrier()
        tl.store(keys_ptr + slot, keys, mask=above > 0)
        count += tl.sum(above)
    # Other threads of the program read what this thread wrote.
    tl.debug_barrier()
    return count


@triton.jit
def keep_k_largest(keys_ptr, num_keys, k, TOP_BIT: tl.constexpr, BLOCK: tl.constexpr):
    """Reduce a list of distinct keys to its k largest, and return how many are left."""
    if num_keys > k:
        limit, _ = limit_of_k_largest(keys_ptr, num_keys, k, TOP_BIT, BLOCK)
        num_keys = compact_above(keys_ptr, num_keys, limit, BLOCK)
    return num_keys


@triton.jit
def rank_descending(keys_ptr, keys, num_keys, BLOCK: tl.constexpr):
    """The positions that `keys` have when all `num_keys` keys, which are distinct, are sorted, largest first."""
    rank = tl.zeros([keys.shape[0]], tl.int32)
    for start in range(0, num_keys, BLOCK):
        index = start + tl.arange(0, BLOCK)
        others = tl.load(keys_ptr + index, mask=index < num_keys, other=-1)
        rank += tl.sum((others[None, :] > keys[:, None]).to(tl.int32), axis=1)
    return rank
