"""The k largest of many keys, without sorting them.

A key is the bits of a non-negative float as int32, or these bits as the upper half of an int64 whose lower half tells
equal scores apart. The bits of non-negative floats are ordered as the floats are. A negative key is not a candidate.
"""

import triton
import triton.language as tl

from ssdcore.kernels.device.constant import Constant

# The highest bit that a key has: the search for the k-th largest begins there. 1.0 is 0x3F800000.
NUMBERED_SCORE_TOP_BIT = Constant(32 + 29)  # int64 keys: a score above a number that makes the key unique
LAST_NUMBER = Constant(0x7FFFFFFF)  # no ground truth, anchor or candidate has this number


@triton.jit
def complement(number):
    """The low word of a key, or the number in it: the lower the number, the larger the key."""
    return tl.cast(LAST_NUMBER, number.dtype) - number


@triton.jit
def load_keys(keys_ptr, start, num_keys, TILES: tl.constexpr, TILE: tl.constexpr):
    """TILES * TILE keys from number `start` on, as a tuple of tiles [TILE]; -1 where no key exists.

    A number of tiles fits the number of keys closely. A single tensor would have a power of two.
    """
    tiles = ()
    for i in tl.static_range(TILES):
        index = start + i * TILE + tl.arange(0, TILE)
        tiles += (tl.load(keys_ptr + index, mask=index < num_keys, other=-1),)
    return tiles


@triton.jit
def limit_of_k_largest(keys_ptr, num_keys, k, TOP_BIT: tl.constexpr, BLOCK: tl.constexpr):
    """A limit that at most k of the keys exceed, and the number of keys that exceed it.

    That number is k, or less if there are fewer candidates or if equal keys straddle the border. If all candidates are
    among the k largest, the limit is -1 at once. The first BLOCK keys stay in registers; further keys are read again
    from the cache in every step of the search.
    """
    first_keys = load_keys(keys_ptr, 0, num_keys, 1, BLOCK)
    one = tl.cast(1, first_keys[0].dtype)
    return limit_between(first_keys, keys_ptr, num_keys, k, -one, (one << TOP_BIT) - 1 + (one << TOP_BIT))


@triton.jit
def bounds_of_k_largest(first_keys, keys_ptr, num_keys, k):
    """Bounds of the search for the k largest keys: a number that at least k keys exceed, or -1; and the largest key.

    `first_keys` are the first keys, as `load_keys` returns them.
    """
    TILES: tl.constexpr = len(first_keys)
    TILE: tl.constexpr = first_keys[0].shape[0]
    largest = _elementwise_max(first_keys[0], first_keys)
    for start in range(TILES * TILE, num_keys, TILES * TILE):
        largest = _elementwise_max(largest, load_keys(keys_ptr, start, num_keys, TILES, TILE))
    # These are TILE different keys. If k is not larger than TILE, at least k keys reach the least of them.
    low = tl.where(k <= TILE, tl.maximum(tl.min(largest) - 1, -1), -1)
    return low, tl.max(largest)


@triton.jit
def limit_between(first_keys, keys_ptr, num_keys, k, low, high):
    """What `limit_of_k_largest` returns. At least k keys exceed `low`, unless it is -1; no key exceeds `high`.

    Every step of the search halves the interval between the bounds, and counts the keys above its middle. The search
    ends as soon as exactly k keys exceed a bound. Random keys take about log2(num_keys) steps beyond those that bring
    the bounds to the smallest and the largest key. If equal keys straddle the border, the search ends when no number
    lies between the bounds. The limit is the upper bound then, so that none of the equal keys exceeds it.
    """
    num_above_low = _count_above(first_keys, keys_ptr, num_keys, low)
    num_above_high = 0
    while (num_above_low > k) & (num_above_high < k) & (low < high - 1):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # the sum of the bounds could overflow
        count = _count_above(first_keys, keys_ptr, num_keys, middle)
        raises_low = count >= k
        low = tl.where(raises_low, middle, low)
        num_above_low = tl.where(raises_low, count, num_above_low)
        high = tl.where(raises_low, high, middle)
        num_above_high = tl.where(raises_low, num_above_high, count)
    low_is_limit = num_above_low <= k
    return tl.where(low_is_limit, low, high), tl.where(low_is_limit, num_above_low, num_above_high)


@triton.jit
def _elementwise_max(largest, tiles):
    for i in tl.static_range(len(tiles)):
        largest = tl.maximum(largest, tiles[i])
    return largest


@triton.jit
def _count_above(first_keys, keys_ptr, num_keys, limit):
    """The number of keys that are larger than `limit`, which is less than the largest number of its type."""
    TILES: tl.constexpr = len(first_keys)
    TILE: tl.constexpr = first_keys[0].shape[0]
    count = _count_in_tiles(first_keys, limit)
    for start in range(TILES * TILE, num_keys, TILES * TILE):
        count += _count_in_tiles(load_keys(keys_ptr, start, num_keys, TILES, TILE), limit)
    # One sum across the threads, at the end: it takes longer than the rest of a step.
    return tl.sum(count)


