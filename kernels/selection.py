"""Device code shared by the kernels: the k best of many keys, without sorting them.

A key is a score's bits, as int32, or as the upper half of an int64 whose lower half tells equal scores apart:
non-negative floats order as their bits do. A negative key is no candidate.
"""

import triton
import triton.language as tl


@triton.jit
def limit_of_k_largest(keys_ptr, num_keys, k, TOP_BIT: tl.constexpr, BLOCK: tl.constexpr):
    """A limit that at most k of the keys exceed, and how many do: k, or fewer only if equal keys straddle the border.

    Bit by bit from TOP_BIT, the highest that any key has: a bit of the k-th largest key is set iff at least k keys
    reach the number it makes. Ends as soon as exactly k do, which for random keys takes some log2(num_keys) bits
    beyond those that all have in common. -1 at once where all candidates are wanted. The first BLOCK keys stay in
    registers, others in the cache.
    """
    index = tl.arange(0, BLOCK)
    head = tl.load(keys_ptr + index, mask=index < num_keys, other=-1)
    none = tl.cast(0, head.dtype)
    kth, bit, one = none, tl.cast(TOP_BIT, head.dtype), none + 1
    candidates = _count_above(head, keys_ptr, num_keys, none - 1, BLOCK)
    reaching = candidates
    while (reaching > k) & (bit >= 0):
        candidate = kth | (one << bit)
        count = _count_above(head, keys_ptr, num_keys, candidate - 1, BLOCK)
        kth = tl.where(count >= k, candidate, kth)
        reaching = tl.where(count >= k, count, reaching)
        bit -= 1
    # More than k reach it still: equal ones, of which none is taken here.
    straddled = reaching > k
    above = _count_above(head, keys_ptr, num_keys, kth, BLOCK)
    return tl.where(straddled, kth, kth - 1), tl.where(straddled, above, reaching)


@triton.jit
def _count_above(head, keys_ptr, num_keys, limit, BLOCK: tl.constexpr):
    """How many keys are larger than `limit`."""
    count = (head > limit).to(tl.int32)
    for start in range(BLOCK, num_keys, BLOCK):
        index = start + tl.arange(0, BLOCK)
        count += (tl.load(keys_ptr + index, mask=index < num_keys, other=-1) > limit).to(tl.int32)
    # One sum across the threads at the end, not one a block: it is what a pass takes longest for.
    return tl.sum(count)


@triton.jit
def compact_above(keys_ptr, num_keys, limit, BLOCK: tl.constexpr):
    """Move the keys larger than `limit` to the front, in their order, and return how many there are."""
    count = 0
    for start in range(0, num_keys, BLOCK):
        index = start + tl.arange(0, BLOCK)
        keys = tl.load(keys_ptr + index, mask=index < num_keys, other=-1)
        one = (keys > limit).to(tl.int32)
        slot = count + tl.cumsum(one, 0) - one
        # A key may move to where another thread has yet to read.
        tl.debug_barrier()
        tl.store(keys_ptr + slot, keys, mask=one > 0)
        count += tl.sum(one)
    # Other threads of the program read what this one wrote.
    tl.debug_barrier()
    return count


@triton.jit
def rank_descending(keys_ptr, keys, count, BLOCK: tl.constexpr):
    """The places of `keys` when all `count` keys, which are distinct, are sorted, the largest first."""
    rank = tl.zeros([keys.shape[0]], tl.int32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        others = tl.load(keys_ptr + index, mask=index < count, other=-1)
        rank += tl.sum((others[None, :] > keys[:, None]).to(tl.int32), axis=1)
    return rank
