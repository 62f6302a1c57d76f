"""The k largest of many keys, without sorting them.

A key is the bits of a non-negative float as int32, or these bits as the upper half of an int64 whose lower half tells
equal scores apart. The bits of non-negative floats are ordered as the floats are. A negative key is not a candidate.
"""

import triton
import triton.language as tl

from ssdcore.kernels.device.constant import Constant

# The highest bit of int64 keys, which are a score above a number that makes the key unique: 1.0 is 0x3F800000.
NUMBERED_SCORE_TOP_BIT = Constant(32 + 29)
MORE_TILES = Constant(4)  # tiles read at once of the keys that do not stay in registers
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
def largest_key(first_keys, keys_ptr, num_keys):
    """The largest key. `first_keys` are the first keys, as `load_keys` returns them."""
    return tl.max(_largest_of_columns(first_keys, keys_ptr, num_keys))


@triton.jit
def bounds_of_k_largest(first_keys, keys_ptr, num_keys, k):
    """Bounds for `limit_between`: a number that at least k keys exceed, or -1; and the largest key."""
    largest = _largest_of_columns(first_keys, keys_ptr, num_keys)
    # These are TILE different keys. If k is not larger than TILE, at least k keys reach the least of them.
    TILE: tl.constexpr = first_keys[0].shape[0]
    low = tl.where(k <= TILE, tl.maximum(tl.min(largest) - 1, -1), -1)
    return low, tl.max(largest)


@triton.jit
def limit_between(first_keys, keys_ptr, num_keys, fewest, most, low, high):
    """A limit that at least `fewest` and at most `most` of the keys exceed, and the number of keys that exceed it.

    The limit is `low` if at most `most` keys exceed it. Otherwise the number is less than `fewest` only if equal keys
    straddle the border: then they equal the limit, and none of them exceeds it.

    Every step of the search halves the interval between the bounds, and counts the keys above its middle. If the keys
    between the bounds spread over r, and those between the `fewest`-th and the `most`-th largest over w, it takes about
    log2(r / w) steps.

    Args:
        first_keys: the first keys, as `load_keys` returns them. They stay in registers; further keys are read again
            from the cache in every step.
        keys_ptr: [num_keys].
        num_keys: the number of keys.
        fewest, most: the farther apart, the fewer the steps.
        low, high: -1 or more; no key exceeds `high`.
    """
    limit, num_above = low, _count_above(first_keys, keys_ptr, num_keys, low)
    if num_above > most:
        limit, num_above = high, tl.zeros_like(num_above)
        while (num_above < fewest) & (limit - low > 1):
            middle = low + ((limit - low) >> 1)
            count = _count_above(first_keys, keys_ptr, num_keys, middle)
            fits = count <= most
            low = tl.where(fits, low, middle)
            limit = tl.where(fits, middle, limit)
            num_above = tl.where(fits, count, num_above)
    return limit, num_above


@triton.jit
def _largest_of_columns(first_keys, keys_ptr, num_keys):
    """The largest of every TILE-th key: [TILE], the first column from key 0 on."""
    TILES: tl.constexpr = len(first_keys)
    TILE: tl.constexpr = first_keys[0].shape[0]
    largest = _elementwise_max(first_keys[0], first_keys)
    MORE: tl.constexpr = TILES if TILES < MORE_TILES else MORE_TILES
    for start in range(TILES * TILE, num_keys, MORE * TILE):
        largest = _elementwise_max(largest, load_keys(keys_ptr, start, num_keys, MORE, TILE))
    return largest


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
    MORE: tl.constexpr = TILES if TILES < MORE_TILES else MORE_TILES
    for start in range(TILES * TILE, num_keys, MORE * TILE):
        count += _count_in_tiles(load_keys(keys_ptr, start, num_keys, MORE, TILE), limit)
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
def compact_above(keys_ptr, num_keys, limit, TILES: tl.constexpr, TILE: tl.constexpr):
    """Move the keys larger than `limit` to the front, in any order, and return their number."""
    count = 0
    for start in range(0, num_keys, TILES * TILE):
        tiles = load_keys(keys_ptr, start, num_keys, TILES, TILE)
        # One sum over the threads for all tiles: the keys of a thread get neighbouring slots.
        above = _count_in_tiles(tiles, limit)
        slot = count + tl.cumsum(above, 0) - above
        # A key may move to where another thread has yet to read.
        tl.debug_barrier()
        for i in tl.static_range(TILES):
            is_above = tiles[i] > limit
            tl.store(keys_ptr + slot, tiles[i], mask=is_above)
            slot += is_above.to(tl.int32)
        count += tl.sum(above)
    # Other threads of the program read what this thread wrote.
    tl.debug_barrier()
    return count


@triton.jit
def keep_k_largest(keys_ptr, num_keys, k, TOP_BIT: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr):
    """Reduce a list of distinct keys to its k largest, and return how many are left."""
    if num_keys > k:
        first_keys = load_keys(keys_ptr, 0, num_keys, TILES, TILE)
        top = tl.cast(1, first_keys[0].dtype) << TOP_BIT
        # Bounds that depend on the keys save steps, but take registers.
        limit, _ = limit_between(first_keys, keys_ptr, num_keys, k, k, tl.cast(-1, top.dtype), top - 1 + top)
        num_keys = compact_above(keys_ptr, num_keys, limit, TILES, TILE)
    return num_keys


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