@triton.jit
def _count_in_tiles(tiles, limit):
    """The numbers of keys that are larger than `limit`, added up over the tiles but not within them: int32 [TILE]."""
    count = _is_above(tiles[0], limit)
    for i in tl.static_range(1, len(tiles)):
        count += _is_above(tiles[i], limit)
    return count


@triton.jit
def _is_above(keys, limit):
    """1 where a key is larger than `limit`, and 0 elsewhere."""
    # The sign of the difference, because the result of a comparison takes longer to become a number.
    return -((limit - keys) >> (keys.dtype.primitive_bitwidth - 1)).to(tl.int32)


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
def coarse_limit(keys_ptr, num_keys, floor, fewest, most, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """A limit that at least `fewest` and at most `most` of the keys exceed, and the number of keys that exceed it.

    That number is less than `fewest` only if equal keys straddle the border: then none of them exceeds the limit. If
    there are no more than `most` candidates, the limit is -1. The search halves an interval, which takes about
    log2(r / w) steps if the keys spread over r and those between the `fewest`-th and the `most`-th largest over w. The
    first FIRST keys stay in registers; further keys are read again from the cache in every step.

    Args:
        keys_ptr: [num_keys].
        num_keys: the number of keys.
        floor: a key that every candidate exceeds, the larger the better.
        fewest, most: at most num_keys; the farther apart, the fewer the steps.
        FIRST: a power of two, a multiple of BLOCK.
        BLOCK: keys that are counted side by side, best as many as there are threads.
    """
    row, column = tl.arange(0, FIRST // BLOCK)[:, None], tl.arange(0, BLOCK)
    index = row * BLOCK + column[None, :]
    first_keys = tl.load(keys_ptr + index, mask=index < num_keys, other=-1)
    limit = tl.cast(-1, first_keys.dtype)
    num_above = _num_above(first_keys, keys_ptr, num_keys, limit, BLOCK)
    if num_above > most:
        low = tl.maximum(limit, tl.cast(floor, limit.dtype))  # more than `most` keys exceed it
        limit = _largest(first_keys, keys_ptr, num_keys, BLOCK)  # at most `most` keys exceed it
        num_above = tl.zeros_like(num_above)
        while (num_above < fewest) & (limit - low > 1):
            middle = low + ((limit - low) >> 1)
            count = _num_above(first_keys, keys_ptr, num_keys, middle, BLOCK)
            fits = count <= most
            low = tl.where(fits, low, middle)
            limit = tl.where(fits, middle, limit)
            num_above = tl.where(fits, count, num_above)
    return limit, num_above


@triton.jit
def _num_above(first_keys, keys_ptr, num_keys, limit, BLOCK: tl.constexpr):
    """The number of keys larger than `limit`, of which the first are `first_keys` [rows, BLOCK]."""
    count = tl.sum((first_keys > limit).to(tl.int32), axis=0)
    for start in range(first_keys.shape[0] * BLOCK, num_keys, BLOCK):
        index = start + tl.arange(0, BLOCK)
        count += (tl.load(keys_ptr + index, mask=index < num_keys, other=-1) > limit).to(tl.int32)
    # One sum across the threads, at the end: it takes as long as counting dozens of keys.
    return tl.sum(count)


@triton.jit
def _largest(first_keys, keys_ptr, num_keys, BLOCK: tl.constexpr):
    """The largest key, of which the first are `first_keys` [rows, BLOCK]."""
    largest = tl.max(first_keys, axis=0)
    for start in range(first_keys.shape[0] * BLOCK, num_keys, BLOCK):
        index = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(keys_ptr + index, mask=index < num_keys, other=-1))
    return tl.max(largest)


@triton.jit
def pad_keys(keys_ptr, num_keys, BLOCK: tl.constexpr):
    """Fill a list of keys up to a multiple of BLOCK with keys that are no candidates."""
    index = num_keys + tl.arange(0, BLOCK)
    tl.store(keys_ptr + index, tl.full([BLOCK], -1, tl.int64), mask=index < tl.cdiv(num_keys, BLOCK) * BLOCK)
    # Other threads of the program read what this thread wrote.
    tl.debug_barrier()


@triton.jit
def rank_descending(keys_ptr, keys, num_keys, BLOCK: tl.constexpr):
    """The positions that `keys` have when all `num_keys` keys, which are distinct, are sorted, largest first.

    The list is padded to a multiple of BLOCK (`pad_keys`), because a mask would make five instructions of each load.
    """
    larger = tl.zeros([BLOCK, keys.shape[0]], tl.int32)
    for start in range(0, num_keys, BLOCK):
        others = tl.load(keys_ptr + start + tl.arange(0, BLOCK))
        larger += (others[:, None] > keys[None, :]).to(tl.int32)
    # One sum across the threads, at the end.
    return tl.sum(larger, axis=0)
