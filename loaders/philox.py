"""Random words that are a pure function of (seed, epoch, sample id): Philox 4x32-10, computed for a whole batch at once.

A counter-based generator has no state to save: any rank, thread or resumed run computes the same words for a sample.
Source: Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the constants and the known
answers of the tests are those of its Random123 library.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stagein.formats.native_code import NativeKernel

_fill_uniforms = NativeKernel(f"{__package__}.philox_kernels", "fill_uniforms")
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW_WORD = 0xFFFFFFFF
WORD_BITS = 32
WORDS_PER_BLOCK = 4


def philox4x32(counter: ArrayLike, key: tuple[int, int]) -> NDArray[np.uint32]:
    """The four random words of each counter `[..., 4]` (32-bit values) under one key of two 32-bit values."""
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, dtype=np.uint64), -1, 0)
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> WORD_BITS) ^ c1 ^ np.uint64(k0),
            product1 & LOW_WORD,
            (product0 >> WORD_BITS) ^ c3 ^ np.uint64(k1),
            product0 & LOW_WORD,
        )
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW_WORD, (k1 + KEY_STEPS[1]) & LOW_WORD
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def sample_uniforms(seed: int, epoch: int, ids: NDArray[np.int64], blocks: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), float64 `[len(ids), blocks, 4]`: the same for a sample wherever and whenever it is loaded.

    The key is the seed (64 bits), the counter (block, epoch, sample id): no two numbers of a run share a counter.
    """
    key, epoch = (seed & LOW_WORD, (seed >> WORD_BITS) & LOW_WORD), epoch & LOW_WORD
    uniforms = np.empty((len(ids), blocks, WORDS_PER_BLOCK))
    fill = _fill_uniforms.call_with(*key, epoch, np.ascontiguousarray(ids, np.int64), uniforms)
    if fill is not None:
        fill()
        return uniforms
    ids64 = ids.astype(np.uint64)[:, None]
    block_numbers = np.arange(blocks, dtype=np.uint64)[None, :]
    counter = np.empty((len(ids), blocks, WORDS_PER_BLOCK), dtype=np.uint64)
    counter[..., 0] = block_numbers
    counter[..., 1] = np.uint64(epoch)
    counter[..., 2] = ids64 & LOW_WORD
    counter[..., 3] = ids64 >> WORD_BITS
    return philox4x32(counter, key).astype(np.float64) * 2.0**-32
