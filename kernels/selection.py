"""Device code shared by the kernels: the k best of many keys, without sorting them.

A key is a score's bits as int32: non-negative floats order as their bits do. A negative key is no candidate. Equal
keys go to the lowest index, so a selection is one set, the same on every run.
"""

import triton
import triton.language as tl


@triton.jit
def kth_largest(keys_ptr, num_keys, k, BLOCK: tl.constexpr):
    """The k-th largest of the keys, and how many are larger; 0 if fewer than k are candidates.

    Bit by bit from the top: a bit of the answer is set iff at least k keys reach the number it makes. 31 passes
    over the keys, which stay in the cache, and no memory; none where all candidates are wanted.
    """
    kth = 0
    if _count_above(keys_ptr, num_keys, -1, BLOCK) > k:
        for step in range(31):
            candidate = kth | (1 << (30 - step))
            kth = tl.where(_count_above(keys_ptr, num_keys, candidate - 1, BLOCK) >= k, candidate, kth)
    return kth, _count_above(keys_ptr, num_keys, kth, BLOCK)


@triton.jit
def _count_above(keys_ptr, num_keys, limit, BLOCK: tl.constexpr):
    """How many keys are larger than `limit`."""
    # One sum across the threads at the end, not one a block: it is what a pass takes longest for.
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_keys, BLOCK):
        index = start + tl.arange(0, BLOCK)
        keys = tl.load(keys_ptr + index, mask=index < num_keys, other=-1)
        count += (keys > limit).to(tl.int32)
    return tl.sum(count)


@triton.jit
def among_k_largest(keys, kth, ties_wanted, ties_seen):
    """Which of a block of keys are selected, and the ties seen once it is done; blocks come in index order."""
    tie = (keys == kth).to(tl.int32)
    tie_rank = ties_seen + tl.cumsum(tie, 0) - tie
    selected = (keys > kth) | ((tie > 0) & (tie_rank < ties_wanted))
    return selected & (keys >= 0), ties_seen + tl.sum(tie)


@triton.jit
def compact_k_largest(keys_ptr, num_keys, k, out_keys_ptr, out_index_ptr, BLOCK: tl.constexpr):
    """Write the k largest keys and their indices, in index order, and return how many there are."""
    kth, larger = kth_largest(keys_ptr, num_keys, k, BLOCK)
    count = 0
    ties_seen = 0
    for start in range(0, num_keys, BLOCK):
        index = start + tl.arange(0, BLOCK)
        keys = tl.load(keys_ptr + index, mask=index < num_keys, other=-1)
        selected, ties_seen = among_k_largest(keys, kth, k - larger, ties_seen)
        one = selected.to(tl.int32)
        slot = count + tl.cumsum(one, 0) - one
        tl.store(out_keys_ptr + slot, keys, mask=selected)
        tl.store(out_index_ptr + slot, index, mask=selected)
        count += tl.sum(one)
    # Other threads of the program read what this one wrote.
    tl.debug_barrier()
    return count


@triton.jit
def rank_descending(keys_ptr, keys, index, count, BLOCK: tl.constexpr):
    """The places of `keys`, which stand at `index`, when all `count` keys are sorted: descending, then by index."""
    rank = tl.zeros_like(index)
    for start in range(0, count, BLOCK):
        other_index = start + tl.arange(0, BLOCK)
        others = tl.load(keys_ptr + other_index, mask=other_index < count, other=-1)
        before = (others[None, :] > keys[:, None]) | (
            (others[None, :] == keys[:, None]) & (other_index[None, :] < index[:, None])
        )
        rank += tl.sum(before.to(tl.int32), axis=1)
    return rank
